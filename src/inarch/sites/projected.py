"""Attentions that are added to a projection of what they look at, where a layer changes or narrows its stream.

Neither operand of such a sum is computed from the other, so it is no residual sum by the definition in `residual.py`.
It is one if the layer goes on from it: there the projection is the stream.
"""

from collections.abc import Iterable

from .graph import Graph
from .layers import Layer
from .residual import SUM, Branch
from .roles import find_attentions, is_attention
from .stream import continues, starts


def find_projected(graph: Graph, kept: list[Branch], layers: dict[Branch, Layer]) -> dict[Branch, Layer]:
    """The branches of attentions that no branch of `kept` has, in layers that have some, each with its layer."""
    claimed: set[int] = set().union(*(branch.interior for branch in kept))
    goes_on = starts(graph, kept)
    found: dict[Branch, Layer] = {}
    for layer in {layers[branch].scope.index: layers[branch] for branch in kept}.values():
        for value in graph.values[layer.scope.start : layer.scope.stop]:
            if value.index in claimed or not value.users or not is_attention(graph, value):
                continue
            branch = _branch(graph, value.index, range(layer.scope.start, layer.scope.stop))
            if branch is not None and continues(graph, branch, layer, goes_on, {}):
                found[branch] = layer
                claimed |= branch.interior
    return found


def _branch(graph: Graph, attention: int, within: range) -> Branch | None:
    """The first sum of what an attention gives and of something else that comes from the same stream."""
    made = graph.descendants(attention, within=set(within)) | {attention}
    for index in sorted(made):
        value = graph.values[index]
        if value.op != SUM or len(value.deps) != 2:
            continue
        skip, term = sorted(value.deps, key=made.__contains__)
        if term in made and skip not in made and graph.values[skip].active and _alike(graph, (skip, term, index)):
            return _over(graph, index, skip, term)
    return None


def _alike(graph: Graph, values: Iterable[int]) -> bool:
    shapes = {graph.values[value].shape for value in values}
    return len(shapes) == 1 and len(min(shapes)) > 1


def _over(graph: Graph, total: int, skip: int, term: int) -> Branch | None:
    common = graph.ancestors(skip, after=-1) & graph.ancestors(term, after=-1)
    stream = max((index for index in common if graph.values[index].active), default=None)
    if stream is None or stream == skip:
        return None
    interior = graph.ancestors(term, after=stream)
    path = graph.descendants(stream, within=interior)
    branch = Branch(total, skip, stream, term, frozenset(path), frozenset(interior))
    # With queries from elsewhere, skip and term are two ways on from an attention's values: a part of it.
    return branch if any(attention.q in path for attention in find_attentions(graph, branch)) else None
