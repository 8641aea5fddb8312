"""Which output features of a linear map reach a value, read off the views that were taken of its result.

A tensor without memory still has an offset and strides. So the way from a fused projection to its queries can be
replayed on the numbers of the features, whatever Python wrote: split, chunk, unbind, slices of an interleaved view.
"""

import torch
from torch import Tensor

from .graph import Graph, Value

Features = frozenset[int] | None
"""Output features of a linear map; None for all of them."""

_REORDERS = ("roll", "flip", "gather", "index", "sort", "scatter", "cum")


def features_used(graph: Graph, result: int, num_features: int, between: set[int]) -> Features:
    """The output features of a map that are used by `between`, a set of values computed from its `result`.

    Shapes: the result is (..., num_features).
    """
    later = [graph.values[index] for index in sorted(between) if index > result]
    if not any(_narrows(graph, value) or value.index in graph.indices for value in later):
        return None
    used = _Replay(graph.values[result], num_features).run(graph, later)
    return None if bool(used.all()) else frozenset(used.nonzero().flatten().tolist())


def _narrows(graph: Graph, value: Value) -> bool:
    """Whether the value is a view of a part of another."""
    parents = (graph.values[dep] for dep in value.deps)
    return any(parent.storage == value.storage and parent.numel > value.numel for parent in parents)


class _Replay:
    """Carries the numbers of the features along views and element-wise operators, as far as they can be followed."""

    def __init__(self, result: Value, num_features: int) -> None:
        self._used = torch.zeros(num_features, dtype=torch.bool)
        self._labels: dict[int, Tensor] = {}
        self._storages: dict[int, Tensor] = {}
        self._put(result, torch.arange(num_features).expand(result.shape))

    def run(self, graph: Graph, values: list[Value]) -> Tensor:
        """Which features are used, as a mask (num_features,)."""
        for value in values:
            labelled = [dep for dep in dict.fromkeys(value.deps) if dep in self._labels]
            if value.storage in self._storages:
                self._labels[value.index] = self._view(value)
            elif len(labelled) == 1 and _is_elementwise(value, graph.values[labelled[0]]):
                self._put(value, self._labels[labelled[0]])
            elif value.index in graph.indices and value.deps[0] in self._labels:
                places = tuple(slice(None) if p is None else p for p in graph.indices[value.index])
                self._put(value, self._labels[value.deps[0]][places])
            else:
                for dep in labelled:
                    self._mark(self._labels[dep])
        later = {value.index for value in values}
        for index, labels in self._labels.items():
            if later.isdisjoint(graph.values[index].users):  # the end of the way
                self._mark(labels)
        return self._used

    def _put(self, value: Value, labels: Tensor) -> None:
        self._labels[value.index] = labels
        self._view(value).copy_(labels)

    def _view(self, value: Value) -> Tensor:
        """The labels of a value; what nothing is known of has the label -1."""
        storage = self._storages.get(value.storage, torch.zeros(0, dtype=torch.int64))
        missing = _extent(value) - len(storage)
        if missing > 0:
            storage = torch.nn.functional.pad(storage, (0, missing), value=-1)
        self._storages[value.storage] = storage
        return storage.as_strided(value.shape, value.strides, value.offset)

    def _mark(self, labels: Tensor) -> None:
        known = labels.reshape(-1)
        self._used[known[known >= 0]] = True


def _is_elementwise(value: Value, source: Value) -> bool:
    computed = value.weighted or value.bilinear or any(part in value.op for part in _REORDERS)
    return value.shape == source.shape and not computed


def _extent(value: Value) -> int:
    """How many elements of its storage a value spans."""
    if not value.numel:
        return 0
    return value.offset + 1 + sum((n - 1) * s for n, s in zip(value.shape, value.strides, strict=True))
