"""Copies, types, modes and threads: a model with adapters is a model like any other."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from little_adapters import active

import inarch
from inarch.attach import slot_of
from inarch.testing import tiny, tiny_inputs

CONFIG = "double_seq_bn[original_ln_before=True]|lora[init_weights=bert]"


def adapted(name):
    """A tiny model with an awake, active adapter."""
    model = tiny(name)
    adapters = active(model, CONFIG)
    return model, adapters


@torch.no_grad()
def output(model, name, **changes):
    return model(**(tiny_inputs(name) | changes)).last_hidden_state


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize(("way", "name"), list(zip(WAYS, ["vit", "bert", "llama"], strict=True)))
def test_a_copy_computes_the_same_and_lives_its_own_life(name, way):
    model, adapters = adapted(name)
    expected = output(model, name)
    other = WAYS[way](model)
    assert torch.equal(output(other, name), expected)
    own = {id(p) for p in model.parameters()}
    assert not any(id(p) in own for p in other.parameters())
    handle = inarch.attach(other)
    assert handle is not adapters and handle.setup == "a" and handle.model is other
    with torch.no_grad():
        for parameter in handle["a"].values():
            parameter.zero_()
    handle.activate("a")
    assert not torch.allclose(output(other, name), expected, atol=1e-3)
    assert torch.equal(output(model, name), expected)
    handle.detach()
    assert torch.equal(output(other, name), output(tiny(name), name))
    assert torch.equal(output(model, name), expected)


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_is_cast_with_its_adapters(name, dtype):
    """Casting and then computing is what a model computes whose weights were cast one by one before attaching."""
    model, adapters = adapted(name)
    weights = {key: p.detach().to(dtype) for key, p in adapters["a"].items()}
    model.to(dtype)
    other = tiny(name).to(dtype)
    handle = inarch.attach(other)
    handle.add("a", CONFIG)
    with torch.no_grad():
        for key, parameter in handle["a"].items():
            assert parameter.dtype == dtype
            parameter.copy_(weights[key])
    handle.activate("a")
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_inputs(name).items()}
    found = output(model, name, **inputs)
    assert found.dtype == dtype
    assert torch.equal(found, output(other, name, **inputs))


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_autocast_is_near_and_inference_mode_equal(name):
    model, adapters = adapted(name)
    expected = output(model, name)
    with torch.inference_mode():
        assert torch.equal(output(model, name), expected)
    with adapters.using(None):
        base = output(model, name)
        with torch.autocast("cpu", torch.bfloat16):
            rounding = (output(model, name).float() - base).abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        found = output(model, name).float()
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 6 * rounding < (expected - base).abs().max()


def test_what_was_made_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        output(*_ready("vit"))
    model, adapters = adapted("vit")
    with torch.inference_mode():
        output(model, "vit")
    adapters.train("a")
    model(**tiny_inputs("vit")).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in adapters["a"].values())


def _ready(name):
    return adapted(name)[0], name


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_forwards_in_many_threads_do_not_meet(name):
    """Each thread has inputs of its own shape, so that a stream of another's would be seen."""
    model, adapters = adapted(name)
    inputs = [tiny_inputs(name, batch=1 + seed % 3, seed=seed) for seed in range(24)]
    expected = [output(model, name, **one) for one in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: output(model, name, **one), inputs))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert all(slot_of(model, site)._held.stream is None for site in adapters.sites)


@pytest.mark.parametrize("name", ["swin", "vit", "bert", "t5"])
def test_attaching_leaves_nothing_behind_in_what_modules_note(name):
    """Swin notes smaller windows when it sees a smaller image, such as the one that a model is watched on."""
    model = tiny(name).train()
    next(module for module in model.modules() if not any(module.children())).eval()

    def notes():
        return {
            (path, key): value
            for path, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | tuple)
        }

    before = notes()
    inarch.attach(model).detach()
    assert notes() == before
