"""Fields of the bottleneck that wiring and presets do not show: scales, stochastic depth, Adapter+."""

import copy

import pytest
import torch
from little_adapters import active
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization
from transformers import ViTConfig, ViTModel

import inarch
from inarch.attach import modules_at, slot_of
from inarch.methods import read_config
from inarch.plan import plan
from inarch.testing import tiny, tiny_inputs


def attached(config):
    """A ViT in float64 with an active adapter `a` off its initial weights; and its inputs."""
    model = tiny("vit").double()
    adapters = active(model, config)
    return model, {"pixel_values": tiny_inputs("vit")["pixel_values"].double()}, adapters


def test_adapter_plus_stands_behind_whole_blocks():
    """Steitz and Roth 2024: y = z + s * (W_up GELU(W_down z + b_down) + b_up) of the output z of each block."""
    model, inputs, adapters = attached("adapter_plus[reduction_factor=4]")
    found = model(**inputs)[0]
    weights = dict(adapters["a"])
    assert {key.split(".bottleneck")[0] for key in weights} == {"image0.0.mlp", "image0.1.mlp"}
    plain = copy.deepcopy(model)
    inarch.attach(plain).detach()

    def behind(number):
        w = {key.rpartition("bottleneck.")[2]: v for key, v in weights.items() if key.startswith(f"image0.{number}.")}

        def run(module, args, output):
            u = output @ w["down.weight"].T + w["down.bias"]
            u = u * (1 + torch.erf(u / 2**0.5)) / 2
            return output + w["scale"] * (u @ w["up.weight"].T + w["up.bias"])

        return run

    for number, layer in enumerate(plain.layers):
        layer.register_forward_hook(behind(number))
    assert torch.allclose(found, plain(**inputs)[0], atol=1e-12, rtol=0)


def test_adapter_plus_has_the_size_of_its_authors():
    """12 · (2 · 768 · 8 + 8 + 768 + 768) numbers on ViT-B, with 8 units and a scale for each channel."""
    with torch.device("meta"):
        model = ViTModel(ViTConfig(), add_pooling_layer=False)
    assert plan(inarch.probe(model), {"a": read_config("adapter_plus")}).num_parameters == 165_984


@pytest.mark.parametrize("preset", ["seq_bn", "par_bn"])
def test_a_whole_number_is_a_scale(preset):
    model, inputs, adapters = attached(f"{preset}[reduction_factor=4,scaling=4]")
    found = model(**inputs)[0]
    with torch.no_grad():
        for key, parameter in adapters["a"].items():
            if ".up." in key:
                parameter.mul_(4)
    adapters.add("b", f"{preset}[reduction_factor=4,scaling=1.0]")
    with torch.no_grad():
        for mine, other in zip(adapters["a"].values(), adapters["b"].values(), strict=True):
            other.copy_(mine)
    adapters.activate("b")
    assert torch.allclose(model(**inputs)[0], found, atol=1e-12, rtol=0)


@pytest.mark.parametrize("preset", ["seq_bn", "par_bn"])
def test_stochastic_depth_drops_whole_samples_whatever_the_adapter_reads(preset):
    """A share of 0.25 of the samples has no adapter; the others have 1 / 0.75 of it, so the mean is kept."""
    _, _, adapters = attached(f"{preset}[reduction_factor=4,stochastic_depth=0.25]")
    site = adapters.sites["image0.0.mlp"]
    module = modules_at(slot_of(adapters.model, site), "a").find("bottleneck")
    z = torch.randn(4000, 2, 32, dtype=torch.float64)
    full, dropped = module.eval().branch(z), module.train().branch(z)
    alive = dropped.flatten(1).abs().sum(1) > 0
    assert alive.double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.allclose(dropped[alive], full[alive] / 0.75, atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_maps_of_a_bottleneck_are_called_where_something_sees_the_call():
    """A plain map is not called as a module; a hook, a parametrisation, a new `forward` or compiled form counts."""
    model, inputs, adapters = attached("seq_bn")
    found = model(**inputs)[0]
    down = modules_at(slot_of(model, adapters.sites["image0.0.mlp"]), "a").find("bottleneck").down
    seen = []
    watches = {
        "pre-hook": lambda: down.register_forward_pre_hook(lambda *_: seen.append("pre-hook")),
        "hook": lambda: down.register_forward_hook(lambda *_: seen.append("hook")),
        "global hook": lambda: register_module_forward_hook(
            lambda module, *_: seen.append("global hook") if module is down else None
        ),
    }
    for name, watch in watches.items():
        handle = watch()
        assert torch.equal(model(**inputs)[0], found)
        handle.remove()
        assert seen.pop() == name
        assert seen == []
    model(**inputs)
    assert seen == []

    def forward(value):
        seen.append("forward")
        return nn.Linear.forward(down, value)

    down.forward = forward
    assert torch.equal(model(**inputs)[0], found)
    assert seen == ["forward"]
    del down.forward
    register_parametrization(down, "weight", _Negative())
    down.parametrizations.weight.original.neg_()
    assert torch.equal(model(**inputs)[0], found)


class _Negative(nn.Module):
    def forward(self, weight):
        return -weight
