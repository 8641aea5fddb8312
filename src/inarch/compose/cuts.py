"""How blocks cut a batch: what of a tensor is a child's, and how the children's results are put together.

Where several rows of a tensor belong to one sample (windows, tokens in one dimension), those of a sample stand
together: every sample has the same number of them, and a cut counts samples.

Tensors: (B, L, D), B batch, L tokens, D width; or (L, B, D); or with samples, or tokens, folded into one dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.errors import SetupError
from ..core.turned import is_turned
from .batch import Batch
from .blocks import BatchSplit, Block, MultiTask, Parallel, Split, walk


class Cut(Protocol):
    """Cuts tensors into the shares of a block's children."""

    @property
    def place(self) -> "Place": ...
    def part(self, tensor: Tensor, child: int) -> Tensor: ...
    def whole(self, parts: tuple[Tensor, ...]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Take:
    """The share of one child, as a step of a program."""

    cut: Cut
    child: int

    def __call__(self, tensor: Tensor, inputs: Tensor | None = None) -> Tensor:
        if inputs is not None:
            self.cut.place.check_inputs(inputs)
        return self.cut.part(tensor, self.child)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block runs: what its cuts need to know of it."""

    key: str
    batch_dim: int
    batch: Batch
    sees_all: bool = True
    """Whether a cut gets the rows of all samples, and not those that a block around it has left."""
    has_split: bool = False
    """Whether a `Split` stands in the block, so that a sample is one row."""

    def cut(self, block: Block, sees_all: bool = True) -> Cut:
        """The cut of a block here; `sees_all` says that no block around it cuts the batch."""
        here = replace(self, sees_all=sees_all, has_split=any(isinstance(part, Split) for part in walk(block)))
        if isinstance(block, BatchSplit):
            return RowCut(here, block.batch_sizes)
        if isinstance(block, Parallel):
            return CopyCut(here, len(block.children))
        if isinstance(block, Split):
            return TokenCut(here, block.splits)
        assert isinstance(block, MultiTask)
        return TaskCut(here, len(block.children))

    def check_inputs(self, inputs: Tensor) -> None:
        """Raise `SetupError` where a layer has turned (B, L, D) into (L, B, D), or back, for a projection."""
        if is_turned(inputs):
            raise SetupError(
                f"A projection gets its samples in the dimension in which its layer has them, {self.batch_dim}; got a "
                f"transposed tensor of shape {tuple(inputs.shape)} at `{self.key}`, which may have them in the other "
                "one. Leave this projection out of adapters that share a batch, or pass the model contiguous inputs."
            )

    def is_folded(self, rows: int) -> bool:
        """Whether so many rows are more, or fewer, than the samples; of a share, its block has been asked already."""
        size = self.batch.size()
        return self.sees_all and size is not None and rows != size and not self.batch.has_grown()

    def samples(self, tensor: Tensor, count: int, what: str) -> int:
        """How many rows of a tensor belong to one of `count` samples. Raises `SetupError` where they cannot be told."""
        dim = self.batch_dim
        rows = tensor.shape[dim] if dim < tensor.dim() - 1 else 0
        # A sample may be several rows where all samples are equally many.
        is_odd = self.sees_all and rows != self.batch.size() and self.batch.is_packed() and not self.batch.has_grown()
        if rows and self.has_split and self.is_folded(rows):
            raise SetupError(
                "Every sample is one sequence where a `Split` stands in a block that cuts the batch; got a tensor of "
                f"shape {tuple(tensor.shape)} for {self.batch.size()} samples at `{self.key}`. Leave the layer out of "
                "the adapters."
            )
        if not rows or rows % count or is_odd:
            raise SetupError(
                f"{what}; got a tensor of shape {tuple(tensor.shape)} with the batch in dimension {dim} at `{self.key}`"
                f"{', where samples may have different numbers of rows' if is_odd else ''}. Give a batch of that size, "
                "or leave the layer out of the adapters."
            )
        return rows // count


@dataclass(frozen=True, slots=True)
class RowCut:
    """Rows of the batch, one after the other: sizes count samples."""

    place: Place
    sizes: tuple[int, ...]

    def part(self, tensor: Tensor, child: int) -> Tensor:
        total = sum(self.sizes)
        rows = self.place.samples(tensor, total, f"The sizes of a `BatchSplit`, {list(self.sizes)}, make up the batch")
        start = sum(self.sizes[:child])
        return tensor.narrow(self.place.batch_dim, start * rows, self.sizes[child] * rows)

    def whole(self, parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(parts, dim=self.place.batch_dim)


@dataclass(frozen=True, slots=True)
class CopyCut:
    """Equal parts of a batch that holds a copy for each child."""

    place: Place
    count: int

    def part(self, tensor: Tensor, child: int) -> Tensor:
        self.place.batch.require_copies(self.place.key)
        rows = self.place.samples(tensor, self.count, f"A `Parallel` of {self.count} has a copy of the batch for each")
        return tensor.narrow(self.place.batch_dim, child * rows, rows)

    def whole(self, parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(parts, dim=self.place.batch_dim)


@dataclass(frozen=True, slots=True)
class TokenCut:
    """Tokens of every sequence, one after the other."""

    place: Place
    sizes: tuple[int, ...]

    def part(self, tensor: Tensor, child: int) -> Tensor:
        dim, total = 1 - self.place.batch_dim, sum(self.sizes)
        if tensor.dim() != 3 or tensor.shape[dim] != total or self.place.is_folded(tensor.shape[1 - dim]):
            raise SetupError(
                f"The splits of a `Split` make up the sequence of every sample, {total} tokens; got a tensor of shape "
                f"{tuple(tensor.shape)} at `{self.place.key}`. Give sequences of that length, or leave the layer out "
                "of the adapters."
            )
        return tensor.narrow(dim, sum(self.sizes[:child]), self.sizes[child])

    def whole(self, parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(parts, dim=1 - self.place.batch_dim)


@dataclass(frozen=True, slots=True)
class TaskCut:
    """The rows of each task, wherever in the batch they are."""

    place: Place
    count: int

    def part(self, tensor: Tensor, child: int) -> Tensor:
        tasks = self.place.batch.require_tasks(self.place.key)
        what = f"Each of the {len(tasks)} samples has one of the `task_ids`"
        rows = self.place.samples(tensor, len(tasks), what)
        chosen = torch.nonzero(tasks.repeat_interleave(rows) == child).squeeze(1)
        return tensor.index_select(self.place.batch_dim, chosen.to(tensor.device))

    def whole(self, parts: tuple[Tensor, ...]) -> Tensor:
        dim = self.place.batch_dim
        tasks = self.place.batch.require_tasks(self.place.key)
        rows = sum(part.shape[dim] for part in parts) // len(tasks)
        home = torch.argsort(torch.argsort(tasks.repeat_interleave(rows), stable=True), stable=True)
        return torch.cat(parts, dim=dim).index_select(dim, home.to(parts[0].device))


Cutter = Callable[[Block, bool], Cut]
"""Gives the cut of a block; true where no block around it cuts the batch."""


def uncut(block: Block, sees_all: bool) -> Any:  # noqa: ARG001  there is no cut
    """For places where no block may cut: a proof, which sees each case by itself, or a weight, which has no rows."""
    raise AssertionError(f"{block} is not cut here")
