"""Which dimension of a stream tells samples apart: nearly always the first, in some models the second."""

from .graph import Call, Graph, Value

_TURNS = frozenset({"aten.permute", "aten.transpose"})


def batch_dim(graph: Graph, scope: Call, stream: Value) -> int:
    """0 for streams (B, L, D), 1 for (L, B, D).

    The second is told by an attention of the layer that says so and takes the stream as it lies; or by the size that
    all inputs of the model have in front.
    """
    if len(stream.shape) != 3:
        return 0
    if any(_says_second(graph, scope, call) for call in graph.calls[scope.index + 1 :] if scope.encloses(call)):
        return 1
    sizes = {graph.values[root].shape[0] for root in graph.roots if len(graph.values[root].shape) > 1}
    return int(len(sizes) == 1 and stream.shape[1] in sizes and stream.shape[0] not in sizes)


def _says_second(graph: Graph, scope: Call, call: Call) -> bool:
    if getattr(call.module, "batch_first", None) is not False or not call.inputs:
        return False
    taken = next(iter(call.inputs.values()))
    before = graph.ancestors(taken, after=scope.start - 1)
    turned = any(graph.values[index].op in _TURNS and graph.values[index].active for index in before)
    return len(graph.values[taken].shape) == 3 and not turned
