"""Folders written for the library `adapters`, read again. That library judges in `scripts/adapterhub_write_back.py`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import inarch
from inarch.convert import is_adapterhub
from inarch.testing import tiny

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize(
    "case",
    [
        "adapterhub/bert/bn_inner_norms", "adapterhub/bert/bn_before1_after0_resbefore0", "adapterhub/bert/lora_gate",
        "adapterhub/vit/adapter_plus", "adapterhub/vit/bn_leave_out", "adapterhub_habits/bart/cross",
        "adapterhub_habits/gptj/parallel", "adapterhub_habits/llama/lora", "adapterhub_habits/mt5/lora",
    ],
)  # fmt: skip
def test_what_is_written_computes_what_the_library_did(case, tmp_path):
    origin = FIXTURES / case
    inputs = load_file(origin.parent / "inputs.safetensors")
    model = AutoModel.from_pretrained(origin.parent / "base").eval()
    adapters = inarch.attach(model, example_inputs=inputs)
    adapters.load(origin, name="first")
    adapters.save("first", tmp_path / "a", format="adapterhub")
    assert is_adapterhub(tmp_path / "a")
    name = adapters.load(tmp_path / "a", name="again")
    assert {key: value.tolist() for key, value in adapters[name].items()} == {
        key: value.tolist() for key, value in adapters["first"].items()
    }
    adapters.activate(name)
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
    assert torch.allclose(found, load_file(origin.parent / "outputs.safetensors")[origin.name], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vit", "ia3", "got the methods `ia3` in `a`"),
        ("vit", "lora|seq_bn", "got the methods `lora`, `bottleneck` in `a`"),
        ("vit", "lora[rank_pattern={'*.q':2}]", "got `rank_pattern`, which mean something else there, in `a`"),
        ("vit", "seq_bn[leave_out_roles=[self_attention]]", "got `leave_out_roles`, which mean something else"),
        ("vit", "lora[attn_matrices=[q,o]]", "which has no such place there"),
        ("gpt2", "lora", "got `text0.0.self_attention` of GPT2Block, which has no such place there"),
        ("dinov2", "seq_bn", "got the model type `dinov2`, whose modules have no names there, in `a`"),
    ],
)
def test_what_the_library_does_not_compute_is_not_written(name, config, message, tmp_path):
    adapters = inarch.attach(tiny(name))
    adapters.add("a", config)
    with pytest.raises(inarch.StateError, match=message):
        adapters.save("a", tmp_path / "a", format="adapterhub")
    assert not (tmp_path / "a").exists()
