"""Folders written for the library `adapters`, read again. That library judges in `scripts/adapterhub_write_back.py`."""

import json
import logging
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
        "adapterhub_habits/gpt2/lora",
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


def test_updates_of_a_fused_projection_are_one_in_the_order_of_its_thirds(tmp_path):
    """Whatever the order in which they were asked for."""
    adapters = inarch.attach(tiny("gpt2"))
    adapters.add("a", "lora[r=2,attn_matrices=[v,q],init_weights=bert]")
    adapters.save("a", tmp_path / "a", format="adapterhub")
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    own = adapters["a"]
    for side in "AB":
        (whole,) = (value for key, value in stored.items() if key.endswith(f"h.1.attn.c_attn.loras.a.lora_{side}"))
        thirds = [own[f"text0.1.self_attention.lora.{role}.{side}"] for role in "qv"]
        assert torch.equal(whole, torch.cat(thirds))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vit", "ia3", "got the methods `ia3` in `a`"),
        (
            "bert",
            "compacter[phm_dim=2,reduction_factor=4]",
            "got `phm_layer=True`, whose parameters have other names there, in `a`",
        ),
        ("vit", "lora|seq_bn", "got the methods `lora`, `bottleneck` in `a`"),
        ("vit", "lora[rank_pattern={'*.q':2}]", "got `rank_pattern`, which mean something else there, in `a`"),
        ("vit", "seq_bn[leave_out_roles=[self_attention]]", "got `leave_out_roles`, which mean something else"),
        ("vit", "lora[attn_matrices=[q,o]]", "which has no such place there"),
        ("gpt2", "lora[attn_matrices=[q,o]]", "which has no such place there"),
        ("gpt2", "ia3", "bottlenecks and LoRA; got the methods `ia3` in `a`"),
        ("dinov2", "seq_bn", "got the model type `dinov2`, whose modules have no names there, in `a`"),
    ],
)
def test_what_the_library_does_not_compute_is_not_written(name, config, message, tmp_path):
    adapters = inarch.attach(tiny(name))
    adapters.add("a", config)
    with pytest.raises(inarch.StateError, match=message):
        adapters.save("a", tmp_path / "a", format="adapterhub")
    assert not (tmp_path / "a").exists()


HEADS = {
    "layered": "classification[num_labels=3,labels=[bad,so,good]]",
    "pooler": "classification[layers=1,pooling=pooler]",
    "tags": "tagging[num_labels=4,layers=3,activation_function=relu]",
    "answers": "question_answering",
    "choices": "multiple_choice",
    "parse": "dependency_parsing",
    "masks": "masked_lm[layers=3]",
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_written_beside_its_adapter_and_read_again(name, tmp_path):
    """The library itself judges it in `scripts/adapterhub_write_back.py`."""
    model = tiny("bert")
    adapters = inarch.attach(model)
    adapters.add(name, "lora[r=2]")
    adapters.add_head(name, HEADS[name])
    adapters.train(name)
    head = model.get_submodule(f"inarch.heads.{name}")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    adapters.save(name, tmp_path / "a", format="adapterhub")
    adapters.save(name, tmp_path / "a", format="adapterhub")  # over what is there
    record = json.loads((tmp_path / "a" / "head_config.json").read_text())
    assert record["model_class"] == "BertAdapterModel" and record["name"] == name
    other = tiny("bert")
    assert inarch.attach(other).load(tmp_path / "a") == name
    again = other.get_submodule(f"inarch.heads.{name}")
    assert again.config == (head.config.replace(tied=True) if name == "masks" else head.config)
    assert {key: value.tolist() for key, value in again.state_dict().items()} == {
        key: value.tolist() for key, value in head.state_dict().items()
    }
    # as the folders of the library's predecessor name the class
    (tmp_path / "a" / "head_config.json").write_text(json.dumps(record | {"model_class": "BertModelWithHeads"}))
    old = inarch.attach(tiny("bert"))
    old.load(tmp_path / "a")
    assert tuple(old.flexible_heads) == (name,)


@pytest.mark.parametrize("name", ["says", "kind", "pictures", "objects", "next", "mood"])
def test_a_head_is_written_with_the_settings_that_the_library_gives_it(name, tmp_path):
    """It cannot make one with others: `Seq2SeqLMHead` takes no `embedding_size`."""
    origin = FIXTURES / "adapterhub_heads" / name
    record = json.loads((origin / "head_config.json").read_text())
    shared = FIXTURES / "adapterhub" / record["model_type"] / "base"
    base = shared if shared.is_dir() else origin.parent / "bases" / record["model_type"]
    adapters = inarch.attach(AutoModel.from_pretrained(base))
    adapters.save(adapters.load(origin), tmp_path / "a", format="adapterhub")
    assert json.loads((tmp_path / "a" / "head_config.json").read_text())["config"].keys() <= record["config"].keys()


def test_a_models_own_head_is_written_and_read_again(tmp_path):
    model = tiny("bert-classifier")
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.train("a")
    with torch.no_grad():
        model.classifier.weight.normal_()
    adapters.save("a", tmp_path / "a", format="adapterhub")
    record = json.loads((tmp_path / "a" / "head_config.json").read_text())
    assert record["model_class"] == "BertForSequenceClassification" and record["config"] is None
    other = tiny("bert-classifier")
    inarch.attach(other).load(tmp_path / "a")
    assert torch.equal(other.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("classification[pooling=mean]", "got `pooling='mean'` in `a`"),
        ("tagging[bias=False]", "got `bias=False` in `a`"),
        ("masked_lm[dropout_prob=0.1]", "got `dropout_prob` in `a`"),
    ],
)
def test_a_head_that_the_library_does_not_have_is_told_of_and_left_out(head, message, tmp_path, caplog):
    adapters = inarch.attach(tiny("bert"))
    adapters.add("a", "lora")
    adapters.add_head("a", head)
    adapters.train("a")
    with caplog.at_level(logging.WARNING, "inarch"):
        adapters.save("a", tmp_path / "a", format="adapterhub")
    assert message in caplog.text and "only the adapter is written" in caplog.text
    assert not (tmp_path / "a" / "head_config.json").exists()
