"""Where hooks can reach a branch: its output `h`, the stream `x`, and the norms around them."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..core.site import Arrangement, Tap
from .axes import follow
from .dropouts import is_dropped
from .graph import Call, Graph, Key
from .layers import Layer, is_checkpointed
from .norms import is_norm
from .residual import Branch, Seen, see_through


@dataclass(frozen=True, slots=True, kw_only=True)
class Taps:
    """What `Site` says about hook places; `output` is None where no module returns the branch's output."""

    output: Tap | None
    width: int
    feature_dim: int
    stream: Tap | None
    arrangement: Arrangement
    pre_norm: str | None
    post_norm: str | None
    branch_norm: str | None
    same_layout: bool
    exact: bool
    dropped_later: bool
    notes: tuple[str, ...]


class Reach:
    """The modules that hooks may use in one call of a layer."""

    def __init__(self, graph: Graph, layer: Layer) -> None:
        self.graph = graph
        self.scope = layer.scope
        self._prefix = f"{layer.path}." if layer.path else ""
        self._elsewhere: dict[int, str] | None = None
        self._calls: dict[str, list[Call]] = defaultdict(list)
        """The calls of each module, in order."""
        for call in graph.calls[layer.scope.index + 1 :]:
            if not layer.scope.encloses(call):
                break
            self._calls[call.path].append(call)

    def path(self, call: Call) -> str | None:
        """The module's path inside the layer; None for a module that is not in the layer's tree."""
        if call.path.startswith(self._prefix) and call.path != self.scope.path:
            return call.path.removeprefix(self._prefix)
        if self._elsewhere is None:  # a module that several layers share is known by its first place in the model
            self._elsewhere = {id(module): path for path, module in self.scope.module.named_modules() if path}
        return self._elsewhere.get(id(call.module))

    def hookable(self, call: Call) -> bool:
        """Whether a hook on the module fires exactly once in a call of the layer."""
        return self.scope.encloses(call) and len(self._calls[call.path]) == 1 and self.path(call) is not None

    def countable(self, call: Call) -> bool:
        """Whether a hook on the module can tell this call, if necessary by counting since another module was called."""
        return self.hookable(call) or (
            self.scope.encloses(call) and self.path(call) is not None and self._since(call) is not None
        )

    def _since(self, call: Call) -> str | None:
        """A module that is called once, before the first call of another; else the layer, unless it is checkpointed:
        then its own hooks do not run again with what is inside."""
        first = self._calls[call.path][0]
        before = (calls[0] for calls in self._calls.values() if calls[0].index < first.index)
        found = next((self.path(other) for other in before if self.hookable(other)), None)
        return "" if found is None and not is_checkpointed(self.scope.module) else found

    def tap(self, call: Call, side: str, key: Key) -> Tap:
        number, since = 0, None
        if len(self._calls[call.path]) > 1:
            number, since = self._calls[call.path].index(call) + 1, self._since(call)
        return Tap(path=self.path(call) or "", side="in" if side == "in" else "out", key=key, call=number, since=since)

    def norms_on(self, value: int) -> list[tuple[Call, str]]:
        """The norms inside the layer that take the value, each with its path."""
        calls = [call for call, _ in self.graph.consumers.get(value, ()) if self.scope.encloses(call)]
        return [(call, path) for call in calls if (path := self.path(call)) and is_norm(self.graph, call)]


def find_taps(graph: Graph, branch: Branch, reach: Reach, *, on_map: bool) -> Taps:
    """Everything about hook places of one branch; `on_map` says that its sum has the features in dimension 1."""
    output = _output_on_map(graph, branch, reach) if on_map else _output(graph, branch, reach)
    pre, post, inner = (
        _pre_norm(branch, reach),
        _post_norm(branch, reach, on_map=on_map),
        _branch_norm(branch, reach),
    )
    stream, scales = _stream(graph, branch, reach, before=branch.term if output is None else output[1].value)
    tap, same_layout, exact, dropped_later = None, False, False, False
    notes: tuple[str, ...] = ("the model scales the stream before the sum",) if scales else ()
    if branch.stream not in {seen.value for seen in see_through(graph, branch.skip)}:
        notes += ("the layer projects the stream before the sum",)
    width, feature_dim = graph.values[branch.total].shape[1 if on_map else -1], -1
    if output is not None:
        tap, seen, call = output
        if on_map:
            feature_dim = 1 if follow(graph, seen.value, 1, branch.term) == 1 else -1
        elif (
            graph.values[seen.value].shape[-1] != width
        ):  # one of the streams in a sum: norms of all of them are not its
            width, pre, post, inner = graph.values[seen.value].shape[-1], None, None, None
        same_layout = not seen.moved and graph.values[seen.value].shape == graph.values[branch.total].shape
        exact = not seen.scaled and not scales and not branch.shifted
        dropped_later = is_dropped(graph, seen.value, call, branch.total)
        if any(is_dropped(graph, value, call, branch.total) for value in _nearer(graph, branch, seen)):
            notes += ("the model's dropout follows the output",)
    return Taps(
        output=tap,
        width=width,
        feature_dim=feature_dim,
        stream=stream,
        arrangement=_arrangement(pre, post, inner),
        pre_norm=pre,
        post_norm=post,
        branch_norm=inner,
        same_layout=same_layout,
        exact=exact,
        dropped_later=dropped_later,
        notes=notes,
    )


def _output(graph: Graph, branch: Branch, reach: Reach) -> tuple[Tap, Seen, Call] | None:
    """The place closest to the sum: of the modules that return the same value, the last to return."""
    chain = see_through(graph, branch.term)
    widths = {graph.values[branch.total].shape[-1], *_widths_of_streams(graph, chain)}
    for seen in chain:
        if seen.value <= branch.stream:
            break
        shape = graph.values[seen.value].shape
        if len(shape) > 1 and shape[-1] in widths and (found := _last_returned(graph, branch, reach, seen)):
            return found
    return None


def _last_returned(graph: Graph, branch: Branch, reach: Reach, seen: Seen) -> tuple[Tap, Seen, Call] | None:
    found = [
        (call.returned, -len(key), call, key)
        for call, key in graph.producers.get(seen.value, ())
        if call.stop <= branch.total and reach.countable(call)
    ]
    # Counting the calls of a module costs a hook; one that never changes anything is not worth it, nor is a
    # dropout, which adapters can wait for.
    chosen = [entry for entry in found if reach.hookable(entry[2]) or not is_idle(entry[2].module)] or found
    if not chosen:
        return None
    _, _, call, key = max(chosen, key=lambda entry: entry[:2])
    return reach.tap(call, "out", key), seen, call


def _output_on_map(graph: Graph, branch: Branch, reach: Reach) -> tuple[Tap, Seen, Call] | None:
    """The same for a sum of feature maps: where the features of the term are in dimension 1, or in the last."""
    width = graph.values[branch.total].shape[1]
    for seen in see_through(graph, branch.term):
        if seen.value <= branch.stream:
            break
        shape = graph.values[seen.value].shape
        dims = [dim for dim in dict.fromkeys((1, len(shape) - 1)) if len(shape) > 2 and shape[dim] == width]
        if any(follow(graph, seen.value, dim, branch.term) == 1 for dim in dims):
            found = _last_returned(graph, branch, reach, seen)
            if found:
                return found
    return None


def _widths_of_streams(graph: Graph, chain: list[Seen]) -> Iterator[int]:
    """The width of one stream where a sum holds several side by side, each of which gets the branch by its own gate."""
    shapes = [graph.values[seen.value].shape for seen in chain]
    for place, (flat, whole) in enumerate(itertools.pairwise(shapes)):
        if len(whole) > 2 and flat == (*whole[:-2], whole[-2] * whole[-1]):
            one = (*whole[:-2], 1, whole[-1])
            if whole != one and one in shapes[place + 1 :]:
                yield whole[-1]


def is_idle(module: nn.Module) -> bool:
    """Whether the module returns what it gets: a dropout, or a stochastic depth of probability 0."""
    probability = getattr(module, "p", getattr(module, "drop_prob", None))
    return isinstance(module, (nn.Identity, nn.Dropout)) or probability == 0


def _stream(graph: Graph, branch: Branch, reach: Reach, before: int) -> tuple[Tap | None, bool]:
    """Where `x` can be read before the value `before` is there: an argument inside the layer, else a result inside it.

    A hook on the layer itself comes last: a layer that is checkpointed reruns its inside only. Returns also whether
    the model scales what is read there before it adds to it.
    """
    shape = graph.values[branch.total].shape
    chain = see_through(graph, branch.skip)
    usable = [seen for seen in chain if not seen.moved and graph.values[seen.value].shape == shape]
    for seen in usable:
        tap = _stream_at(graph, seen.value, before, reach)
        if tap is not None:
            return tap, seen.scaled
    for seen in usable:
        for call, key in graph.consumers.get(seen.value, ()):
            if call is reach.scope:
                return Tap(path="", side="in", key=key), seen.scaled
    return None, False


def _stream_at(graph: Graph, value: int, before: int, reach: Reach) -> Tap | None:
    for call, key in graph.consumers.get(value, ()):
        if call.start <= before and reach.hookable(call):
            return reach.tap(call, "in", key)
    for call, key in graph.producers.get(value, ()):
        if call.stop <= before and reach.hookable(call):
            return reach.tap(call, "out", key)
    return None


def _pre_norm(branch: Branch, reach: Reach) -> str | None:
    for value in dict.fromkeys((branch.stream, branch.skip)):
        for call, path in reach.norms_on(value):
            if not branch.path.isdisjoint(call.outputs.values()):
                return path
    return None


def _post_norm(branch: Branch, reach: Reach, *, on_map: bool) -> str | None:
    """The norm that takes the sum, if nothing else does, and the layer does not hand out the sum itself; of a feature
    map, one that takes it as it lies."""
    graph, value = reach.graph, branch.total
    width = graph.values[value].shape[-1]
    while value not in reach.scope.outputs.values() and graph.values[value].shape[-1] == width:
        if on_map and follow(graph, branch.total, 1, value) != 1:
            break
        users = set(graph.values[value].users)
        for call, path in reach.norms_on(value):
            if all(call.start <= user < call.stop for user in users):
                return path
        if len(users) != 1 or see_through(graph, min(users))[1:2] != [Seen(value)]:
            break
        value = min(users)
    return None


def _branch_norm(branch: Branch, reach: Reach) -> str | None:
    for seen in see_through(reach.graph, branch.term):
        for call, _ in reach.graph.producers.get(seen.value, ()):
            path = reach.path(call) if reach.scope.encloses(call) else None
            if path and is_norm(reach.graph, call):
                return path
    return None


def _arrangement(pre: str | None, post: str | None, inner: str | None) -> Arrangement:
    if post:
        return "post"
    if pre:
        return "sandwich" if inner else "pre"
    return "branch" if inner else "none"


def _nearer(graph: Graph, branch: Branch, tapped: Seen) -> Iterator[int]:
    """What lies between a tap and the sum."""
    for seen in see_through(graph, branch.term):
        if seen.value == tapped.value:
            return
        yield seen.value
