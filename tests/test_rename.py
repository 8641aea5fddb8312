"""An adapter outlives a renaming of modules in the host library."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import inarch

FIXTURE = Path(__file__).parent / "fixtures" / "vit_transformers_5_5"


def test_an_adapter_made_under_other_module_names_gives_the_same_output():
    """Made where ViT's layers are `vit.encoder.layer.N` with `attention.attention.query`."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(FIXTURE / "base").eval()
    expected = load_file(FIXTURE / "expected.safetensors")
    logits = expected.pop("logits")
    with torch.no_grad():
        assert not torch.allclose(model(**expected).logits, logits, atol=1e-2)
        adapters = inarch.attach(model)
        name = adapters.load(FIXTURE / "adapter")
        adapters.activate(name)
        assert torch.allclose(model(**expected).logits, logits, atol=1e-6)


def test_the_fixture_was_made_under_the_old_names():
    """The weights on disk keep the names of the version that wrote them; this version has others."""
    from transformers import ViTForImageClassification

    record = json.loads((FIXTURE / "adapter" / "inarch.json").read_text())
    assert record["versions"]["transformers"].startswith("5.5.")
    names = {name for name, _ in ViTForImageClassification.from_pretrained(FIXTURE / "base").named_modules()}
    assert not any("encoder.layer" in name for name in names)
    assert not any("encoder" in key or "vit" in key for key in load_file(FIXTURE / "adapter" / "adapter.safetensors"))
