"""Setups: trees of blocks as data, and how they run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inarch.compose import (
    Average,
    BatchSplit,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
    cases,
    check_nesting,
    from_data,
    last,
    leaves,
    names,
    run,
    to_data,
    uncut,
)
from inarch.compose.blocks import BLOCKS
from inarch.core.errors import SetupError

NAMES = st.sampled_from(["a", "b", "c", "d"])


def blocks(allowed=tuple(BLOCKS), depth=2):
    """Valid trees."""

    @st.composite
    def draw_block(draw):
        name = draw(st.sampled_from(allowed))
        inner = BLOCKS[name].allowed
        child = NAMES if depth == 0 or not inner else NAMES | blocks(inner, depth - 1)
        children = draw(st.lists(child, min_size=1, max_size=3))
        size = st.lists(st.integers(1, 5), min_size=len(children), max_size=len(children))
        settings = {"Split": "splits", "BatchSplit": "batch_sizes", "Average": "weights"}
        keywords = {settings[name]: draw(size)} if name in settings else {}
        return BLOCKS[name](*children, **keywords)

    return draw_block()


@given(NAMES | blocks())
def test_a_setup_survives_a_round_trip_through_json_data(setup):
    import json

    assert from_data(json.loads(json.dumps(to_data(setup)))) == setup


@given(blocks())
def test_a_setup_prints_as_the_python_that_makes_it(setup):
    assert eval(str(setup), dict(BLOCKS)) == setup


@given(blocks())
def test_the_leaves_of_a_setup_are_those_in_its_data(setup):
    text = str(to_data(setup)["children"])
    assert set(leaves(setup)) == {name for name in "abcd" if f"'{name}'" in text}
    assert set(leaves(setup)) <= set(names(setup))


class Text(str):
    """A state that remembers what was done to it."""

    __slots__ = ()

    def part(self, cut, child):
        return Text(f"{self}[{child}]")

    def joined(self, cut, parts):
        return Text(f"({'|'.join(parts)})")

    def mean(self, results, shares):
        return Text(f"({'+'.join(f'{share}{result}' for share, result in zip(shares, results, strict=True))})")


def no_matter(_block, _sees_all):
    """A cut that a state of text does not look at."""


def ran(setup, cutter=no_matter):
    return run(setup, Text("h"), lambda name, state: Text(state + name), cutter)


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_a_stack_applies_its_adapters_in_order(children):
    assert ran(Stack(*children), uncut) == "h" + "".join(children)
    assert last(Stack(*children)) == children[-1]


def test_blocks_cut_average_and_join():
    assert ran(Stack("a", Parallel("b", Stack("c", "d")), "a")) == "(ha[0]b|ha[1]cd)a"
    assert ran(Average("a", "b", weights=[1, 3])) == "(1/4ha+3/4hb)"
    assert ran(Average("a", "b", weights=[0, 3])) == "(1hb)"
    assert ran(Average("a", "b", weights=[2, 0.5], normalize_weights=False)) == "(2ha+1/2hb+-3/2h)"
    assert ran(BatchSplit("a", Split("b", "c", splits=2), batch_sizes=[1, 2])) == "(h[0]a|(h[1][0]b|h[1][1]c))"


def test_the_cases_of_a_setup_are_what_its_rows_may_meet():
    assert cases("a") == ("a",)
    nested = cases(Stack("a", Parallel("b", Stack("c", "d"))))
    assert list(map(str, nested)) == ["Stack('a', 'b')", "Stack('a', Stack('c', 'd'))"]
    inner = BatchSplit("a", "b", batch_sizes=[1, 2])
    assert cases(Average(inner, "c", weights=[1, 2])) == tuple(Average(n, "c", weights=[1, 2]) for n in "ab")
    assert cases(MultiTask("a", Fuse("b", "c"), "a")) == ("a", Fuse("b", "c"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Stack, "at least one adapter; got none"),
        (lambda: Stack(3), "Give the name of an adapter"),
        (lambda: Split("a", "b", splits=[1]), r"one positive integer for each child; got \[1\] for 2"),
        (lambda: BatchSplit("a", "b", batch_sizes=[1, 0]), "one positive integer"),
        (lambda: Average("a", "b", weights=[1, -1]), "sum above zero"),
        (lambda: Average("a", "b", weights=[-1, -1]), "sum above zero"),
        (lambda: Average("a", "b", "c", weights=[0.1, 0.2, -0.3]), "sum above zero"),
        (lambda: from_data({"block": "Stak", "children": ["a"]}), "Blocks: Stack"),
        (lambda: from_data({"block": "Stack", "children": ["a"], "splits": [1]}), "its own settings"),
        (lambda: from_data(3), "A stored setup is"),
    ],
)
def test_an_invalid_setup_is_refused_with_the_allowed_ones(make, message):
    with pytest.raises(SetupError, match=message):
        make()


@pytest.mark.parametrize("outer", BLOCKS)
def test_a_block_that_may_not_hold_another_names_those_it_may(outer):
    settings = {"Split": {"splits": 1}, "BatchSplit": {"batch_sizes": 1}}
    allowed = BLOCKS[outer].allowed
    for inner, block in BLOCKS.items():
        held = block("a", **settings.get(inner, {}))
        if inner in allowed:
            assert BLOCKS[outer](held, **settings.get(outer, {})).children == (held,)
            continue
        message = f"A `{outer}` may hold adapter names and {', '.join(allowed)}; got `{inner}`"
        with pytest.raises(SetupError, match=message):
            BLOCKS[outer](held, **settings.get(outer, {}))
    tree = {"Stack": 6, "Fuse": 1, "Split": 4, "BatchSplit": 4, "Parallel": 3, "Average": 3, "MultiTask": 3}
    assert len(allowed) == tree[outer]


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (Stack(Parallel("a", "b"), Parallel("a", "b", "c")), "every `Parallel` of a setup has the same number"),
        (
            BatchSplit("a", BatchSplit("a", "b", batch_sizes=[1, 2]), batch_sizes=[1, 2]),
            r"its share of the batch; got BatchSplit\('a', 'b', batch_sizes=\[1, 2\]\), for 3 samples, in a share",
        ),
        (
            Stack(BatchSplit("a", "b", batch_sizes=1), BatchSplit("a", "b", batch_sizes=2)),
            r"makes up the same batch; got sizes for \[2, 4\] samples",
        ),
    ],
)
def test_blocks_that_contradict_each_other_are_refused(setup, message):
    with pytest.raises(SetupError, match=message):
        check_nesting(setup)


def test_weights_of_an_average_are_normalised():
    assert Average("a", "b", weights=[1, 3]).shares() == (0.25, 0.75)
    assert Average("a", "b").shares() == (0.5, 0.5)
    assert sum(Average("a", "b", "c", weights=[0.1, 0.2, 0.3]).shares()) == 1
    assert Split("a", "b", splits=4).splits == (4, 4)
