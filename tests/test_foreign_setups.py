"""Setups of the library `adapters`: `adapter_setup.json`, and adapter folders beside it."""

import json

import pytest
import torch

import inarch
from inarch import BatchSplit, Stack
from inarch.testing import tiny, tiny_inputs


def single(name):
    return {"type": "single", "children": [name]}


STACK = {"type": "Stack", "children": [single("a"), single("b")]}
CUT = {"type": "BatchSplit", "children": [single("a"), single("b")], "kwargs": {"batch_sizes": [1, 1]}}


def folder_of_adapters(place, setup):
    """As `save_adapter_setup` of version 1.3.0 writes it; returns what a stack of its adapters computes."""
    torch.manual_seed(0)
    model = tiny("bert")
    adapters = inarch.attach(model)
    for name in "ab":
        adapters.add(name, "seq_bn")
        adapters.save(name, place / name, format="adapterhub")
    record = {"adapter_setup": setup, "head_setup": None, "version": "adapters.1.3.0"}
    (place / "adapter_setup.json").write_text(json.dumps(record))
    adapters.activate(Stack("a", "b"))
    with torch.no_grad():
        return model(**tiny_inputs("bert")).last_hidden_state


def test_a_stored_setup_is_read_with_its_adapters(tmp_path):
    expected = folder_of_adapters(tmp_path, STACK)
    model = tiny("bert")
    adapters = inarch.attach(model)
    setup = adapters.load_setup(tmp_path)
    assert setup == Stack("a", "b")
    adapters.activate(setup)
    with torch.no_grad():
        assert torch.allclose(model(**tiny_inputs("bert")).last_hidden_state, expected, atol=1e-6)


def test_blocks_keep_their_settings(tmp_path):
    folder_of_adapters(tmp_path, CUT)
    assert inarch.attach(tiny("bert")).load_setup(tmp_path) == BatchSplit("a", "b", batch_sizes=[1, 1])


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"type": "Fuse", "children": [single("a"), single("b")]}, "read without fusion layers; got a `Fuse`"),
        (None, "must hold blocks with `type` and `children`; got None"),
        ({"type": "Later", "children": [single("a")]}, "A stored setup is a name or"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, setup, message):
    folder_of_adapters(tmp_path, setup)
    adapters = inarch.attach(tiny("bert"))
    with pytest.raises(inarch.InarchError, match=message):
        adapters.load_setup(tmp_path)
    assert adapters.names == ()


def test_heads_in_folders_of_their_own_come_with_their_setup(tmp_path):
    folder_of_adapters(tmp_path, STACK)
    model = tiny("bert")
    adapters = inarch.attach(model)
    adapters.add("mood", "seq_bn")
    adapters.add_head("mood", "classification[num_labels=3]")
    adapters.train("mood")
    adapters.save("mood", tmp_path / "mood", format="adapterhub")
    expected = {key: value.tolist() for key, value in model.get_submodule("inarch.heads.mood").state_dict().items()}
    record = {"adapter_setup": STACK, "head_setup": {"type": "Parallel", "children": ["mood"]}}
    (tmp_path / "adapter_setup.json").write_text(json.dumps(record))
    other = tiny("bert")
    fresh = inarch.attach(other)
    fresh.load_setup(tmp_path)
    assert fresh.names == ("a", "b") and tuple(fresh.flexible_heads) == ("mood",)
    found = {key: value.tolist() for key, value in other.get_submodule("inarch.heads.mood").state_dict().items()}
    assert found == expected
    (tmp_path / "adapter_setup.json").write_text(json.dumps(record | {"head_setup": True}))
    bare = inarch.attach(tiny("bert"))
    with pytest.raises(inarch.StateError, match="The heads of a stored setup have names; got `head_setup` true"):
        bare.load_setup(tmp_path)
    assert bare.names == ()
    assert bare.load_setup(tmp_path, head=False) == Stack("a", "b")


def test_a_head_that_does_not_fit_leaves_the_model_without_the_setup(tmp_path):
    folder_of_adapters(tmp_path, STACK)
    adapters = inarch.attach(tiny("bert"))
    adapters.add_head("mood", "classification[num_labels=3]")
    adapters.save_head("mood", tmp_path / "mood")
    record = {"adapter_setup": STACK, "head_setup": ["mood"]}
    (tmp_path / "adapter_setup.json").write_text(json.dumps(record))
    description = json.loads((tmp_path / "mood" / "head.json").read_text())
    description["head"]["num_labels"] = 4
    (tmp_path / "mood" / "head.json").write_text(json.dumps(description))
    fresh = inarch.attach(tiny("bert"))
    with pytest.raises(inarch.StateError, match="the model wants"):
        fresh.load_setup(tmp_path)
    assert fresh.names == () and fresh.flexible_heads == {}
