"""Runs a setup: the one place where blocks are given a meaning, for every port and method alike.

A `step` applies one adapter to a state; a state is what the port transforms. The same routing runs in the forward, on
tensors, and in the proof, on symbols.
"""

from collections.abc import Callable
from typing import TypeVar

from ..core.errors import SetupError
from .blocks import Block, Setup, Stack, walk

S = TypeVar("S")

RUNNABLE: tuple[type[Block], ...] = (Stack,)
"""The blocks that `run` gives a meaning."""


def check_runnable(setup: Setup) -> None:
    """Raise `SetupError` for a block that this version can describe but not run."""
    for block in walk(setup):
        if not isinstance(block, RUNNABLE):
            raise SetupError(
                f"This version runs {', '.join(f'`{known.__name__}`' for known in RUNNABLE)}; got "
                f"`{type(block).__name__}` in {setup}. Activate a single adapter or a `Stack`."
            )


def run(setup: Setup, state: S, step: Callable[[str, S], S]) -> S:
    """The state after every adapter of the setup; `step(name, state)` applies one."""
    if isinstance(setup, str):
        return step(setup, state)
    for child in setup.children:
        state = run(child, state, step)
    return state


def last(setup: Setup) -> str:
    """The adapter that acts last, whose configuration decides how the site ends."""
    return setup if isinstance(setup, str) else last(setup.children[-1])


def keep_only(setup: Setup, present: Callable[[str], bool]) -> Setup | None:
    """The setup without the adapters that have nothing at a place; None if none is left."""
    if isinstance(setup, str):
        return setup if present(setup) else None
    children = [kept for child in setup.children if (kept := keep_only(child, present)) is not None]
    return Stack(*children) if len(children) > 1 else children[0] if children else None
