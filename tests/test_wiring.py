"""The wiring on symbols: the whole table of placements, against formulas written out by hand."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inarch.check import prove, wiring_repairs
from inarch.core.site import Site, Tap
from inarch.core.symbols import Expr, symbol
from inarch.core.wiring import Carry, settle
from inarch.methods import methods, read_config

X, H = symbol("x"), symbol("h")


def site(post: bool, **changes):
    """A site of width 8, post-norm or pre-norm."""
    values = {
        "stack": "text0",
        "layer": 0,
        "role": "mlp",
        "kind": "mlp",
        "layer_path": "layers.0",
        "layer_class": "Layer",
        "width": 8,
        "arrangement": "post" if post else "pre",
        "output": Tap(path="mlp", side="out"),
        "post_norm": "norm" if post else None,
    }
    return Site(**(values | changes))


def a(argument: Expr) -> Expr:
    return argument.applied("A")


def ln(argument: Expr) -> Expr:
    return argument.applied("LN")


Z = ln(X + H)

# (post-norm, original_ln_before, residual_before_ln, original_ln_after) -> y, and what becomes of the base model
TABLE = {
    (False, False, True, True): (X + H + a(H), "preserved"),
    (False, False, False, True): (X + H + a(H), "preserved"),
    (False, False, "post_add", True): (X + H + a(H), "preserved"),
    (False, True, True, True): (X + H + a(X + H), "preserved"),
    (False, True, False, True): (X * 2 + H + a(X + H), "skip connection doubled"),
    (False, True, "post_add", True): (X * 2 + H + a(X + H), "skip connection doubled"),
    (False, False, True, False): (H + a(H), "skip connection lost"),
    (False, False, False, False): (H + a(H), "skip connection lost"),
    (False, False, "post_add", False): (H + a(H), "skip connection lost"),
    (False, True, True, False): (H + a(X + H), "skip connection lost"),
    (False, True, False, False): (X + H + a(X + H), "preserved"),
    (False, True, "post_add", False): (X + H + a(X + H), "preserved"),
    (True, False, True, True): (ln(X + H + a(H)), "preserved"),
    (True, False, False, True): (ln(X + H + a(H)), "preserved"),
    (True, False, "post_add", True): (ln(X + H + a(H)), "preserved"),
    (True, True, True, True): (ln(X + H + a(Z)), "preserved"),
    (True, True, False, True): (ln(X + Z + a(Z)), "norm applied twice"),
    (True, True, "post_add", True): (ln(X * 2 + H + a(Z)), "skip connection doubled"),
    (True, False, True, False): (H + a(H), "skip connection lost"),
    (True, False, False, False): (H + a(H), "skip connection lost"),
    (True, False, "post_add", False): (H + a(H), "skip connection lost"),
    (True, True, True, False): (H + a(Z), "skip connection lost"),
    (True, True, False, False): (Z + a(Z), "preserved"),
    (True, True, "post_add", False): (X + H + a(Z), "norm lost"),
}


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_the_formula_and_the_verdict_are_those_of_the_table(case):
    post, before, residual, after = case
    config = (
        read_config("bottleneck")
        .parts[0]
        .replace(original_ln_before=before, residual_before_ln=residual, original_ln_after=after)
    )
    proof = prove(site(post), "n", {"n": read_config(config)})
    formula, verdict = TABLE[case]
    assert proof.formula.adapted == formula
    assert proof.formula.pretrained == (ln(X + H) if post else X + H)
    assert proof.verdict == verdict
    assert proof.sound == (verdict == "preserved")


G = symbol("g")


def s(argument: Expr) -> Expr:
    return argument.applied("s")


def with_others(formula: Expr) -> Expr:
    return formula + G


# A layer that scales its branch adds x itself: what the table has besides is scaled with the branch.
SCALED = {
    (False, True, True): (X + s(H + a(H)), "preserved"),
    (False, False, True): (X + s(H + a(H)), "preserved"),
    (True, True, True): (X + s(H + a(X + H)), "preserved"),
    (True, False, True): (X + s(X + H + a(X + H)), "skip connection doubled"),
    (False, True, False): (X + s(H - X + a(H)), "skip connection lost"),
    (False, False, False): (X + s(H - X + a(H)), "skip connection lost"),
    (True, True, False): (X + s(H - X + a(X + H)), "skip connection lost"),
    (True, False, False): (X + s(H + a(X + H)), "preserved"),
}
ARRANGEMENTS = {
    "sandwich": ({"arrangement": "sandwich", "pre_norm": "a", "branch_norm": "b"}, None),
    "norm on the branch": ({"arrangement": "branch", "branch_norm": "b"}, None),
    "no norm": ({"arrangement": "none"}, None),
    "parallel attention and MLP": ({"shared_sum": True}, with_others),
    "layer scale": ({"exact": False}, SCALED),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("case", SCALED, ids=str)
def test_the_table_holds_for_every_arrangement(arrangement, case):
    """Where nothing normalises the sum, all rows are those of a pre-norm layer: with the other branches of the sum, or
    scaled as the layer scales its branch."""
    before, residual, after = case
    changes, kind = ARRANGEMENTS[arrangement]
    flags = {"original_ln_before": before, "residual_before_ln": residual, "original_ln_after": after}
    proof = prove(site(False, **changes), "n", {"n": read_config(read_config("bottleneck").parts[0].replace(**flags))})
    formula, verdict = SCALED[case] if kind is SCALED else TABLE[False, before, residual, after]
    assert proof.formula.adapted == (with_others(formula) if kind is with_others else formula)
    assert proof.verdict == verdict


@pytest.mark.parametrize(
    ("changes", "flags", "verdict"),
    [
        ({"exact": False}, (True, False, False), "scale lost"),
        ({"exact": False}, (True, "post_add", False), "norm lost"),
        ({"exact": False}, (True, "post_add", True), "skip connection doubled"),
        ({"exact": False}, (True, False, True), "norm applied twice"),
        ({"shared_sum": True}, (True, False, False), "branch lost"),
        ({"shared_sum": True}, (True, "post_add", True), "skip connection doubled"),
    ],
)
def test_what_a_post_norm_layer_loses_is_named(changes, flags, verdict):
    """LN(x + h) is not LN(x + s(h)), nor LN(x + h + g)."""
    names = ("original_ln_before", "residual_before_ln", "original_ln_after")
    config = read_config("bottleneck").parts[0].replace(**dict(zip(names, flags, strict=True)))
    assert prove(site(True, **changes), "n", {"n": read_config(config)}).verdict == verdict


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_parallel_adapter_reads_the_stream_and_needs_the_sum(post, after):
    config = read_config("par_bn").parts[0].replace(original_ln_after=after, original_ln_before=True)
    proof = prove(site(post), "n", {"n": read_config(config)})
    inside = X + H + a(X)
    assert proof.formula.adapted == ((ln(inside) if post else inside) if after else H + a(X))
    assert proof.verdict == ("preserved" if after else "skip connection lost")


def test_the_adapters_own_norm_on_its_residual_is_a_norm_too_many():
    config = "seq_bn[ln_after=True,adapter_residual_before_ln=True]"
    assert prove(site(False), "n", {"n": read_config(config)}).verdict == "norm applied twice"
    config = "seq_bn[ln_after=True]"
    assert prove(site(False), "n", {"n": read_config(config)}).sound


def test_other_branches_of_a_shared_sum_stay_in_the_formula():
    proof = prove(site(False, shared_sum=True), "n", {"n": read_config("seq_bn")})
    assert str(proof.formula.adapted) == "x + h + g + A(x + h)" or "g" in str(proof.formula.adapted)
    assert proof.sound


def test_a_stack_is_proved_as_a_whole():
    from inarch import Stack

    sound, plus = read_config("seq_bn"), read_config("adapter_plus")
    assert prove(site(False), Stack("a", "b"), {"a": sound, "b": sound}).sound
    doubled = prove(site(False), Stack("a", "b"), {"a": plus, "b": plus})
    assert doubled.verdict == "skip connection doubled"
    assert "A2" in str(doubled.formula.adapted)


def test_the_founding_case_is_repaired_by_exactly_two_single_changes():
    broken = read_config("seq_bn[original_ln_after=False]").parts[0]
    two = ["residual_before_ln=False", "original_ln_after=True"]
    on_pre, on_post = wiring_repairs([site(False)], broken), wiring_repairs([site(True)], broken)
    assert [str(repair) for repair in on_pre] == two
    assert {repair.formula for repair in on_pre} == {"x + h + A(x + h)"}  # the same function
    assert [str(repair) for repair in on_post] == two
    assert [repair.formula for repair in on_post] == ["LN(x + h) + A(LN(x + h))", "LN(x + h + A(LN(x + h)))"]
    without = wiring_repairs([site(False)], broken.replace(original_ln_before=False))
    assert [str(repair) for repair in without] == ["original_ln_after=True"]


def test_a_repair_holds_at_every_site_it_is_for():
    broken = read_config("seq_bn[residual_before_ln=False]").parts[0]
    for repair in wiring_repairs([site(False), site(True)], broken):
        mended = broken.replace(**dict(repair.changes))
        assert all(prove(site(post), "n", {"n": read_config(mended)}).sound for post in (False, True))
    assert wiring_repairs([site(False)], read_config("seq_bn").parts[0]) == []


def test_every_unsound_combination_has_a_proved_repair():
    for post, before, after, residual, parallel, own in itertools.product((False, True), repeat=6):
        config = (
            read_config("bottleneck")
            .parts[0]
            .replace(
                original_ln_before=before,
                original_ln_after=after,
                residual_before_ln=residual,
                is_parallel=parallel,
                ln_after=own,
                adapter_residual_before_ln=own,
            )
        )
        proof = prove(site(post), "n", {"n": read_config(config)})
        if not proof.sound:
            repairs = wiring_repairs([site(post)], config)
            assert repairs
            for repair in repairs:
                mended = config.replace(**dict(repair.changes))
                assert prove(site(post), "n", {"n": read_config(mended)}).sound


class _Halve:
    """A branch and a norm on numbers, to run the wiring a third way."""

    def branch(self, z):
        return z * 3

    def norm_branch(self, w):
        return w * 5


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_tensors_follow_the_symbols(case):
    """On tensors, with a layer that adds and normalises by itself, the result is the formula's value."""
    post, before, residual, after = case
    method = methods()["bottleneck"]
    config = method.config_class(original_ln_before=before, residual_before_ln=residual, original_ln_after=after)
    x, h = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    norm = (lambda t: torch.nn.functional.layer_norm(t, (8,))) if post else None
    settled = settle(
        method.wire(config, x, Carry(h), norm, _Halve()), x, h, add=method.keeps_sum(config), post_norm=post
    )
    layer = x + settled.branch
    y = settled.output if settled.output is not None else norm(layer) if post else layer
    assert torch.allclose(y, evaluate(TABLE[case][0], x, h), atol=1e-12)


def evaluate(expression, x, h):
    """An independent evaluation of a formula on tensors."""
    total = torch.zeros_like(x)
    for term, count in expression.terms:
        if term in ("x", "h"):
            value = x if term == "x" else h
        else:
            inner = evaluate(term.argument, x, h)
            value = inner * 3 if term.function == "A" else torch.nn.functional.layer_norm(inner, (8,))
        total = total + count * value
    return total


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(-3, 3)), max_size=6))
def test_sums_do_not_depend_on_the_order(parts):
    total, backwards = Expr(), Expr()
    for name, count in parts:
        total += symbol(name) * count
    for name, count in reversed(parts):
        backwards += symbol(name) * count
    assert total == backwards and hash(total) == hash(backwards)
    assert total - backwards == Expr()
    for name in "xyz":
        assert total[name] == sum(count for part, count in parts if part == name)


def test_expressions_print_like_formulas():
    assert str(X + H + a(X + H)) == "x + h + A(x + h)"
    assert str(X * 2 - H) == "2x - h"
    assert str(Expr()) == "0"
    assert str(H * -1) == "-h"


def test_a_function_of_nothing_vanishes():
    assert a(H).applied("N").vanish("A") == Expr()
    assert (X + a(H)).applied("N").vanish("A") == X.applied("N")
