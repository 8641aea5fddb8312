"""Flexible heads on their own: folders, averages, names of labels, kinds of one's own."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import inarch
from inarch.core.config import config_class, option
from inarch.core.errors import ConfigError, SetupError, StateError
from inarch.heads import KINDS, Head, HeadConfig, register
from inarch.heads.layers import HEADS
from inarch.testing import tiny, tiny_inputs

HUB = Path(__file__).parent / "fixtures" / "adapterhub_heads"


def with_heads(*names, **settings):
    model = tiny("bert")
    adapters = inarch.attach(model)
    for number, name in enumerate(names):
        adapters.add_head(name, "classification", num_labels=3, **settings)
        for parameter in model.inarch.heads[name].parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(number))
    return model, adapters


@torch.no_grad()
def logits(model, **more):
    return model(**tiny_inputs("bert"), **more).logits


def test_a_head_comes_back_from_its_folder(tmp_path):
    model, adapters = with_heads("a")
    adapters.name_labels("a", ["x", "y", "z"])
    adapters.save_head("a", tmp_path / "a")
    fresh = tiny("bert")
    other = inarch.attach(fresh)
    assert other.load_head(tmp_path / "a") == "a"
    assert other.active_head is None
    assert other.flexible_heads == adapters.flexible_heads
    assert other.flexible_heads["a"].labels == ("x", "y", "z")
    assert torch.equal(logits(fresh, head="a"), logits(model))
    assert not any(parameter.requires_grad for parameter in fresh.inarch.heads["a"].parameters())
    with pytest.raises(SetupError, match="The heads of a model have different names; got `a` again"):
        other.load_head(tmp_path / "a")
    assert other.load_head(tmp_path / "a", name="b") == "b"
    with pytest.raises(StateError, match=r"where `out.weight` has shape .* Load it on the base"):
        inarch.attach(tiny("bart")).load_head(_narrower(tmp_path))
    record = json.loads((tmp_path / "a" / "head.json").read_text())
    (tmp_path / "a" / "head.json").write_text(json.dumps(record | {"head_format_version": 9}))
    with pytest.raises(StateError, match=r"reads heads of format 1; got 9"):
        other.load_head(tmp_path / "a", name="c")
    (tmp_path / "a" / "head.json").write_text("{}")
    with pytest.raises(StateError, match=r"`head.json` must be as `save_head` wrote it; got .*KeyError"):
        other.load_head(tmp_path / "a", name="c")
    with pytest.raises(StateError, match=r"holds `head.json`, .*; got neither in"):
        other.load_head(tmp_path, name="c")


def _narrower(tmp_path):
    _, adapters = with_heads("n", layers=1)
    adapters.save_head("n", tmp_path / "n")
    record = json.loads((tmp_path / "n" / "head.json").read_text())
    record["head"]["num_labels"] = 5
    (tmp_path / "n" / "head.json").write_text(json.dumps(record))
    return tmp_path / "n"


def test_a_head_of_adapterhub_is_read_alone(tmp_path):
    folder = tmp_path / "tags"
    folder.mkdir()
    for file in ("head_config.json", "model_head.safetensors"):
        shutil.copy(HUB / "tags" / file, folder / file)
    model = _base()
    adapters = inarch.attach(model)
    assert adapters.load_head(folder) == "tags"
    other = inarch.attach(_base())
    other.load(HUB / "tags")
    expected = other.head("tags")
    for key, tensor in adapters._heads.tensors(["inarch.heads.tags"]).items():
        assert torch.equal(tensor, expected[key])
    record = json.loads((folder / "head_config.json").read_text())
    del record["config"]
    (folder / "head_config.json").write_text(json.dumps(record | {"model_class": "BertForTokenClassification"}))
    with pytest.raises(StateError, match="got one of the modules of `BertForTokenClassification`"):
        adapters.load_head(folder, name="own")


def _base():
    from transformers import BertModel

    return BertModel.from_pretrained(HUB.parent / "adapterhub" / "bert" / "base").eval()


def test_an_average_of_heads_is_their_weighted_sum():
    model, adapters = with_heads("a", "b")
    adapters.add_head("other", "classification", num_labels=2)
    adapters.average_heads("c", {"a": 1, "b": 3})
    adapters.average_heads("d", ["a", "b", "a"], [1, -2, 1], normalize_weights=False)
    heads = model.inarch.heads
    for key, value in heads["c"].state_dict().items():
        a, b = heads["a"].state_dict()[key], heads["b"].state_dict()[key]
        torch.testing.assert_close(value, a / 4 + b * 3 / 4)
        torch.testing.assert_close(heads["d"].state_dict()[key], 2 * a - 2 * b)
    assert adapters.active_head == "other"
    with pytest.raises(SetupError, match="built alike; got `a` .* and `other`"):
        adapters.average_heads("e", ["a", "other"])
    with pytest.raises(SetupError, match="must be added before it is used; got 'nobody'"):
        adapters.average_heads("e", ["a", "nobody"])
    with pytest.raises(SetupError, match="got `a` again"):
        adapters.average_heads("a", ["a", "b"])
    with pytest.raises(ConfigError, match="names each label once; got 2 names for 3 labels"):
        adapters.name_labels("a", ["x", "y"])


def test_a_head_of_the_name_of_its_adapter_is_saved_with_it_whoever_trained_them(tmp_path):
    """A loop of one's own never calls `train`."""
    model, adapters = with_heads("a")
    adapters.add("a", "lora")
    adapters.activate("a")
    adapters.save("a", tmp_path / "a")
    fresh = tiny("bert")
    inarch.attach(fresh).load(tmp_path / "a")
    inarch.attach(fresh).activate("a")
    assert torch.equal(logits(fresh), logits(model))
    adapters.save("a", tmp_path / "b", head=False)
    other = inarch.attach(tiny("bert"))
    other.load(tmp_path / "b")
    assert not other.flexible_heads


def test_a_kind_of_ones_own_trains_and_is_saved(tmp_path):
    before, modules = dict(KINDS), dict(HEADS)

    @config_class
    class RankingHead(HeadConfig):
        """A score for each sequence."""

        kind: ClassVar[str] = "ranking"
        scale: float = option(1.0, "What the score is multiplied by.", more_than=0)

    class Ranking(Head):
        """(B, 1)."""

        def __init__(self, config, width, dropout):
            super().__init__(config, width, dropout)
            self.out = nn.Linear(width, 1)

        def scores(self, states, given):
            return {"logits": self.config.scale * self.out(self.dropout(states.pool("auto")))}

        def loss(self, scores, states, given):
            return (scores["logits"].squeeze(-1) - given["labels"]).abs().mean()

    try:
        register(RankingHead, Ranking)
        with pytest.raises(ConfigError, match="by a kind of its own; got 'tagging' for Tagger"):
            register(config_class(type("Tagger", (HeadConfig,), {"kind": "tagging"})), Ranking)
        model = tiny("bert")
        adapters = inarch.attach(model)
        adapters.add("a", "seq_bn")
        adapters.add_head("a", "ranking[scale=2.0]")
        adapters.train("a")
        labels = torch.tensor([0.5, 1.0])
        found = model(**tiny_inputs("bert"), labels=labels)
        expected = 2 * model.inarch.heads["a"].out(model(**tiny_inputs("bert"), head=()).last_hidden_state[:, 0])
        torch.testing.assert_close(found.logits, expected)
        torch.testing.assert_close(found.loss, (expected.squeeze(-1) - labels).abs().mean())
        adapters.save("a", tmp_path / "a")
        fresh = tiny("bert")
        inarch.attach(fresh).load(tmp_path / "a")
        inarch.attach(fresh).activate("a")
        assert torch.equal(logits(fresh), logits(model))
    finally:
        for known, kept in ((KINDS, before), (HEADS, modules)):
            known.clear()
            known.update(kept)


def test_the_home_of_a_user_is_meant_where_a_head_is_read_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    adapters = inarch.attach(tiny("bert"))
    adapters.add_head("mood", "classification[num_labels=3]")
    adapters.save_head("mood", "~/mood")
    assert (tmp_path / "mood" / "head.json").is_file()
    assert adapters.load_head("~/mood", name="again") == "again"
