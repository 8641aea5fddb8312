"""Which rows of a batch each adapter has the last word on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import SetupError
from .blocks import BatchSplit, Fuse, MultiTask, Parallel, Setup, Stack

Tasks = Callable[[], Tensor]
"""Gives the number of the task of each sample, where the setup asks for it."""


@dataclass(frozen=True, slots=True)
class Share:
    """The name of an adapter, and the rows that it acts on last."""

    name: str
    rows: Tensor
    """(R,), their numbers."""


def ends(setup: Setup) -> tuple[str, ...]:
    """The adapters that have the last word on some rows, of blocks that cut a batch in the order of their children.

    A `Fuse` has the name of its fusion layers. Where several adapters have it together, as in an `Average`, it is none.
    """
    match setup:
        case str():
            return (setup,)
        case Stack():
            return ends(setup.children[-1])
        case Fuse():
            return (setup.name,)
        case BatchSplit() | Parallel() | MultiTask():
            return tuple(name for child in setup.children for name in ends(child))
    return ("",)


def shares(setup: Setup, count: int, tasks: Tasks) -> list[Share]:
    """The rows of each of the adapters in `ends`, of a batch with that many rows."""
    return _shares(setup, torch.arange(count), tasks)


def _shares(setup: Setup, rows: Tensor, tasks: Tasks) -> list[Share]:
    if isinstance(setup, Stack):
        return _shares(setup.children[-1], rows, tasks)
    if not isinstance(setup, BatchSplit | Parallel | MultiTask):
        return [Share(name, rows) for name in ends(setup)]
    count = len(setup.children)
    if isinstance(setup, BatchSplit):
        parts = torch.split(rows, _sizes(setup.batch_sizes, len(rows), str(setup)))
    elif isinstance(setup, Parallel):
        parts = torch.split(rows, _sizes((1,) * count, len(rows), str(setup)))
    else:
        task = tasks().to("cpu")
        task = task.repeat_interleave(len(rows) // len(task))[: len(rows)]
        parts = tuple(rows[task == number] for number in range(count))
    return [share for child, part in zip(setup.children, parts, strict=True) for share in _shares(child, part, tasks)]


def _sizes(parts: tuple[int, ...], count: int, place: str) -> list[int]:
    """The rows of each part, where every sample may be several rows."""
    if count % sum(parts):
        raise SetupError(
            f"The rows of a batch are shared among the adapters of a setup; got {count} rows for {sum(parts)} parts of "
            f"{place}. Give a batch of that size."
        )
    return [part * (count // sum(parts)) for part in parts]
