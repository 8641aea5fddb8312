"""In which order, and by which process, the training images are seen.

The order is a function of the seed and the epoch, and each batch is cut into one slice for each process. So any number
of processes computes the same steps, resuming needs no random state to find its place, and no image is seen twice in
an epoch because it had to fill a batch: where a slice has nothing left, a blank stands in, which no loss counts.
"""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, Sampler

IGNORED = -100
"""The label of a blank. transformers and torch leave it out of a loss by this number."""


class Blank(int):
    """The index of a sample that is there only so that a process has one."""

    __slots__ = ()


class Order(Sampler[int]):
    """A permutation of the samples for each epoch."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation. Called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        # Two numbers in one: the seeds of neighbouring epochs and of neighbouring runs must not meet.
        generator = torch.Generator().manual_seed((self.seed << 24) + self.epoch)
        yield from torch.randperm(self.num_samples, generator=generator).tolist()


class SlicedBatches(BatchSampler):
    """The slices of one process: of every batch of `batch_size` samples, `parts` slices as equal as can be.

    A batch is cut into `accumulation` parts and each part into one slice a process; the process sees the parts one
    after the other, as the trainer accumulates them. The last batch, which may be small, is cut alike.
    """

    def __init__(
        self, order: Order, batch_size: int, *, processes: int = 1, process: int = 0, accumulation: int = 1
    ) -> None:
        self.sampler = self.order = order
        self.batch_size = batch_size // (processes * accumulation)
        self.drop_last = False
        self.whole = batch_size
        self.processes, self.process, self.accumulation = processes, process, accumulation

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation. Called by the trainer."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.order) // self.whole) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        everything = list(self.order)
        slices = self.processes * self.accumulation
        for start in range(0, len(everything), self.whole):
            batch = everything[start : start + self.whole]
            for part in range(self.accumulation):
                number = part * self.processes + self.process
                first, last = (len(batch) * at // slices for at in (number, number + 1))
                yield batch[first:last] or [Blank(batch[0])]


class WithBlanks(Dataset[dict[str, Any]]):
    """A data set that answers a blank index with a sample whose labels are ignored."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = self.samples[int(index)]
        if not isinstance(index, Blank):
            return sample
        labels = sample["labels"]
        return {**sample, "labels": torch.full_like(labels, IGNORED) if isinstance(labels, Tensor) else IGNORED}

    def set_epoch(self, epoch: int) -> None:
        """Choose the variations of an epoch."""
        self.samples.set_epoch(epoch)


def num_batches(samples: Sized, batch_size: int) -> int:
    """Optimiser steps in an epoch."""
    return -(-len(samples) // batch_size)
