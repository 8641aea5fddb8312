"""Merging into the base and out of it again, and one adapter made of several."""

import copy

import pytest
import torch
from little_adapters import moved
from torch import nn

import inarch
from inarch.combine import Recipe, _dare, _ties
from inarch.core.errors import SetupError
from inarch.testing import PlainTransformer, tiny, tiny_inputs

EVERYWHERE = "lora[r=3,alpha=5,attn_matrices=[q,k,v,o],intermediate_lora=True,output_lora=True,init_weights=bert]"
SCALES = "ia3[alpha=1.5,attn_matrices=[q,k,v],output_lora=True]"


def grafted(name, **configs):
    model = tiny(name) if isinstance(name, str) else name
    return model, moved(model, configs)


@torch.no_grad()
def output(model, name):
    found = model(**tiny_inputs(name))
    return found.image_embeds if name == "clip" else found.last_hidden_state


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items() if ".inarch." not in key}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, EVERYWHERE) for name in ("vit", "bert", "gpt2", "t5", "clip", "swin", "beit")),
        *((name, SCALES) for name in ("bert", "gpt2", "t5")),
        ("vit", "ia3|lora[init_weights=bert,intermediate_lora=True]"),
    ],
)
def test_a_merged_adapter_computes_the_same_and_leaves_no_trace(name, config):
    model, adapters = grafted(name, a=config, b=EVERYWHERE)
    before, base = weights(model), output(model, name)
    adapters.activate("a")
    expected = output(model, name)
    assert adapters.merge("a") < 1e-5
    assert adapters.merged == ("a",)
    assert adapters.setup is None
    assert torch.allclose(output(model, name), expected, atol=2e-5)
    assert not torch.allclose(expected, base, atol=1e-3)
    adapters.merge("b")
    assert adapters.merged == ("a", "b")
    adapters.unmerge()
    assert adapters.merged == ()
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    adapters.activate("a")
    assert torch.equal(output(model, name), expected)


def test_a_weight_that_its_module_applies_itself_is_merged():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 32)
    adapters = inarch.attach(model, example_inputs=x)
    adapters.add("a", EVERYWHERE)
    adapters.activate("a")
    expected, before = model(x), weights(model)
    with pytest.raises(inarch.SetupError, match="got none for TransformerEncoder. Pass `example_inputs`"):
        adapters.merge("a")
    adapters.merge("a", example_inputs=x)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert not torch.equal(model.layers[0].self_attn.in_proj_weight, before["layers.0.self_attn.in_proj_weight"])
    adapters.detach()
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_a_merged_model_can_be_kept_copied_and_saved(tmp_path):
    model, adapters = grafted("vit", a=EVERYWHERE)
    before = weights(model)
    adapters.activate("a")
    expected = output(model, "vit")
    adapters.merge("a")
    twin = copy.deepcopy(model)
    adapters.detach(keep_merged=True)
    model.save_pretrained(tmp_path)
    assert torch.allclose(output(type(model).from_pretrained(tmp_path).eval(), "vit"), expected, atol=1e-5)
    inarch.attach(twin).unmerge()
    assert all(torch.equal(value, before[key]) for key, value in weights(twin).items())
    assert torch.allclose(output(model, "vit"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("seq_bn", "got the method `bottleneck` in `a` for ViTModel"),
        ("lora|seq_bn", "got the method `bottleneck` in `a`"),
        ("lora[use_gating=True]", "got `use_gating=True`, which reads the input, in `a`"),
        ("ia3[use_gating=True]", "got `use_gating=True`, which reads the input, in `a`"),
    ],
)
def test_what_is_no_change_of_weights_is_not_merged(config, message):
    model, adapters = grafted("vit", a=config)
    before = weights(model)
    with pytest.raises(inarch.SetupError, match=f"a change of weights alone; {message}"):
        adapters.merge("a")
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_a_merge_that_computes_something_else_is_undone(monkeypatch):
    model, adapters = grafted("vit", a=EVERYWHERE, b=EVERYWHERE)
    adapters.merge("b")
    before = weights(model)
    adapters.activate("a")
    monkeypatch.setattr("inarch.methods.lora.LoRA.fold", lambda _, weight, bias, _base: (weight + 0.1, bias))
    with pytest.raises(inarch.SetupError, match=r"within 0.001 of the output; got a difference of .* for `a`"):
        adapters.merge("a")
    assert (adapters.merged, adapters.setup) == (("b",), "a")
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_what_would_count_twice_or_be_tied_to_the_wrong_base_is_refused(tmp_path):
    model, adapters = grafted("vit", a="lora", b="lora")
    adapters.save("b", tmp_path / "b")
    adapters.merge("a")
    for call in (
        lambda: adapters.activate("a"),
        lambda: adapters.train("b"),
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: adapters.remove("a"),
        lambda: adapters.add("a", "lora", overwrite=True),
        lambda: adapters.save("b", tmp_path / "c"),
        lambda: adapters.load(tmp_path / "b", name="c"),
        lambda: adapters.merge("a"),
    ):
        with pytest.raises(inarch.SetupError, match=r"got .*`a`.*(C|c)all `unmerge\(\)`"):
            call()
    assert not (tmp_path / "model").exists()


def test_half_precision_is_merged_within_its_rounding():
    model = tiny("bert").to(torch.bfloat16)
    _, adapters = grafted(model, a="lora[init_weights=bert]")
    before = weights(model)
    assert adapters.merge("a") < 0.1
    adapters.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_an_update_that_rounding_swallows_is_not_merged():
    """Most weights do not move by what the adapter adds to them; the output does, while it is active."""
    model = tiny("vit").to(torch.bfloat16)
    _, adapters = grafted(model, a=EVERYWHERE)
    with torch.no_grad():
        for key, parameter in adapters["a"].items():
            parameter.normal_(std=4e-4 if key.endswith("B") else 0.02)
    before = weights(model)
    with pytest.raises(inarch.SetupError, match="gives what it gave while it was active, within"):
        adapters.merge("a")
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert adapters.merge("a", tolerance=1.0) < 0.1  # within what rounding may change, but not within the adapter's own


# Averages


def updates(adapters, name, scale):
    """By projection, alpha / r times B A."""
    found = adapters[name]
    return {key[:-2]: (scale * found[key[:-1] + "B"] @ A).detach() for key, A in found.items() if key.endswith(".A")}


def close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    assert all(torch.allclose(value, expected[key], atol=atol) for key, value in found.items())


def test_a_linear_average_is_that_of_every_parameter_of_any_method():
    _, adapters = grafted("vit", a="adapter_plus|lora[dropout=0.1]|ia3", b="adapter_plus|lora|ia3")
    adapters.average("m", ["a", "b"], [1, 3])
    adapters.average("n", {"a": 2, "b": -1}, normalize_weights=False)
    for key, value in adapters["m"].items():
        a, b = adapters["a"][key], adapters["b"][key]
        assert torch.allclose(value, 0.25 * a + 0.75 * b)
        assert torch.allclose(adapters["n"][key], 2 * a - b, atol=1e-6)


def test_sums_of_updates_are_sums_of_products_whatever_rank_and_scale():
    """Products of sums are something else, and `average` says how far."""
    _, adapters = grafted("vit", a="lora[r=2,alpha=6,init_weights=bert]", b="lora[r=3,alpha=1,init_weights=bert]")
    a, b = updates(adapters, "a", 3), updates(adapters, "b", 1 / 3)
    meant = {key: 0.25 * a[key] + 0.75 * b[key] for key in a}
    assert adapters.average("cat", ["a", "b"], [1, 3], combine="cat") < 1e-6
    assert adapters.average("svd", ["a", "b"], [1, 3], combine="svd", rank=5) < 1e-5
    for name in ("cat", "svd"):
        close(updates(adapters, name, 1.0), meant)
    lost = adapters.average("small", ["a", "b"], [1, 3], combine="svd", rank=1)
    worst = max(
        float((s[1:].square().sum() / s.square().sum()).sqrt()) for s in map(torch.linalg.svdvals, meant.values())
    )
    assert lost == pytest.approx(worst, abs=1e-5)
    with pytest.raises(inarch.SetupError, match=r"which differ in `alpha`, `r`. Sum their updates, with `svd`"):
        adapters.average("linear", ["a", "b"])


def test_a_sum_of_factors_is_no_sum_of_updates():
    _, adapters = grafted("vit", a="lora[init_weights=bert]", b="lora[init_weights=bert]")
    assert adapters.average("m", ["a", "b"]) > 0.3
    assert adapters.average("n", {"a": 1, "b": -2}, normalize_weights=False, combine="negate_b") > 0.3
    for key, value in adapters["n"].items():
        sign = 1 if key.endswith("A") else -1
        assert torch.allclose(value, adapters["a"][key] + 2 * sign * adapters["b"][key], atol=1e-6)
    # Of one adapter, negation is exact, and not where A is negated too.
    assert adapters.average("o", {"a": -1}, normalize_weights=False, combine="negate_b") < 1e-6
    assert adapters.average("p", {"a": -1}, normalize_weights=False) == pytest.approx(2)


def by_hand(combine, density, weights=(0.5, 0.5)):
    return Recipe(names=("a", "b"), weights=weights, combine=combine, rank=None, density=density, seed=0)


def test_ties_trims_elects_and_means():
    """Yadav et al. 2023, algorithm 1, on numbers."""
    a = torch.tensor([4.0, -3.0, 2.0, 0.1, 1.0, -0.2])
    b = torch.tensor([2.0, 5.0, 0.3, 0.2, -4.0, 0.1])
    # The largest half: a keeps 4 -3 2, b keeps 2 5 -4. Signs: + + + . - .
    expected = torch.tensor([3.0, 5.0, 2.0, 0.0, -4.0, 0.0])
    assert torch.allclose(_ties(by_hand("ties", 0.5), [a, b], torch.Generator()), expected)


def test_dare_keeps_the_mean_of_an_update():
    """Yu et al. 2023, equations 1 and 2."""
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(200, 200)
    found = _dare(by_hand("dare", 0.25, (1.0, 0.0)), [ones, ones], generator)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert found.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("combine", ["ties", "dare"])
def test_ties_and_dare_give_lora_and_scales(combine):
    _, adapters = grafted("vit", a="lora[init_weights=bert]|ia3", b="lora[init_weights=bert,r=4]|ia3")
    whole = adapters.average("m", ["a", "b"], combine=combine, density=1.0, rank=32)
    assert whole < 1e-4
    assert adapters.config("m").parts[0].r == 32
    a, b = adapters["a"], adapters["b"]
    for key, value in adapters["m"].items():
        if key.endswith("scale"):
            mean = (a[key] + b[key]) / 2
            agree = (a[key] - 1) * (b[key] - 1) > 0
            assert torch.allclose(value[agree], mean[agree], atol=1e-6)
    twice = [adapters.average("n", ["a", "b"], combine=combine, density=0.3, overwrite=True) for _ in range(2)]
    assert twice[0] == twice[1] > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"of": ["a", "b"], "combine": "best"},
            "is one of `linear`, `negate_b`, `cat`, `svd`, `ties`, `dare`; got 'best'",
        ),
        (
            {"of": ["a", "b"], "weights": [1]},
            r"one number for each adapter, with a sum .* got \[1.0\] for 2",
        ),
        ({"of": {"a": 1, "b": -1}}, "with a sum above zero"),
        ({"of": {"a": -1}, "combine": "negate_b"}, r"sum above zero .* `normalize_weights=False`"),
        ({"of": {"a": 0.1, "b": 0.2, "c": -0.3}}, "with a sum above zero"),
        ({"of": {"a": float("nan")}}, r"got \[nan\]"),
        ({"of": {"a": 1}, "weights": [1]}, "Weights are given once"),
        ({"of": ["a", "b"], "rank": 3}, "`rank` cuts off a decomposition.* got 3 with `linear`"),
        ({"of": ["a", "b"], "combine": "ties"}, "`density` is the share.* got None with `ties`"),
        ({"of": {"a": 3, "b": -1}, "combine": "ties", "density": 0.5}, "weights of one sign"),
        ({"of": ["c", "d"], "combine": "svd"}, r"got `svd` for `c` \(seq_bn\), which knows `linear`"),
        ({"of": ["a", "c"]}, r"Adapters of the same methods are averaged; got `a` \(lora\) and `c` \(seq_bn\)"),
        ({"of": ["c", "e"]}, "which differ in `reduction_factor`. Average others"),
        ({"of": ["a", "x"]}, "must be added before it is used; got `x`"),
    ],
)
def test_what_cannot_be_averaged_is_refused_and_adds_nothing(arguments, message):
    _, adapters = grafted("vit", a="lora", b="lora", c="seq_bn", d="seq_bn", e="seq_bn[reduction_factor=4]")
    with pytest.raises(inarch.SetupError, match=message):
        adapters.average("m", **arguments)
    assert "m" not in adapters


def test_updates_of_ranks_and_scales_by_pattern_are_summed():
    patterns = "rank_pattern={'*.0.*.q':2},alpha_pattern={'*.v':3.0},init_weights=bert"
    _, adapters = grafted("vit", a=f"lora[r=4,alpha=4,{patterns}]", b="lora[r=3,alpha=6,init_weights=bert]")
    assert adapters.average("cat", ["a", "b"], combine="cat") < 1e-6
    assert adapters.average("svd", ["a", "b"], combine="svd", rank=16) < 1e-5
    scales = {"0.self_attention.lora.q": 4 / 2, "1.self_attention.lora.q": 1.0, "0.self_attention.lora.v": 3 / 4}
    for place, scale in scales.items():
        own = {name: [adapters[name][f"image0.{place}.{side}"] for side in "BA"] for name in ("a", "b", "cat", "svd")}
        meant = 0.5 * scale * own["a"][0] @ own["a"][1] + 0.5 * 2 * own["b"][0] @ own["b"][1]
        for name in ("cat", "svd"):  # the rank of a sum is its alpha
            assert torch.allclose(own[name][0] @ own[name][1], meant, atol=1e-5)


def test_a_learned_bias_is_merged_where_the_projection_has_one():
    model, adapters = grafted("vit", a="lora[bias=True,init_weights=bert]")
    assert adapters.merge("a") < 1e-5
    adapters.unmerge()
    adapters.add("gated", "lora[use_gating=True]")
    with pytest.raises(inarch.SetupError, match="knows `linear`, `negate_b`"):
        adapters.average("b", ["gated"], combine="svd")
    model, adapters = grafted("llama", a="lora[bias=True,init_weights=bert]")
    before = weights(model)
    with pytest.raises(inarch.SetupError, match="got a projection without one at `layers.0.self_attn.q_proj.weight`"):
        adapters.merge("a")
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


@pytest.mark.parametrize("config", ["lora", "dora"])
def test_a_weight_that_the_model_computes_is_adapted_and_not_merged(config):
    """In a type that a run on unit vectors in single precision would not take."""
    model = PlainTransformer().double()
    for block in model.blocks:
        torch.nn.utils.parametrizations.weight_norm(block.mlp[0])
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    before = model(x)
    adapters = inarch.attach(model, example_inputs=x)
    adapters.add("a", f"{config}[selfattn_lora=false,intermediate_lora=true]")
    with adapters.using("a"):
        assert torch.allclose(model(x), before, rtol=0, atol=1e-12)
    with pytest.raises(
        SetupError, match=r"merged into parameters; got `blocks.0.mlp.0.weight`, which PlainTransformer"
    ):
        adapters.merge("a", example_inputs=x)
    assert torch.equal(model(x), before)


@pytest.fixture
def new_parameters_on_conversion():
    """Lets `.to()` put new parameters in the place of the old ones, as sharding and loading with `assign=True` do."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.usefixtures("new_parameters_on_conversion")
def test_an_adapter_is_taken_out_of_the_weights_that_the_model_has_by_now():
    model, adapters = grafted("vit", a="lora")
    before = weights(model)
    adapters.merge("a")
    model.double()
    adapters.unmerge()
    assert all(torch.equal(value.float(), before[key]) for key, value in weights(model).items())
    adapters.merge("a")
    layer = adapters.sites["image0.0.self_attention"]
    path = layer.absolute(layer.projections["q"][0].path)
    model.get_submodule(path).weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(SetupError, match=rf"of the shape that they had; got others at `{path}.weight`"):
        adapters.unmerge()
    assert adapters.merged == ("a",)
