"""SSF against its equation, written as hooks and into weights by hand."""

import pytest
import torch
from little_adapters import awake
from torch import nn

import inarch
from inarch import BatchSplit
from inarch.core.errors import ConfigError, SetupError
from inarch.testing import tiny, tiny_inputs


def attached(name, config, *names):
    """A model in float64 with adapters off their initial weights; and its inputs."""
    model = tiny(name).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny_inputs(name).items()}
    adapters = inarch.attach(model)
    for seed, key in enumerate(names or ("a",)):
        adapters.add(key, config)
        awake(adapters, key, seed=seed)
    return model, inputs, adapters


def _scaled(module, args, output):
    return output * 1.5 - 0.25


def fill(adapters, scale, shift):
    for key, parameter in adapters["a"].items():
        nn.init.constant_(parameter, scale if key.endswith("scale") else shift)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama", "clip-vision"])
def test_every_linear_map_and_norm_inside_and_around_the_layers(name):
    """y = g * x + b behind every module that is one by its class, found by no site; equation 6."""
    model, inputs, adapters = attached(name, "ssf")
    fill(adapters, 1.5, -0.25)
    adapters.activate("a")
    found = model(**inputs)[0]
    adapters.detach()
    kinds = ("Linear", "Conv1D", "LayerNorm", "LlamaRMSNorm")
    for path, module in model.named_modules():
        if type(module).__name__ in kinds and "pooler" not in path:
            module.register_forward_hook(_scaled)
    assert torch.allclose(found, model(**inputs)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "beit"])
def test_merging_gives_the_same_and_comes_out_bit_for_bit(name):
    model, inputs, adapters = attached(name, "ssf[roles=[q,v,o,up,down]]" if name == "beit" else "ssf")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapters.activate("a")
    expected = model(**inputs)[0]
    adapters.merge("a")
    assert torch.allclose(model(**inputs)[0], expected, atol=1e-12, rtol=0)
    adapters.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_shift_needs_a_bias_to_be_merged_into():
    _, _, adapters = attached("llama", "ssf")
    with pytest.raises(SetupError, match="An adapter's bias is merged into that of its projection; got"):
        adapters.merge("a")


@pytest.mark.parametrize(("name", "tolerance"), [("llama", 1e-9), ("gemma2", 1e-5)])
def test_scales_alone_go_into_norms_without_a_bias_and_norms_that_add_one_to_their_weight(name, tolerance):
    """Gemma's norms compute in single precision, whatever the model is in."""
    model, inputs, adapters = attached(name, "ssf[shift=False]")
    adapters.activate("a")
    expected = model(**inputs)[0]
    adapters.merge("a", tolerance=tolerance)
    assert torch.allclose(model(**inputs)[0], expected, atol=tolerance, rtol=0)


def test_it_composes_with_the_port_for_vectors_and_a_bottleneck_on_the_norm():
    """g * (norm with its new vectors) + b, also where a bottleneck runs the norm by itself."""
    model, inputs, adapters = attached("bert", "layernorm_tuning|ssf[roles=[post_norm]]|seq_bn[reduction_factor=4]")
    adapters.activate("a")
    expected = model(**inputs)[0]
    with torch.no_grad():
        values = dict(adapters["a"])
        for site in adapters.sites:
            norm = model.get_submodule(site.absolute(site.post_norm))
            tuned, ssf = f"{site.key}.layernorm_tuning.post_norm", f"{site.key}.ssf.post_norm"
            scale, shift = values[f"{ssf}.scale"], values[f"{ssf}.shift"]
            norm.weight.copy_((norm.weight + values[f"{tuned}.weight"]) * scale)
            norm.bias.copy_((norm.bias + values[f"{tuned}.bias"]) * scale + shift)
            for key in (f"{tuned}.weight", f"{tuned}.bias", f"{ssf}.shift"):
                values[key].zero_()
            values[f"{ssf}.scale"].fill_(1)
    assert torch.allclose(model(**inputs)[0], expected, atol=1e-12, rtol=0)


def test_rows_of_a_batch_have_their_own():
    model, inputs, adapters = attached("vit", "ssf", "a", "b")
    expected = []
    for row, key in enumerate("ab"):
        adapters.activate(key)
        expected.append(model(pixel_values=inputs["pixel_values"][row : row + 1])[0])
    adapters.activate(BatchSplit("a", "b", batch_sizes=[1, 1]))
    assert torch.allclose(model(**inputs)[0], torch.cat(expected), atol=1e-12, rtol=0)


def test_initial_weights():
    adapters = inarch.attach(tiny("vit"))
    adapters.add("a", "ssf[init_weights=normal,init_weights_seed=0]")
    scale = torch.cat([value for key, value in adapters["a"].items() if key.endswith("scale")])
    shift = torch.cat([value for key, value in adapters["a"].items() if key.endswith("shift")])
    assert scale.mean().item() == pytest.approx(1, abs=0.003)
    assert shift.mean().item() == pytest.approx(0, abs=0.003)
    assert [scale.std().item(), shift.std().item()] == pytest.approx([0.02, 0.02], rel=0.1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("ssf[roles=[gate]]", r"got `gate` for the projections and norms of ViTModel, which has `q`"),
        ("ssf[leave_out=[0,1]]", r"must reach something; got `leave_out=\[0, 1\]`"),
    ],
)
def test_what_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        inarch.attach(tiny("vit")).add("a", config)
