"""An adapter outlives a renaming of modules in the host library."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

import inarch
from inarch.state import FORMAT_VERSION

FIXTURE = Path(__file__).parent / "fixtures" / "vit_transformers_5_5"


def test_an_adapter_made_under_other_module_names_gives_the_same_output():
    """Made where ViT's layers are `vit.encoder.layer.N` with `attention.attention.query`."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(FIXTURE / "base").eval()
    expected = load_file(FIXTURE / f"expected_format_{FORMAT_VERSION}.safetensors")
    logits = expected.pop("logits")
    with torch.no_grad():
        assert not torch.allclose(model(**expected).logits, logits, atol=1e-2)
        adapters = inarch.attach(model)
        name = adapters.load(FIXTURE / f"adapter_format_{FORMAT_VERSION}")
        adapters.activate(name)
        assert torch.allclose(model(**expected).logits, logits, atol=1e-6)


def test_the_fixture_was_made_under_the_old_names():
    """The weights on disk keep the names of the version that wrote them; this version has others."""
    from transformers import ViTForImageClassification

    folder = FIXTURE / f"adapter_format_{FORMAT_VERSION}"
    record = json.loads((folder / "inarch.json").read_text())
    assert record["versions"]["transformers"].startswith("5.5.")
    assert not any("encoder" in key or "vit" in key for key in load_file(folder / "adapter.safetensors"))
    names = {name for name, _ in ViTForImageClassification.from_pretrained(FIXTURE / "base").named_modules()}
    is_old = any("encoder.layer" in name for name in names)
    if is_old and Version(transformers.__version__) < Version("5.11"):
        pytest.skip("this release of transformers has the old names")
    assert not is_old
