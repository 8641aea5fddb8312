"""Flexible heads are judged as the model's own is, and stand in the way of nothing that runs made-up inputs."""

import pytest
import torch

import inarch
from inarch.check import Data
from inarch.testing import tiny, tiny_inputs


def with_head(kind="classification", name="bert", **settings):
    model = tiny(name)
    adapters = inarch.attach(model)
    adapters.add("a", "lora")
    adapters.add_head("a", kind, **settings)
    return model, adapters


def found(adapters, code, **known):
    return [finding for finding in adapters.check(measure=False, **known).findings if finding.code == code]


@pytest.mark.parametrize(
    ("kind", "name"), [("classification", "bert"), ("masked_lm", "bert"), ("seq2seq_lm[layers=2]", "bart")]
)
def test_a_random_head_that_is_frozen_is_an_error(kind, name):
    model, adapters = with_head(kind, name)
    adapters.train("a")
    assert not found(adapters, "head-frozen")
    adapters.train("a", head=False)
    model.inarch.heads["a"].requires_grad_(False)
    (finding,) = found(adapters, "head-frozen")
    assert finding.level == "error" and finding.place == "`inarch.heads.a`"
    model.inarch.heads["a"].dense[0].bias.data[0] = 1.0  # it has been trained
    assert not found(adapters, "head-frozen")


def test_each_of_several_heads_is_judged():
    model, adapters = with_head()
    adapters.add("b", "lora")
    adapters.add_head("b", "tagging")
    adapters.train(inarch.Parallel("a", "b"))
    assert not found(adapters, "head-frozen")
    assert not found(adapters, "base-trainable")
    model.inarch.heads["b"].requires_grad_(False)
    (finding,) = found(adapters, "head-frozen")
    assert finding.place == "`inarch.heads.b`"
    assert not found(adapters, "labels-disagree", data=Data(labels=tuple("xyz")))


def test_labels_are_compared_with_those_of_the_head_and_not_of_the_model():
    model, adapters = with_head(num_labels=3, labels=["x", "y", "z"])
    assert len(model.config.id2label) == 2
    (finding,) = found(adapters, "labels-disagree", data=Data(labels=tuple("ab")))
    assert "the data have 2 labels, the model's head has 3" in str(finding)
    assert '`adapters.add_head("a", ..., num_labels=2, overwrite=True)`' in str(finding)
    (finding,) = found(adapters, "labels-disagree", data=Data(labels=("x", "z", "y")))
    assert "label 1 is 'z' in the data and 'y' in the model" in str(finding)
    assert 'adapters.name_labels("a", labels)' in str(finding)
    assert not found(adapters, "labels-disagree", data=Data(labels=("x", "y", "z")))
    (finding,) = found(adapters, "label-ids", data=Data(label_ids=(1, 3)))
    assert "the ids go from 1 to 3, the head knows 0 to 2" in str(finding)
    assert not found(adapters, "label-ids", data=Data(label_ids=(0, 2)))
    adapters.name_labels("a", ["x", "z", "y"])
    assert not found(adapters, "labels-disagree", data=Data(labels=("x", "z", "y")))
    adapters.add_head("a", "masked_lm", overwrite=True)
    assert not found(adapters, "labels-disagree", data=Data(labels=("x", "z", "y")))


def test_another_head_that_is_trained_is_no_part_of_the_base():
    _, adapters = with_head()
    adapters.add_head("b", "tagging")
    adapters.train("a")
    adapters.model.inarch.heads["b"].requires_grad_(True)
    assert not found(adapters, "base-trainable")


@pytest.mark.parametrize("kind", ["classification", "dependency_parsing", "multiple_choice[num_choices=3]", "tagging"])
@pytest.mark.parametrize("is_active", [True, False])
def test_heads_are_no_obstacle_to_what_runs_the_model(kind, is_active):
    """Measuring, merging and trying an adapter run made-up inputs, which some heads cannot read."""
    model, adapters = with_head(kind)
    for parameter in adapters["a"].values():
        parameter.data.normal_(std=0.1)
    adapters.activate("a")
    if not is_active:
        adapters.deactivate()
    head = adapters.active_head
    report = adapters.check()
    assert report.evidence.drift > 1e-4 and report.evidence.reached == 1
    assert report.memory.optimizer > 0
    adapters.add("p", "prompt_tuning[prompt_length=2]")
    states = model(**tiny_inputs("bert"), head=()).last_hidden_state
    assert adapters.active_head == head
    assert adapters.merge("a") < 1e-4
    assert adapters.active_head == head and adapters.setup is None
    again = model(**tiny_inputs("bert"), head=()).last_hidden_state
    if is_active:
        torch.testing.assert_close(again, states, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(again, states, atol=1e-3)
