"""`model.active_adapters`: what is active, as it is read there and in transformers."""

from collections.abc import Callable, Sequence
from typing import Any

from ..compose import Block, Parallel, Setup, Stack, leaves


class Active(Sequence[Any]):
    """The active setup: read as its block, where a name is a `Stack` of it; it may be called, as in transformers."""

    def __init__(self, setup: Setup | None, call: Callable[..., Any]) -> None:
        self.setup = setup
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    @property
    def children(self) -> tuple[Setup, ...]:
        """The parts of the block."""
        return () if self.setup is None else _block(self.setup).children

    def __getitem__(self, key: Any) -> Any:
        return self.children[key]

    def __len__(self) -> int:
        return len(self.children)

    def first(self) -> str:
        """The name that comes first."""
        return _outermost(self.children, 0)

    def last(self) -> str:
        """The name that comes last."""
        return _outermost(self.children, -1)

    def flatten(self) -> set[str]:
        """The names in the setup, without those of fusion layers."""
        return {name for child in self.children for name in leaves(child)}

    @property
    def parallel_channels(self) -> int:
        """How many copies of the batch there are."""
        return 1 if self.setup is None else _channels(_block(self.setup))

    def __eq__(self, other: object) -> bool:
        theirs = other.setup if isinstance(other, Active) else other
        return self.setup == theirs or (isinstance(self.setup, str) and theirs == Stack(self.setup))

    def __hash__(self) -> int:
        return hash(_block(self.setup) if self.setup else None)

    def __repr__(self) -> str:
        return repr(self.setup)


def setup_in(given: Any) -> Any:
    """The setup that `active_adapters` shows, where that is given; anything else as it is."""
    return given.setup if isinstance(given, Active) else given


def _block(setup: Setup) -> Block:
    return Stack(setup) if isinstance(setup, str) else setup


def _outermost(children: Sequence[Setup], number: int) -> str:
    child = children[number]
    return child if isinstance(child, str) else _outermost(child.children, number)


def _channels(setup: Setup) -> int:
    if isinstance(setup, str):
        return 1
    return len(setup.children) if isinstance(setup, Parallel) else max(map(_channels, setup.children))
