"""The residual stream: which sums carry it on, which layers it threads into one stack, and where it comes from."""

from collections import defaultdict
from dataclasses import dataclass

from .graph import MODALITIES, Graph
from .layers import Identity, Layer, list_pattern
from .norms import is_norm
from .residual import Branch, see_through
from .roles import is_attention

_POOLS = frozenset({"aten.cat", "aten.mean"})


# -------------------------------------------------------------------- which sums are sites


def carried_on(graph: Graph, layers: dict[Branch, Layer]) -> list[Branch]:
    """The branches whose sums are the stream of a layer. The others go silently: they are legitimate, but no sites.

    Dropped are sums that only feed their own branch (positional embeddings that a decoder adds to queries), sums
    inside the branch of another, and skips over whole layers.
    """
    streams: dict[int, int] = {}  # a value that some branch starts from -> the last such branch's sum
    for branch in layers:
        for value in (branch.stream, *(seen.value for seen in see_through(graph, branch.skip))):
            streams[value] = max(streams.get(value, -1), branch.total)
    kept = [branch for branch, layer in layers.items() if _continues(graph, branch, layer, streams)]
    kept = [branch for branch in kept if not _is_long_skip(graph, branch, kept, layers)]
    kept = [branch for branch in kept if not _is_nested(branch, kept, layers)]
    return sorted([*kept, *_only_homes_of_attentions(graph, layers, kept)], key=lambda branch: branch.total)


def _continues(graph: Graph, branch: Branch, layer: Layer, streams: dict[int, int]) -> bool:
    """Whether a later branch starts from the sum, or the layer hands it out."""
    scope = layer.scope
    outputs = set(scope.outputs.values())
    for value in forward(graph, branch.total):
        if streams.get(value, -1) > branch.total or value in outputs:
            return True
        if any(not scope.start <= user < scope.stop for user in graph.values[value].users):
            return True
    return False


def forward(graph: Graph, value: int) -> set[int]:
    """A value and what it becomes by changes of layout, scales, norms and pooling."""
    found: set[int] = set()
    todo = [value]
    while todo:
        index = todo.pop()
        if index in found:
            continue
        found.add(index)
        todo.extend(user for user in graph.values[index].users if _carries(graph, user, index))
        for call, _ in graph.consumers.get(index, ()):
            if is_norm(graph, call):
                todo.extend(call.outputs.values())
    return found


def _carries(graph: Graph, user: int, index: int) -> bool:
    return graph.values[user].op in _POOLS or any(seen.value == index for seen in see_through(graph, user)[1:2])


def _is_long_skip(graph: Graph, branch: Branch, kept: list[Branch], layers: dict[Branch, Layer]) -> bool:
    """Whether the branch spans branches of other layers, or a chain of branches in its own."""
    inner = [other for other in kept if other.total != branch.total and other.total in branch.path]
    if any(layers[other].identity != layers[branch].identity for other in inner):
        return True
    sums = {other.total for other in inner}
    return any(not sums.isdisjoint(_sums_before(graph, other)) for other in inner)


def outside_layers(graph: Graph, homeless: list[Branch], kept: list[Branch]) -> list[Branch]:
    """Of the branches without a layer those whose sums become the stream of others, and lie in no branch.

    What only convolves is left out: so a model makes positions for its stream.
    """
    streams = {value for branch in kept for value in _sums_before(graph, branch)}
    inside = set[int]().union(*(branch.interior for branch in kept))
    return [
        branch
        for branch in homeless
        if branch.total not in inside
        and not streams.isdisjoint(forward(graph, branch.total))
        and any(graph.values[index].weighted and "conv" not in graph.values[index].op for index in branch.path)
    ]


def _only_homes_of_attentions(graph: Graph, layers: dict[Branch, Layer], kept: list[Branch]) -> list[Branch]:
    """Branches with an attention that is in no other branch, though something else than a norm or the layer's end
    takes up their sum: a convolution that stands between two branches of a layer."""
    claimed = set[int]().union(*(branch.interior for branch in kept))
    idle = {value.index for value in graph.values if value.index not in claimed and is_attention(graph, value)}
    homes = [branch for branch in layers if branch not in kept and not idle.isdisjoint(branch.path)]
    return [branch for branch in homes if not any(branch.total in other.interior for other in [*kept, *homes])]


def _sums_before(graph: Graph, branch: Branch) -> set[int]:
    """The stream of a branch, seen through scales and one norm."""
    values = {branch.stream, *(seen.value for seen in see_through(graph, branch.skip))}
    for call, _ in graph.producers.get(branch.stream, ()):
        if is_norm(graph, call):
            values |= set(call.inputs.values())
    return values


def _is_nested(branch: Branch, kept: list[Branch], layers: dict[Branch, Layer]) -> bool:
    return any(
        branch.total != other.total
        and branch.total in other.path
        and other.stream <= branch.stream
        and layers[other].identity == layers[branch].identity
        for other in kept
    )


# -------------------------------------------------------------------- which layers are one stack


@dataclass(slots=True)
class Stack:
    """Layers that one stream runs through, in order."""

    layers: list[Identity]
    roots: set[str]
    """Inputs of the model that the stream comes from."""
    last: int
    """The stack's last sum so far."""
    name: str = ""


def find_stacks(graph: Graph, branches: list[Branch], layers: dict[Branch, Layer]) -> list[Stack]:
    """The stacks in order of execution, named by modality and ordinal.

    A layer continues the stack whose stream it takes up, if it lies in the same list or is of the same class: so the
    stages of a hierarchical model are one stack, and encoder and decoder are two.
    """
    sums = {branch.total: layers[branch] for branch in branches}
    stacks: list[Stack] = []
    home: dict[Identity, Stack] = {}
    known: dict[Identity, Layer] = {}
    for branch in branches:
        layer = layers[branch]
        if layer.identity not in home:
            before, roots = _sources(graph, branch.stream, sums)
            for earlier in before:
                roots |= home[earlier.identity].roots
            related = [other for other in before if _are_siblings(layer, known[other.identity])]
            if related:
                home[layer.identity] = home[related[-1].identity]
            else:
                home[layer.identity] = Stack([], roots, branch.total)
                stacks.append(home[layer.identity])
            home[layer.identity].layers.append(layer.identity)
            known[layer.identity] = layer
        home[layer.identity].last = branch.total
    _name(graph, stacks)
    return stacks


def _are_siblings(layer: Layer, other: Layer) -> bool:
    """Whether two layers lie in one list, or in equal lists of sibling stages, or are of one class."""
    containers = {list_pattern(layer.container), list_pattern(other.container)}
    return len(containers) == 1 or type(layer.scope.module) is type(other.scope.module)


def _sources(graph: Graph, value: int, sums: dict[int, Layer]) -> tuple[list[Layer], set[str]]:
    """The layers and the model's inputs that a stream comes from: where it was a sum, only the sum counts."""
    before: dict[int, Layer] = {}
    roots: set[str] = set()
    seen: set[int] = set()
    todo = [value]
    while todo:
        index = todo.pop()
        if index in seen:
            continue
        seen.add(index)
        if index in sums:
            before[index] = sums[index]
        elif index in graph.roots:
            roots.add(graph.modality(index))
        else:
            todo.extend(graph.values[index].deps)
    return [before[index] for index in sorted(before)], roots - {""}


def _name(graph: Graph, stacks: list[Stack]) -> None:
    counts: dict[str, int] = defaultdict(int)
    for stack in stacks:
        roots = stack.roots
        if not roots:  # learned queries: take the modality of what they look at
            roots = {graph.modality(index) for index in graph.ancestors(stack.last, after=-1) if index in graph.roots}
        modality = next((name for name in MODALITIES if name in roots), "data")
        stack.name = f"{modality}{counts[modality]}"
        counts[modality] += 1
