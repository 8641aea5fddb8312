"""Compacter and PHM layers against sums of `torch.kron`, and what of them is shared."""

import pytest
import torch
from little_adapters import awake, output

import inarch
from inarch.attach import modules_at, slot_of
from inarch.testing import tiny

FORMS = {
    "compacter": "",
    "full": "factorized_phm_W=False",
    "rank": "phm_rank=2,phm_dim=2",
    "own rule": "shared_phm_rule=False",
    "factorized rule": "factorized_phm_rule=True",
    "frozen rule": "learn_phm=False,phm_c_init=uniform",
    "shared": "shared_W_phm=True,phm_bias=False",
}


def dense(tensors, side, place, shared):
    """The weight (out, in) of a projection by the formula, from the tensors of an adapter file."""

    def get(name):
        own = tensors.get(f"{place}.bottleneck.{side}.{name}")
        return own if own is not None else shared.get((side, name), shared.get(("down", name)))

    def pair(whole, left, right):
        return get(whole) if get(whole) is not None else get(left) @ get(right)

    rule, weight = pair("rule", "rule_left", "rule_right"), pair("W", "W_left", "W_right")
    return sum(torch.kron(rule[i], weight[i]) for i in range(len(rule))).T


@pytest.mark.parametrize("form", FORMS)
def test_a_projection_is_a_sum_of_kronecker_products(form, tmp_path):
    """Mahabadi et al. 2021, equations 4 and 5."""
    model = tiny("bert").double()
    adapters = inarch.attach(model)
    settings = ",".join(part for part in ("reduction_factor=4", FORMS[form]) if part)
    adapters.add("a", f"compacter[{settings}]")
    awake(adapters, "a")
    tensors = {key: value.detach() for key, value in adapters.tensors("a").items()}
    first = "text0.0.self_attention"
    shared = {tuple(key.split(".")[-2:]): value for key, value in tensors.items() if key.startswith(first)}
    z = torch.randn(2, 3, 32).double()
    for place in (first, "text0.1.mlp"):
        module = modules_at(slot_of(model, adapters.sites[place]), "a").find("bottleneck")
        down, up = (dense(tensors, side, place, shared) for side in ("down", "up"))
        biases = [tensors.get(f"{place}.bottleneck.{side}.bias", torch.tensor(0.0)) for side in ("down", "up")]
        expected = torch.nn.functional.gelu(z @ down.T + biases[0]) @ up.T + biases[1]
        assert torch.allclose(module.branch(z), expected, atol=1e-12)
    rules = {key for key in tensors if ".rule" in key}
    halves = 2 if form == "factorized rule" else 1
    assert len(rules) == (8 if form == "own rule" else halves)
    assert {key for key in adapters["a"] if ".rule" in key} == (set() if form == "frozen rule" else rules)
    assert sum(".W" in key for key in tensors) == {"full": 8, "shared": 4}.get(form, 16)
    adapters.activate("a")
    expected = output(model, "bert")
    adapters.save("a", tmp_path / "a")
    adapters.load(tmp_path / "a", name="b")
    adapters.activate("b")
    assert torch.equal(output(model, "bert"), expected)


def test_compacters_start_as_their_fields_say():
    model = tiny("vit").double()
    base = output(model, "vit")
    adapters = inarch.attach(model)
    adapters.add("a", "compacter++[reduction_factor=0.0625,phm_c_init=uniform,hypercomplex_nonlinearity=normal]")
    tensors = adapters.tensors("a")
    assert tensors["image0.0.mlp.bottleneck.down.W_left"].std().item() == pytest.approx(0.01, rel=0.3)
    assert 0.8 < tensors["image0.0.mlp.bottleneck.down.rule"].abs().max() <= 1
    adapters.add("b", "compacter[reduction_factor=4,init_weights=mam_adapter]")
    adapters.activate("b")
    assert torch.equal(output(model, "vit"), base)
    # As `adapters` counts on bert-base: 2 · 12 · (4·(192 + 6 + 6 + 192) + 24 + 768) + 64
    adapters = inarch.attach(tiny("bert"))
    config = inarch.methods.read_config("compacter[reduction_factor=4,phm_dim=2]")
    adapters.add("a", config)
    assert adapters.plan("a").num_parameters == 4 * (2 * (16 + 4 + 4 + 16) + 8 + 32) + 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "phm_dim=3",
            "divides the width .* and of the bottleneck; got 3 for 32 and 1 .*Choose a `phm_dim` that divides 32",
        ),
        ("reduction_factor=16", "got 4 for 32 and 2 at.*Set `reduction_factor=8`, or choose another `phm_dim`"),
        ("init_weights=houlsby", "initial weights of their own.*got `init_weights='houlsby'` with `phm_layer=True`"),
    ],
)
def test_what_no_product_can_be_is_refused(settings, message):
    with pytest.raises(inarch.ConfigError, match=message):
        inarch.attach(tiny("vit")).add("a", f"compacter[{settings}]")


def test_a_shared_rule_that_is_spread_out_is_refused_by_name():
    model = tiny("vit")
    adapters = inarch.attach(model)
    adapters.add("a", "compacter[reduction_factor=4]")
    module = modules_at(slot_of(model, adapters.sites["image0.1.mlp"]), "a").find("bottleneck")
    next(p for key, p in adapters["a"].items() if key.endswith("rule")).full_tensor = None  # as a DTensor has
    with pytest.raises(
        inarch.SiteError, match="whole in each of them; got `rule` of `PHMLinear`, spread over processes"
    ):
        module.branch(torch.randn(1, 2, 32))
