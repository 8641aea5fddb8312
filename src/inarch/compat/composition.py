"""The composition blocks: `import inarch.compat.composition as ac`."""

from typing import Any

from ..compose import Average as Average
from ..compose import BatchSplit as BatchSplit
from ..compose import Block
from ..compose import Fuse as Fuse
from ..compose import MultiTask as MultiTask
from ..compose import Parallel as Parallel
from ..compose import Split as Split
from ..compose import Stack as Stack
from .active import setup_in
from .refused import NAMES, not_here

AdapterCompositionBlock = Block


def parse_composition(adapter_composition: Any, level: int = 0, model_type: str | None = None) -> Any:  # noqa: ARG001  there alone
    """The setup itself, a name or a block; `Stack("a", "b")` for a list, `Fuse("a", "b")` for a list in a list"""
    return as_setup(adapter_composition)


def as_setup(setup: Any) -> Any:
    """A setup as it may be written there: a list is a `Stack`, a list in it is a `Fuse`, and an empty one is none."""
    if isinstance(setup, list | tuple):
        parts = [Fuse(*part) if isinstance(part, list | tuple) else part for part in setup]
        return (parts[0] if len(parts) == 1 else Stack(*parts)) if parts else None
    return setup_in(setup)  # a name or a block, or refused where it is used


def as_fuse(names: Any) -> Fuse:
    """A `Fuse` as it may be written there: a list, or names in a text."""
    names = setup_in(names)
    if isinstance(names, Fuse):
        return names
    return Fuse(*(names.split(",") if isinstance(names, str) else names))


def __getattr__(name: str) -> Any:
    if name in NAMES:
        raise not_here(name, NAMES[name])
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
