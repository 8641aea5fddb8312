"""Runs a setup: the one place where blocks are given a meaning, for every port and method alike.

A `step` applies one adapter to a state; a state is what the port transforms, and knows how to be cut, averaged and
fused. The same routing runs in the forward, on tensors, and in the proof, on symbols.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar

from ..core.errors import SetupError
from .blocks import Average, BatchSplit, Fuse, MultiTask, Parallel, Setup, Split, Stack, walk
from .cuts import Cut, Cutter


class State(Protocol):
    """What runs through a setup."""

    def part(self, cut: Cut, child: int) -> Self:
        """The share of one child."""

    def joined(self, cut: Cut, parts: Sequence[Self]) -> Self:
        """What the children have made of their shares of this state, as one."""

    def mean(self, results: Sequence[Self], shares: Sequence[Any]) -> Self:
        """The sum of results of this state, each times its share; the shares add up to one."""

    def fused(self, block: Fuse, through: Callable[[Setup, Self], Self]) -> Self:
        """The result of a fusion of its children; `through` runs one of them."""


S = TypeVar("S", bound=State)


def run(setup: Setup, state: S, step: Callable[[str, S], S], cutter: Cutter, *, sees_all: bool = True) -> S:
    """The state after every adapter of the setup.

    `step(name, state)` applies one, and leaves the state as it is where the adapter has nothing at the place.
    `sees_all` says that the state has the rows of all samples.
    """
    if isinstance(setup, str):
        return step(setup, state)
    keeps_rows = not isinstance(setup, BatchSplit | Parallel | MultiTask)

    def through(child: Setup, given: S) -> S:
        return run(child, given, step, cutter, sees_all=sees_all and keeps_rows)

    if isinstance(setup, Stack):
        for child in setup.children:
            state = through(child, state)
        return state
    if isinstance(setup, Fuse):
        return state.fused(setup, through)
    if isinstance(setup, Average):
        results = [*(through(child, state) for child in setup.children), state]
        return state.mean(*_counting(results, setup.shares()))
    cut = cutter(setup, sees_all)
    parts = [through(child, state.part(cut, number)) for number, child in enumerate(setup.children)]
    return state.joined(cut, parts)


def _counting(results: list[S], shares: Sequence[Any]) -> tuple[list[S], list[Any]]:
    """The results with a share other than zero; the last of them is the input."""
    kept = [(result, share) for result, share in zip(results, shares, strict=False) if share]
    return [result for result, _ in kept], [share for _, share in kept]


def last(setup: Setup) -> str:
    """The adapter that acts last."""
    return setup if isinstance(setup, str) else last(setup.children[-1])


def check_nesting(setup: Setup) -> None:
    """Raise `SetupError` for blocks that cannot be parts of one setup: different numbers of copies, and sizes inside
    other sizes that do not fit."""
    copies = {len(block.children): block for block in walk(setup) if isinstance(block, Parallel)}
    if len(copies) > 1:
        raise SetupError(
            "The batch is copied once, so every `Parallel` of a setup has the same number of children; got "
            f"{' and '.join(map(str, copies.values()))}. Give them equal numbers."
        )
    sum_of_rows(setup)


def sum_of_rows(setup: Setup) -> int | None:
    """How many samples the batch of a setup has, where a `BatchSplit` says so. Raises `SetupError` for sizes that
    contradict each other."""
    if isinstance(setup, str):
        return None
    inner = [sum_of_rows(child) for child in setup.children]
    if isinstance(setup, BatchSplit):
        wrong = [
            (c, r, s) for c, r, s in zip(setup.children, inner, setup.batch_sizes, strict=True) if r not in (None, s)
        ]
        if wrong:
            child, rows, size = wrong[0]
            raise SetupError(
                f"A `BatchSplit` inside another one makes up its share of the batch; got {child}, for {rows} samples, "
                f"in a share of {size} of {setup}. Give sizes that fit."
            )
        return sum(setup.batch_sizes)
    known = {rows for rows in inner if rows is not None}
    if len(known) > 1:
        raise SetupError(
            f"Every `BatchSplit` of a setup makes up the same batch; got sizes for {sorted(known)} samples in {setup}. "
            "Give sizes with one sum."
        )
    return known.pop() if known else None


def cuts_rows(setup: Setup) -> bool:
    """Whether rows or tokens of a batch meet different adapters."""
    return any(isinstance(block, BatchSplit | Split | Parallel | MultiTask) for block in walk(setup))
