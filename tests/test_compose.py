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
    check_runnable,
    from_data,
    keep_only,
    last,
    names,
    run,
    to_data,
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
def test_the_names_of_a_setup_are_those_in_its_data(setup):
    text = str(to_data(setup)["children"])
    assert set(names(setup)) == {name for name in "abcd" if f"'{name}'" in text}


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_a_stack_applies_its_adapters_in_order(children):
    assert run(Stack(*children), "", lambda name, state: state + name) == "".join(children)
    nested = Stack(Stack(*children).children[0], *children[1:])
    assert run(nested, "", lambda name, state: state + name) == "".join(children)


@given(st.lists(NAMES, min_size=1, max_size=4), st.sets(NAMES))
def test_only_what_is_present_is_kept(children, present):
    kept = keep_only(Stack(*children), lambda name: name in present)
    expected = [name for name in children if name in present]
    if not expected:
        assert kept is None
    else:
        assert run(kept, "", lambda name, state: state + name) == "".join(expected)
        assert last(kept) in present


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Stack, "at least one adapter; got none"),
        (lambda: Stack(3), "Give the name of an adapter"),
        (lambda: Fuse(Parallel("a", "b")), "A `Fuse` may hold adapter names and Stack; got `Parallel`"),
        (lambda: Parallel(Fuse("a", "b")), "got `Fuse`"),
        (lambda: Split("a", "b", splits=[1]), r"one positive integer for each child; got \[1\] for 2"),
        (lambda: BatchSplit("a", "b", batch_sizes=[1, 0]), "one positive integer"),
        (lambda: Average("a", "b", weights=[1, -1]), "sum other than zero"),
        (lambda: from_data({"block": "Stak", "children": ["a"]}), "Blocks: Stack"),
        (lambda: from_data({"block": "Stack", "children": ["a"], "splits": [1]}), "its own settings"),
        (lambda: from_data(3), "A stored setup is"),
    ],
)
def test_an_invalid_setup_is_refused_with_the_allowed_ones(make, message):
    with pytest.raises(SetupError, match=message):
        make()


@pytest.mark.parametrize("setup", [Fuse("a", "b"), Stack("a", Parallel("b", "c")), MultiTask("a", "b")])
def test_a_block_that_cannot_run_yet_is_refused_by_name(setup):
    with pytest.raises(SetupError, match="This version runs `Stack`"):
        check_runnable(setup)


def test_weights_of_an_average_are_normalised():
    assert Average("a", "b", weights=[1, 3]).shares() == (0.25, 0.75)
    assert Average("a", "b").shares() == (0.5, 0.5)
    assert Split("a", "b", splits=4).splits == (4, 4)
