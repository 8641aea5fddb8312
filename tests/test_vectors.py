"""The port for plain parameters: biases and the vectors of norms, by closed formulas in float64."""

import copy
import pickle
import threading

import pytest
import torch
from little_adapters import awake
from torch import nn

import inarch
from inarch import Average, BatchSplit, Stack
from inarch.core.errors import ConfigError, SetupError
from inarch.testing import tiny, tiny_inputs


def attached(name, config):
    """A model in float64 with an adapter `a` off its initial weights, that is not active; and its inputs."""
    model = tiny(name).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny_inputs(name).items()}
    adapters = inarch.attach(model)
    adapters.add("a", config)
    awake(adapters, "a")
    return model, inputs, adapters


def out(model, inputs):
    return model(**inputs)[0]


def named(model, wanted):
    """A copy of the base with every parameter that `wanted` picks by its name, to be changed by hand."""
    twin = copy.deepcopy(model)
    inarch.attach(twin).detach()
    return twin, [name for name, _ in twin.named_parameters() if wanted(name)]


def is_norm(name):
    return "norm" in name.lower() or "ln_" in name


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("vit", ("pooler", "patch_embeddings")),
        ("bert", ("pooler",)),
        ("gpt2", ()),
        ("bart", ()),
        ("distilbert", ()),
        ("clip-vision", ()),
        ("beit", ("pooler.dense", "patch_embeddings")),
    ],
)
def test_bitfit_reaches_every_bias_but_those_it_says(name, left_out):
    """b + d, section 3: the same as adding to the biases by hand, whose names are found by no site."""
    model, inputs, adapters = attached(name, "bitfit")
    twin, biases = named(model, lambda key: key.endswith("bias") and not any(part in key for part in left_out))
    assert sum(p.numel() for p in adapters["a"].values()) == sum(twin.get_parameter(key).numel() for key in biases)
    for parameter in adapters["a"].values():
        nn.init.constant_(parameter, 0.25)
    with torch.no_grad():
        for key in biases:
            twin.get_parameter(key).add_(0.25)
    adapters.activate("a")
    assert torch.equal(out(model, inputs), out(twin, inputs))


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "t5", "gptj", "gemma2", "swinv2", "clip"])
def test_layernorm_tuning_reaches_every_norm(name):
    """w + d and b + d: the same as in the norms by hand, RMS norms and norms outside the layers among them."""
    model, inputs, adapters = attached(name, "layernorm_tuning")
    twin, vectors = named(model, is_norm)
    assert sum(p.numel() for p in adapters["a"].values()) == sum(twin.get_parameter(key).numel() for key in vectors)
    for parameter in adapters["a"].values():
        nn.init.constant_(parameter, 0.25)
    with torch.no_grad():
        for key in vectors:
            twin.get_parameter(key).add_(0.25)
    adapters.activate("a")
    assert torch.equal(out(model, inputs), out(twin, inputs))


def test_norms_on_queries_and_keys_are_inner_norms():
    from transformers import Qwen3Config, Qwen3Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = Qwen3Model(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=99)).eval()
    adapters = inarch.attach(model)
    adapters.add("a", "layernorm_tuning[roles=[inner_norm]]")
    assert set(adapters["a"]) == {
        f"text0.{layer}.self_attention.layernorm_tuning.inner_norm{number}.weight"
        for layer in (0, 1)
        for number in ("", 1)
    }
    adapters.train("a")
    model(torch.arange(3, 10)[None])[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapters["a"].values())


class Attention(nn.Module):
    """A block on torch's attention, which reads `in_proj_bias` and the bias of `out_proj` itself."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        y = self.norm(x)
        return x + self.drop(self.attn(y, y, y, need_weights=False)[0])


def test_biases_that_a_module_applies_itself():
    model = nn.Sequential(Attention(), Attention()).double().eval()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    adapters = inarch.attach(model, example_inputs=(x,))
    adapters.add("a", "bitfit[roles=[q,v,o]]")
    awake(adapters, "a")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (0, 1):
            q, v, o = (adapters["a"][f"data0.{layer}.self_attention.bitfit.{role}.bias"] for role in "qvo")
            twin[layer].attn.in_proj_bias[:16] += q
            twin[layer].attn.in_proj_bias[32:] += v
            twin[layer].attn.out_proj.bias += o
    adapters.activate("a")
    assert torch.allclose(model(x), twin(x), atol=1e-14, rtol=0)
    adapters.deactivate()
    expected = model(x)
    assert not torch.allclose(expected, twin(x))


@pytest.mark.parametrize("name", ["vit", "gpt2"])
@pytest.mark.parametrize("config", ["bitfit", "layernorm_tuning", "bitfit|lora[r=2]", "layernorm_tuning|ia3"])
def test_merging_is_exact_and_comes_out_bit_for_bit(name, config):
    model, inputs, adapters = attached(name, config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapters.activate("a")
    expected = out(model, inputs)
    adapters.merge("a")
    found = out(model, inputs)
    assert torch.equal(found, expected) if "|" not in config else torch.allclose(found, expected, atol=1e-12, rtol=0)
    adapters.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_bottleneck_that_applies_the_layers_norm_applies_the_tuned_one():
    """Post-norm: z = LN(x + h) inside the adapter is the norm with its new vectors, as merging them shows."""
    model, inputs, adapters = attached("bert", "layernorm_tuning[outer_norms=False]")
    adapters.add("b", "seq_bn[reduction_factor=4]")
    awake(adapters, "b")
    adapters.activate(Stack("a", "b"))
    both = out(model, inputs)
    adapters.activate("b")
    alone = out(model, inputs)
    adapters.merge("a")
    adapters.activate("b")
    assert torch.equal(out(model, inputs), both)
    assert not torch.allclose(alone, both)


def test_blocks():
    """Stack adds, Average averages: merged one after the other, and the mean of the parameters."""
    model, inputs, adapters = attached("vit", "bitfit|layernorm_tuning[bias=False]")
    adapters.add("b", "bitfit|layernorm_tuning[bias=False]")
    awake(adapters, "b", seed=5)
    adapters.average("mean", ["a", "b"], [3, 1])
    adapters.activate("mean")
    expected = out(model, inputs)
    adapters.activate(Average("a", "b", weights=[3, 1]))
    assert torch.allclose(out(model, inputs), expected, atol=1e-12, rtol=0)
    adapters.activate(Stack("a", "b"))
    stacked = out(model, inputs)
    adapters.average("sum", ["a", "b"], [1, 1], normalize_weights=False)
    adapters.activate("sum")
    assert torch.allclose(out(model, inputs), stacked, atol=1e-12, rtol=0)
    with pytest.raises(SetupError, match=r"A weight is one for all rows of a batch; got `bitfit` of `a` at"):
        adapters.activate(BatchSplit("a", "b", batch_sizes=[1, 1]))


def test_copies_pickles_and_threads_have_their_own():
    model, inputs, adapters = attached("vit", "bitfit|layernorm_tuning")
    adapters.activate("a")
    expected = out(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = inarch.attach(twin)
        with torch.no_grad():
            for parameter in other["a"].values():
                parameter.zero_()
        assert not torch.allclose(out(twin, inputs), expected)
    assert torch.equal(out(model, inputs), expected)
    found = []
    threads = [threading.Thread(target=lambda: found.append(out(model, inputs))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected) for one in found)
    first = adapters.sites.sites[0]
    assert "weight" not in model.get_submodule(first.absolute(first.pre_norm)).__dict__


class Norm(nn.Module):
    """Of the root mean square, with a weight that is applied as `scale` says."""

    def __init__(self, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32))
        self.scale = scale

    def forward(self, x):
        return self.scale(self.weight, x, lambda y: y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    ("scale", "offset"),
    [
        (lambda weight, x, norm: weight * norm(x), 0),
        (lambda weight, x, norm: (1 + weight) * norm(x), 1),
        (lambda weight, x, norm: norm((1 + weight) * x), 1),  # of one weight for all features it would not depend
        (lambda weight, x, norm: torch.exp(weight) * norm(x), 0),
    ],
    ids=["weight", "one more", "one more, before it normalises", "nothing is added"],
)
def test_what_a_norm_adds_to_its_weight(scale, offset):
    model = tiny("llama")
    for layer in model.layers:
        layer.input_layernorm = Norm(scale)
    adapters = inarch.attach(model)
    assert [site.affine["pre_norm"].offset for site in adapters.sites if site.kind == "self_attention"] == [offset] * 2


def test_a_module_that_looks_like_a_norm_and_returns_something_else_is_none():
    class Odd(Norm):
        def forward(self, x):
            return x, self.weight

    model = tiny("llama")
    model.odd = Odd(None)
    adapters = inarch.attach(model)
    assert all(vectors.path != "/odd" for site in adapters.sites for vectors in site.affine.values())


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "llama",
            "bitfit",
            r"Every role .* must exist; got none for the bias of norms and projections",
        ),
        ("vit", "bitfit[roles=[gate]]", r"got `gate` for the bias .*which has `pre_norm`, `q`.*Ask for those it has"),
        (
            "vit",
            "layernorm_tuning[roles=[q]]",
            r"got `q` for the weight and bias of norms of ViTModel, which has",
        ),
        (
            "t5",
            "layernorm_tuning[weight=False]",
            r"got none for the bias of norms .* has none. Use another",
        ),
        ("vit", "layernorm_tuning[weight=False,bias=False]", r"At least one of `weight` and `bias` must be true"),
        (
            "vit",
            "layernorm_tuning[outer_norms=False,roles=[outer_norm]]",
            r"`roles` names is trained; got `outer_norm`",
        ),
        ("vit", "bitfit[leave_out=[0,1]]", r"must reach something; got `leave_out=\[0, 1\]`"),
        ("vit", "bitfit[leave_out_roles=[mlp_2]]", r"`leave_out_roles` names sites"),
    ],
)
def test_what_is_refused(name, config, message):
    with pytest.raises(ConfigError, match=message):
        inarch.attach(tiny(name)).add("a", config)


def test_what_it_prints():
    adapters = inarch.attach(tiny("vit"))
    adapters.add("a", "layernorm_tuning|bitfit[roles=[q]]")
    adapters.activate("a")
    text = str(adapters.check())
    assert "w + d, b + d" in text
    assert "b + d" in text


def test_a_functional_call_differentiates_by_the_base_below_an_adapter_of_biases():
    """`torch.func.grad`, inside of which no tensor may be told whether it requires gradients; against `autograd`."""
    model, inputs, adapters = attached("vit", "bitfit")
    adapters.activate("a")
    key, weight = next((k, v) for k, v in model.named_parameters() if k.endswith("layernorm_before.weight"))
    weight.requires_grad_(True)

    def loss(value):
        return torch.func.functional_call(model, {key: value}, kwargs=inputs)[0].square().sum()

    (expected,) = torch.autograd.grad(out(model, inputs).square().sum(), weight)
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), expected)
