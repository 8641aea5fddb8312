"""Which modules normalise, by what they compute."""

from .graph import Call, Graph

_STATISTICS = ("norm", "rsqrt", "sqrt", "var", "std", "mean")


def is_norm(graph: Graph, call: Call) -> bool:
    """Whether a call is of a module that normalises and does nothing else: no weight matrix, no module inside."""
    if call.index + 1 < len(graph.calls) and call.encloses(graph.calls[call.index + 1]):
        return False
    inside = graph.values[call.start : call.stop]
    shapes = {graph.values[value].shape for value in call.inputs.values()}
    return (
        any(graph.values[value].shape in shapes for value in call.outputs.values())
        and not any(value.weighted or value.bilinear for value in inside)
        and any(part in value.op for value in inside if value.active for part in _STATISTICS)
    )
