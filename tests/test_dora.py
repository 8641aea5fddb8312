"""DoRA against equation 5 of its paper in float64, on plain, fused, transposed, quantised and offloaded weights."""

import importlib.util

import pytest
import torch
from accelerate import dispatch_model
from little_adapters import EVERY, awake, by_hand, check_merged_and_stored, grafted, output, rows_of
from torch import nn

import inarch
from inarch.testing import tiny, tiny_inputs


def change(weight, t, _role, scale=5 / 3):
    direction = weight + scale * t["B"] @ t["A"]
    return t["magnitude"][:, None] * direction / direction.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_dora_is_equation_5_and_leaves_the_bias_alone(name, tmp_path):
    config = f"dora[r=3,alpha=5,{EVERY}]"
    model = tiny(name).double()
    base = output(model, name)
    adapters = inarch.attach(model)
    adapters.add("a", config)
    adapters.activate("a")
    assert torch.equal(output(model, name), base)
    for key in [key for key in adapters["a"] if key.endswith("magnitude")]:
        site = adapters.sites[key.split(".dora.")[0]]
        view, rows = rows_of(model, site, site.projections[key.split(".")[-2]][0])
        assert torch.allclose(adapters["a"][key], view[rows].norm(dim=1))
    awake(adapters, "a")
    found = output(model, name)
    assert torch.allclose(output(by_hand(model, adapters, "dora", change), name), found, atol=1e-10)
    check_merged_and_stored(model, adapters, name, tmp_path)


def test_no_gradient_goes_through_the_norm():
    """Section 4.3: of m V / ||V||, the norm is a constant; against finite differences with it held."""
    model, adapters = grafted("vit", a="dora[r=2]")
    adapters.train("a")
    key = "image0.0.self_attention.dora.q"
    module = next(m for name, m in model.named_modules() if name.endswith("self_attention.adapters.a.dora.q"))
    site = adapters.sites["image0.0.self_attention"]
    view, _ = rows_of(model, site, site.projections["q"][0])
    x, y, bias = torch.randn(4, 32).double(), torch.randn(4, 32).double(), torch.randn(32).double()
    base = inarch.methods.Frozen(view.detach(), bias)
    (module(x, y, base) ** 2).sum().backward()
    A, B, m = (adapters["a"][f"{key}.{leaf}"] for leaf in ("A", "B", "magnitude"))
    norm = (view + 4 * B @ A).norm(dim=1).detach()
    a, b, scale = (t.detach().clone().requires_grad_() for t in (A, B, m))
    result = (y - bias) * scale / norm + bias + 4 * (x @ a.T @ b.T) * scale / norm
    (result**2).sum().backward()
    for found, expected in ((A, a), (B, b), (m, scale)):
        assert torch.allclose(found.grad, expected.grad, atol=1e-8)


def test_a_stack_reads_the_frozen_weight_at_every_port():
    """The norm of the second adapter is that of the base, whether a hook or the module applies the weight."""
    x = torch.randn(2, 5, 16).double()
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1).double().eval()
    adapters = inarch.attach(model, example_inputs=x)
    for name in "ab":
        adapters.add(name, "dora[r=2,output_lora=True]")
        awake(adapters, name)
    adapters.activate(inarch.Stack("a", "b"))
    found = model(x)
    adapters.deactivate()
    with torch.no_grad():
        for role, weight, rows in (
            ("self_attention.dora.q", model.layers[0].self_attn.in_proj_weight, slice(0, 16)),
            ("self_attention.dora.v", model.layers[0].self_attn.in_proj_weight, slice(32, 48)),
            ("mlp.dora.down", model.layers[0].linear2.weight, slice(None)),
        ):
            base = weight[rows].clone()
            for name in "ab":
                A, B, m = (adapters[name][f"data0.0.{role}.{leaf}"] for leaf in ("A", "B", "magnitude"))
                factor = m / (base + 4 * B @ A).norm(dim=1)
                weight[rows] = factor[:, None] * (weight[rows] + 4 * B @ A)
    assert torch.allclose(model(x), found, atol=1e-10)


def test_a_learned_bias_is_beside_the_magnitudes():
    model, adapters = grafted("vit", a="dora[r=2,bias=True]")
    adapters.activate("a")
    found = output(model, "vit")
    assert adapters.merge("a") < 1e-9
    assert torch.allclose(output(model, "vit"), found, atol=1e-10)


@pytest.mark.parametrize("combine", ["svd", "cat", "negate_b"])
def test_what_is_no_sum_of_updates_is_refused(combine):
    """PEFT sums the updates and forgets the magnitudes."""
    _, adapters = grafted("vit", a="dora", b="dora")
    adapters.average("m", ["a", "b"])
    with pytest.raises(inarch.SetupError, match=f"got `{combine}` for `a`.*which knows `linear`"):
        adapters.average("n", ["a", "b"], combine=combine)


def test_half_precision_starts_at_the_base():
    model = tiny("vit").to(torch.bfloat16)
    inputs = {key: value.to(torch.bfloat16) for key, value in tiny_inputs("vit").items()}
    base = model(**inputs).last_hidden_state
    adapters = inarch.attach(model)
    adapters.add("a", "dora")
    adapters.activate("a")
    assert torch.equal(model(**inputs).last_hidden_state, base)


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_an_offloaded_base_is_read_where_it_is_kept(tmp_path):
    model, inputs = tiny("vit"), tiny_inputs("vit")
    places = {"embeddings": "cpu", "layers.0": "cpu", "layers.1": "disk", "layernorm": "cpu", "pooler": "cpu"}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    plain, adapters = inarch.attach(tiny("vit")), inarch.attach(model)
    assert model.layers[1].attention.q_proj.weight.is_meta
    for handle in (adapters, plain):
        handle.add("a", "dora[init_weights_seed=1]")
        awake(handle, "a")
        handle.activate("a")
    assert all(torch.equal(value, plain["a"][key]) for key, value in adapters["a"].items())
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], plain.model(**inputs)[0])


class Codes(nn.Module):
    """A linear map of eight-bit codes, of no library: what `frozen` knows of it is what it computes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("config", ["dora[r=2]", "lora[r=2,init_weights=pissa]"])
def test_a_quantised_base_is_read_by_what_it_computes(config):
    model, inputs = tiny("vit"), tiny_inputs("vit")
    for layer in model.layers:
        layer.attention.q_proj = Codes(layer.attention.q_proj)
    with torch.no_grad():
        base = model(**inputs)[0]
        adapters = inarch.attach(model, example_inputs=inputs)
        adapters.add("a", config)
        adapters.activate("a")
        assert torch.allclose(model(**inputs)[0], base, atol=1e-6)
    codes = model.layers[0].attention.q_proj
    weight = codes.weight * codes.scale
    own = adapters["a"]
    if "dora" in config:
        magnitude = own["image0.0.self_attention.dora.q.magnitude"]
        assert torch.allclose(magnitude, weight.norm(dim=1), atol=1e-5)
    else:
        A = own["image0.0.self_attention.lora.q.A"]
        assert torch.allclose((A @ A.T).diagonal(), torch.linalg.svdvals(weight)[:2] / 4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torch.distributed.tensor") is None, reason="needs DTensor")
def test_a_weight_that_is_spread_out_is_refused_by_name():
    from inarch.attach import base_of

    model = tiny("vit")
    adapters = inarch.attach(model)
    site = adapters.sites["image0.0.self_attention"]
    weight = model.get_submodule(site.absolute(site.projections["q"][0].path)).weight
    weight.full_tensor = lambda: weight  # as a DTensor has
    with pytest.raises(inarch.SiteError, match="reads it inside its layer's forward; got a weight that is spread"):
        base_of(model, site, site.projections["q"][0]).read()
