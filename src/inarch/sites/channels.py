"""Sums of feature maps, (B, D, H, W): which of them are residual branches of a Transformer, and which only convolve."""

from collections import defaultdict

from .axes import feature_dims, may_be_second
from .graph import Graph, Value
from .layers import Layer, list_pattern
from .residual import Branch


def split_by_layout(
    graph: Graph, kept: list[Branch], layers: dict[Branch, Layer]
) -> tuple[set[Branch], dict[Branch, str]]:
    """The branches whose sums have their features in dimension 1, and those to leave alone, each with the reason.

    Of a sum of four dimensions, where nothing shows which one holds the features, the worst is assumed. Of feature maps
    a layer is adapted that has maps of single places in some branch, as an attention and an MLP have; in it, every
    branch but those with convolutions that mix channels and places at once. `layers` has more branches than those kept:
    where others lie beside the kept ones of a layer, it is no chain of residual branches.
    """
    by_call: dict[int, list[Branch]] = defaultdict(list)
    for branch in kept:
        by_call[layers[branch].scope.index].append(branch)
    maps: set[Branch] = set()
    broken: set[Branch] = set()
    refused: dict[Branch, str] = {}
    for group in by_call.values():
        dims = feature_dims(graph, group)
        sizes = {branch: len(graph.values[branch.total].shape) for branch in group}
        second = [branch for branch in group if dims[branch] == 1 != sizes[branch] - 1]
        sparse = [branch for branch in second if not convolves(graph, branch)]
        maps.update(sparse if any(_has_pointwise(graph, branch) for branch in sparse) else ())
        broken.update(second if _lost(group, layers) else ())
        refused |= dict.fromkeys(second, "a sum of feature maps that convolutions make")
        refused |= {
            branch: "a sum of feature maps, and which dimension holds the features is not certain"
            for branch in group
            if dims[branch] not in (None, 1, sizes[branch] - 1)
            or (dims[branch] is None and may_be_second(graph, branch))
        }
    kinds = {_kind(layers[branch]) for branch in broken}
    alike = {branch for branch in maps if _kind(layers[branch]) in kinds}
    refused |= dict.fromkeys(
        alike, "a sum of feature maps beside others, here or in a layer like it, that only convolve"
    )
    maps -= alike
    return maps, {branch: reason for branch, reason in refused.items() if branch not in maps}


def convolves(graph: Graph, branch: Branch) -> bool:
    """Whether convolutions that mix channels and places at once are in a branch."""
    return any(_is_dense(graph, value) for value in _weighted(graph, branch))


def _kind(layer: Layer) -> tuple[type, str]:
    return type(layer.scope.module), list_pattern(layer.container)


def _lost(group: list[Branch], layers: dict[Branch, Layer]) -> bool:
    """Whether the same call of the layer has branches that were not kept and are in none that was."""
    inside = set[int]().union(*(branch.interior for branch in group))
    totals = {branch.total for branch in group}
    here = (branch for branch, layer in layers.items() if layer.scope is layers[group[0]].scope)
    return any(branch.total not in totals | inside for branch in here)


def _weighted(graph: Graph, branch: Branch) -> list[Value]:
    return [graph.values[index] for index in branch.path if graph.values[index].weighted]


def _has_pointwise(graph: Graph, branch: Branch) -> bool:
    return any(all(size == 1 for size in _window(graph, value)) for value in _weighted(graph, branch))


def _is_dense(graph: Graph, value: Value) -> bool:
    """Whether this is a convolution of more than one place and more than one channel at once."""
    kernels = _kernels(graph, value)
    return any(size > 1 for size in _window(graph, value)) and any(kernel.shape[1] > 1 for kernel in kernels)


def _window(graph: Graph, value: Value) -> tuple[int, ...]:
    """The places that a map looks at, by dimension; nothing for one that is no convolution."""
    return tuple(size for kernel in _kernels(graph, value) for size in kernel.shape[2:])


def _kernels(graph: Graph, value: Value) -> list[Value]:
    if "conv" not in value.op:
        return []
    return [graph.values[dep] for dep in value.deps if graph.values[dep].matrix]
