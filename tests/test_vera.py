"""VeRA against its equation in float64; its matrices are one pair for all layers, in copies and on disk."""

import copy
import pickle

import pytest
import torch
from little_adapters import EVERY, awake, by_hand, check_merged_and_stored, grafted, output

import inarch
from inarch.testing import tiny


def matrices(adapters, name="a"):
    return {key: value for key, value in adapters.tensors(name).items() if key.rpartition(".")[2] in "AB"}


@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_vera_is_two_vectors_between_two_matrices(name, tmp_path):
    model = tiny(name).double()
    base = output(model, name)
    adapters = inarch.attach(model)
    adapters.add("a", f"vera[r=5,{EVERY}]")
    adapters.activate("a")
    assert torch.equal(output(model, name), base)
    awake(adapters, "a")
    found = output(model, name)
    shared = {(key[-1], *value.shape): value for key, value in matrices(adapters).items()}
    assert len(shared) == len(matrices(adapters))  # one for each width

    def change(weight, t, _role):
        A, B = shared["A", 5, weight.shape[1]], shared["B", weight.shape[0], 5]
        return weight + t["b"].diag() @ B @ t["d"].diag() @ A

    fake = type("Fake", (), {"sites": adapters.sites, "tensors": lambda _, n: adapters[n]})()
    assert torch.allclose(output(by_hand(model, fake, "vera", change), name), found, atol=1e-10)
    check_merged_and_stored(model, adapters, name, tmp_path)


def test_only_vectors_are_trained_and_counted():
    model, adapters = grafted("vit", a="vera[r=5]")
    adapters.train("a")
    assert {key.rpartition(".")[2] for key in adapters["a"]} == {"d", "b"}
    assert adapters.plan("a").num_parameters == sum(p.numel() for p in adapters["a"].values()) == 4 * (5 + 32)
    assert list(matrices(adapters)) == [f"image0.0.self_attention.vera.q.{leaf}" for leaf in "AB"]
    assert not any(value.requires_grad for value in matrices(adapters).values())
    output(model, "vit")


def test_copies_pickles_and_casts_share_matrices_of_their_own():
    model, adapters = grafted("vit", a="vera[r=5]")
    adapters.activate("a")
    expected = output(model, "vit")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, "vit"), expected)
        own = matrices(inarch.attach(twin))
        assert all(value.data_ptr() != matrices(adapters)[key].data_ptr() for key, value in own.items())
        own["image0.0.self_attention.vera.q.A"].zero_()
        inarch.attach(twin).deactivate()
        base = output(twin, "vit")
        inarch.attach(twin).activate("a")
        assert torch.equal(output(twin, "vit"), base)  # in every layer
    assert torch.equal(output(model, "vit"), expected)
    model.float().double()
    assert torch.allclose(output(model, "vit"), expected, atol=1e-5)


def test_averages_need_the_same_matrices():
    _, adapters = grafted("vit", a="vera[r=5,init_weights_seed=1]", b="vera[r=5,init_weights_seed=1]", c="vera[r=5]")
    adapters.average("m", ["a", "b"])
    assert all(torch.equal(value, matrices(adapters)[key]) for key, value in matrices(adapters, "m").items())
    with pytest.raises(inarch.SetupError, match=r"keep the same values frozen; got `a` and `c`, which differ in"):
        adapters.average("n", ["a", "c"])
    assert adapters.average("o", {"a": -1}, normalize_weights=False, combine="negate_b") < 1e-6


def test_what_one_tower_shares_is_its_own(tmp_path):
    """An adapter of two towers can be loaded into one of them."""
    adapters = inarch.attach(tiny("clip"))
    adapters.add("a", "vera[r=5]")
    awake(adapters, "a")
    assert {key.split(".")[0] for key in matrices(adapters)} == {"text0", "image0"}
