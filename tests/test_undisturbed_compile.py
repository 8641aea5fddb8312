"""A compiled model with adapters: one graph, traced once, and every change of adapters takes effect."""

import os
import sys

import pytest
import torch
from little_adapters import awake
from torch._dynamo.utils import counters

import inarch
from inarch import Stack
from inarch.testing import tiny, tiny_inputs

READS_STREAM = "double_seq_bn[original_ln_before=True]|lora[init_weights=bert]"
FULL = pytest.mark.skipif(
    "INARCH_FULL_COMPILE_TEST" not in os.environ, reason="compiles for minutes: set INARCH_FULL_COMPILE_TEST=1"
)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def small(name):
    """A tiny model of one layer with two adapters, awake, neither active."""
    model = tiny(name)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    del layers[1:]
    if hasattr(model.config, "layer_types"):
        model.config.layer_types = model.config.layer_types[:1]
    adapters = inarch.attach(model)
    for key, config in {"a": READS_STREAM, "b": "par_bn"}.items():
        adapters.add(key, config)
        awake(adapters, key)
    return model, adapters


def output(model, name, **changes):
    return model(**(tiny_inputs(name) | changes)).last_hidden_state


def check_gradients(model, compiled, adapters, name, atol):
    """Forward and backward against the same model without the compiler."""
    found = []
    for one in (model, compiled):
        model.zero_grad(set_to_none=True)
        adapted = output(one, name)
        (adapted * torch.linspace(-1, 1, adapted.shape[-1])).sum().backward()
        found.append([adapted, *(p.grad for p in adapters["a"].values())])
    assert all(torch.allclose(one, two, rtol=0, atol=atol) for one, two in zip(*found, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in found[0][1:])


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_one_graph_forward_and_backward_and_no_second_one_for_the_same_adapter(name):
    model, adapters = small(name)
    adapters.train("a")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check_gradients(model, compiled, adapters, name, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        check_gradients(model, compiled, adapters, name, 1e-5)
    adapters.deactivate()
    with torch.no_grad():
        assert torch.equal(output(compiled, name), output(model, name))


def changes(adapters):
    """Every way to change what runs, one after the other."""
    yield "nothing active"
    adapters.activate("a")
    yield "activated"
    adapters.activate("b")
    yield "switched"
    adapters.add("b", "lora[init_weights=bert]", overwrite=True)
    awake(adapters, "b")
    yield "overwritten"
    adapters.deactivate()
    yield "deactivated"
    with adapters.using(Stack("b", "a")):
        yield "in a block"
    adapters.detach()
    yield "detached"


def follow(model, compiled, adapters, name):
    """Whether compiled and plain agree after every change, by change; and that each changed something."""
    agree, before = {}, None
    with torch.no_grad():
        for change in changes(adapters):
            expected = output(model, name)
            assert before is None or not torch.allclose(expected, before, atol=1e-3), change
            agree[change] = torch.allclose(output(compiled, name), expected, rtol=0, atol=1e-5)
            before = expected
    return agree


@pytest.mark.parametrize("name", ["vit", pytest.param("bert", marks=FULL), pytest.param("llama", marks=FULL)])
def test_every_change_after_compilation_takes_effect(name):
    model, adapters = small(name)
    agree = follow(model, torch.compile(model, backend="eager", fullgraph=True), adapters, name)
    assert all(agree.values()), agree


def test_without_our_reset_the_compiler_ignores_hooks(monkeypatch):
    """What the test above would see if the compiler's cache were not dropped."""
    monkeypatch.setattr(sys.modules["inarch.attach"], "forget_compiled", lambda: None)
    model, adapters = small("vit")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        base = output(compiled, "vit")
        adapters.activate("a")
        assert torch.equal(output(compiled, "vit"), base)
        assert not torch.allclose(output(model, "vit"), base, atol=1e-3)


def test_a_model_or_a_layer_compiled_in_place_follows_too():
    model, adapters = small("vit")
    expected = {}
    with torch.no_grad():
        for part in (None, model, model.layers[0]):
            if part is not None:
                part.compile(backend="eager", fullgraph=True)
            for setup in ("a", None, "b"):
                with adapters.using(setup):
                    found = output(model, "vit")
                assert torch.allclose(found, expected.setdefault(setup, found), rtol=0, atol=1e-5)
            if part is not None:
                part._compiled_call_impl = None
    assert not torch.allclose(expected["a"], expected[None], atol=1e-3)


def test_one_graph_serves_every_batch_size():
    model, adapters = small("vit")
    adapters.activate("a")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        inputs = tiny_inputs("vit", batch=batch)
        assert torch.allclose(output(compiled, "vit", **inputs), output(model, "vit", **inputs), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["vit", pytest.param("bert", marks=FULL), pytest.param("llama", marks=FULL)])
def test_inductor_computes_the_same(name):
    model, adapters = small(name)
    adapters.train("a")
    compiled = torch.compile(model, fullgraph=True)
    check_gradients(model, compiled, adapters, name, 1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        check_gradients(model, compiled, adapters, name, 1e-4)
    adapters.deactivate()
    with torch.no_grad():
        assert torch.allclose(output(compiled, name), output(model, name), rtol=0, atol=1e-5)
