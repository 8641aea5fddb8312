"""Which dimension of a residual sum holds the features: the last, or the second in feature maps (B, D, H, W)."""

from .graph import PARAMETER, Graph, Value
from .residual import Branch, see_through

_LAST = ("layer_norm", "rms_norm")
_SECOND = ("batch_norm", "group_norm", "instance_norm", "native_norm")
_REDUCTIONS = ("aten.mean", "aten.var", "aten.var_mean", "aten.std", "aten.linalg_vector_norm")


def feature_dims(graph: Graph, branches: list[Branch]) -> dict[Branch, int | None]:
    """The dimension of the features in the sums of one layer; None where nothing shows it.

    A norm on the stream shows it best, for the weights of an MLP across tokens make tokens; else the last weight of the
    branch does. Branches of one layer have one stream: what one of them shows holds for those that show nothing.
    """
    by_norm = {branch: _dim_by_norm(graph, branch) for branch in branches}
    found = {b: _dim_by_weight(graph, b) if by_norm[b] is None else by_norm[b] for b in branches}
    shown = {dim for dim in found.values() if dim is not None}
    return dict.fromkeys(found, shown.pop()) if len(shown) == 1 else found


def acts_across_tokens(graph: Graph, branch: Branch) -> bool:
    """Whether the last weight of a branch makes something else than the features of the stream."""
    made, normed = _dim_by_weight(graph, branch), _dim_by_norm(graph, branch)
    return made is not None and normed is not None and made != normed


def _dim_by_norm(graph: Graph, branch: Branch) -> int | None:
    """As the norms before the branch or after the sum have it."""
    weighted = [index for index in branch.path if graph.values[index].weighted]
    before = [index for index in branch.path if index < min(weighted, default=branch.total)]
    after = graph.values[branch.total].users
    for start, norms in ((branch.stream, before), (branch.total, after)):
        for index in sorted(norms):
            dim = _normalised(graph, graph.values[index])
            if dim is None:
                continue
            places = {
                place
                for place in range(1, len(graph.values[start].shape))
                if follow(graph, start, place, graph.values[index].deps[0]) == dim
            }
            if len(places) == 1 and len(graph.values[start].shape) == len(graph.values[branch.total].shape):
                return places.pop()
    return None


def _normalised(graph: Graph, value: Value) -> int | None:
    """The dimension that a norm, or the statistic of one, takes for the features."""
    if not value.deps:
        return None
    source = graph.values[value.deps[0]]
    if any(part in value.op for part in _LAST):
        scales = [graph.values[dep] for dep in value.deps if graph.values[dep].op == PARAMETER]
        return len(source.shape) - 1 if all(len(scale.shape) == 1 for scale in scales) else None
    if any(part in value.op for part in _SECOND):
        return 1
    if value.op in _REDUCTIONS and len(value.shape) == len(source.shape):
        reduced = [dim for dim, (a, b) in enumerate(zip(value.shape, source.shape, strict=True)) if a != b]
        return reduced[0] if len(reduced) == 1 else None
    return None


def _dim_by_weight(graph: Graph, branch: Branch) -> int | None:
    """As the last weight of the branch makes it that can be followed, or the last pooling where there is no weight."""
    values = [graph.values[index] for index in sorted(branch.path)]
    makers = [value for value in values if value.weighted] or [value for value in values if "pool" in value.op]
    if not makers:
        return None
    for last in reversed(makers):
        on_maps = "conv" in last.op or "pool" in last.op
        dim = follow(graph, last.index, 1 if on_maps else len(last.shape) - 1, branch.term)
        if dim is not None:
            return dim
    return None


def follow(graph: Graph, start: int, dim: int, end: int) -> int | None:
    """Where a dimension of one value is in another that is computed from it; None if it cannot be followed."""
    dims = {start: dim}
    for value in graph.values[start + 1 : end + 1]:
        for dep in value.deps:
            if dep in dims and not value.weighted and not value.bilinear:
                found = _carried(graph.values[dep], dims[dep], value)
                if found is not None:
                    dims[value.index] = found
                    break
    return dims.get(end)


def _carried(parent: Value, dim: int, value: Value) -> int | None:
    """The place of a dimension after one operator, which is a view, or element by element, or changes other lengths."""
    if value.storage == parent.storage and value.op != "aten.expand":
        same = [
            place
            for place, (size, stride) in enumerate(zip(value.shape, value.strides, strict=True))
            if stride == parent.strides[dim] and (size == parent.shape[dim] or 1 < size < parent.shape[dim])
        ]
        whole = [place for place in same if value.shape[place] == parent.shape[dim]]
        best = whole or same
        return best[0] if len(best) == 1 else dim if value.shape == parent.shape and dim in best else None
    shift = len(value.shape) - len(parent.shape)
    carried = shift == 0 or (shift > 0 and value.shape[dim + shift] == parent.shape[dim])
    return dim + shift if carried else None


def may_be_second(graph: Graph, branch: Branch) -> bool:
    """Whether the features may be in the second dimension, by sizes, where a dimension could not be followed."""
    weighted = [index for index in branch.path if graph.values[index].weighted]
    shape = graph.values[branch.total].shape
    if len(shape) > 3:
        return True
    if not weighted or len(shape) < 3:
        return False
    last = graph.values[max(weighted)]
    moved = see_through(graph, branch.term)[-1].moved
    if "conv" in last.op:
        return last.shape[1] == shape[1] and (not moved or shape[1] != shape[-1])
    return last.shape[-1] == shape[1] != shape[-1]
