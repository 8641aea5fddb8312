"""The residual stream: which sums carry it on, which layers it threads into one stack, and where it comes from."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .graph import MODALITIES, Call, Graph
from .layers import Identity, Layer, list_pattern
from .norms import is_norm
from .residual import Branch, see_through
from .roles import is_attention

_POOLS = frozenset({"aten.cat", "aten.index_put", "aten.masked_scatter", "aten.mean"})
_LIMITS = frozenset({"aten.clamp", "aten.clamp_max", "aten.clamp_min"})


# -------------------------------------------------------------------- which sums are sites


def carried_on(graph: Graph, layers: dict[Branch, Layer]) -> list[Branch]:
    """The branches whose sums are the stream of a layer. The others go silently: they are legitimate, but no sites.

    Dropped are sums that only feed their own branch (positional embeddings that a decoder adds to queries), sums
    inside the branch of another, and skips over whole layers.
    """
    layers = _of_one_layer(layers)
    goes_on = starts(graph, layers)
    ends: dict[int, int] = {}
    for branch in layers:
        ends[branch.term] = max(ends.get(branch.term, -1), branch.total)
    kept = [branch for branch, layer in layers.items() if continues(graph, branch, layer, goes_on, ends)]
    kept += _ends_of_loops(graph, kept, layers)
    kept += _ends_of_chains(graph, kept, layers)
    kept = [branch for branch in layers if branch in kept and not _is_long_skip(graph, branch, kept, layers)]
    return [branch for branch in kept if not _is_nested(graph, branch, kept, layers)]


def _of_one_layer(layers: dict[Branch, Layer]) -> dict[Branch, Layer]:
    """Without sums of what several sublayers of a loop give: a codec adds up its quantisers so."""
    homes: dict[int, set[Identity]] = defaultdict(set)
    for branch, layer in layers.items():
        homes[branch.total].add(layer.identity)
    return {branch: layer for branch, layer in layers.items() if len(homes[branch.total]) == 1}


def _ends_of_loops(graph: Graph, kept: list[Branch], layers: dict[Branch, Layer]) -> list[Branch]:
    """The last sums of loops over layers that are no modules: what follows in the module around them is no layer.

    They go on from an earlier sum of the loop; what else is added up there does not.
    """
    last: dict[int, int] = {}
    sums: dict[int, set[int]] = defaultdict(set)
    for branch, layer in layers.items():
        if layer.number is not None:
            last[layer.scope.index] = max(last.get(layer.scope.index, -1), branch.total)
            sums[layer.scope.index] |= {branch.total} if branch in kept else set()
    return [
        branch
        for branch, layer in layers.items()
        if branch not in kept
        and branch.total == last.get(layer.scope.index)
        and not sums[layer.scope.index].isdisjoint(_sums_before(graph, branch))
    ]


def starts(graph: Graph, branches: Iterable[Branch]) -> dict[int, int]:
    """The values that branches start from, each with the last sum of such a branch."""
    found: dict[int, int] = {}
    for branch in branches:
        for value in (branch.stream, *(seen.value for seen in see_through(graph, branch.skip))):
            found[value] = max(found.get(value, -1), branch.total)
    return found


def continues(graph: Graph, branch: Branch, layer: Layer, starts: dict[int, int], ends: dict[int, int]) -> bool:
    """Whether a later branch starts from the sum, or the layer hands it out, or adds it to a longer skip as it is.

    `starts` and `ends` map values that branches start from, and their terms, to the sums of these branches.
    """
    scope = layer.scope
    outputs = set(scope.outputs.values())
    for value in forward(graph, branch.total):
        if starts.get(value, -1) > branch.total or value in outputs:
            return True
        if any(not scope.start <= user < scope.stop for user in graph.values[value].users):
            return True
    longer = {term for term, total in ends.items() if branch.total < term < scope.stop and total > branch.total}
    return bool(longer) and not longer.isdisjoint(_without_weights(graph, branch.total, scope))


def _without_weights(graph: Graph, value: int, scope: Call) -> set[int]:
    """What a value becomes inside a call without passing a weight or meeting another token."""
    found: set[int] = set()
    todo = [value]
    while todo:
        index = todo.pop()
        if index in found:
            continue
        found.add(index)
        users = (graph.values[user] for user in graph.values[index].users if user < scope.stop)
        todo.extend(user.index for user in users if not user.weighted and not user.bilinear)
    return found


def forward(graph: Graph, value: int) -> set[int]:
    """A value and what it becomes by changes of layout, scales, limits, norms and pooling."""
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
    return (
        graph.values[user].op in _POOLS | _LIMITS
        or any(seen.value == index for seen in see_through(graph, user)[1:2])
        or _is_less_its_average(graph, user, index)
    )


def _is_less_its_average(graph: Graph, user: int, index: int) -> bool:
    """Whether a value goes on without its trend, which a pool makes of it: the seasonal part of a series."""
    value = graph.values[user]
    if value.op != "aten.sub" or len(value.deps) != 2 or value.deps[0] != index:
        return False
    made = [graph.values[part] for part in graph.ancestors(value.deps[1], after=index)]
    return any(index in part.deps for part in made) and not any(part.weighted or part.bilinear for part in made)


def _ends_of_chains(graph: Graph, kept: list[Branch], layers: dict[Branch, Layer]) -> list[Branch]:
    """Branches that go on from the sum of another of their layer, and all that a longer branch or the layer has ends in
    theirs.

    So ends the narrow stream inside a layer that is projected up again before it is added to the wide one, and the
    stream of a stage that goes on in fewer tokens.
    """
    found: list[Branch] = []
    for branch, layer in layers.items():
        if branch in kept:
            continue
        same = [other for other in (*kept, *found) if layers[other].identity == layer.identity]
        before = _sums_before(graph, branch)
        if any(other.total in before for other in same) and (
            any(branch.total in other.path and all_through(graph, other, branch.total) for other in same)
            or _is_only_way_out(graph, branch, layer.scope)
        ):
            found.append(branch)
    return found


def _is_only_way_out(graph: Graph, branch: Branch, scope: Call) -> bool:
    """Whether what a layer hands out comes from the stream of a branch by way of its sum alone."""
    outputs = set(scope.outputs.values())
    inside = set(range(branch.stream + 1, scope.stop))
    return not outputs.isdisjoint(graph.descendants(branch.total, within=inside)) and outputs.isdisjoint(
        graph.descendants(branch.stream, within=inside - {branch.total})
    )


def all_through(graph: Graph, branch: Branch, value: int) -> bool:
    """Whether the branch reaches its term only by way of `value`."""
    return branch.term not in graph.descendants(branch.stream, within=set(branch.path) - {value})


def _is_long_skip(graph: Graph, branch: Branch, kept: list[Branch], layers: dict[Branch, Layer]) -> bool:
    """Whether the branch spans branches of other layers, or a chain of branches in its own.

    An attention spans nothing by its keys where they come from its own stream through layers that ran before its own,
    as those of a decoder that looks at pooled tokens do.
    """
    beside = _beside(graph, branch, kept)
    inner = [other for other in kept if other not in beside and _is_inside(graph, other, branch)]
    start = layers[branch].scope.start
    if branch.term in graph.descendants(branch.stream, within={index for index in branch.path if index >= start}):
        inner = [other for other in inner if other.total >= start]
    if any(layers[other].identity != layers[branch].identity for other in inner):
        return True
    sums = {other.total for other in inner}
    return any(not sums.isdisjoint(_sums_before(graph, other)) for other in inner)


def outside_layers(graph: Graph, homeless: list[Branch], kept: list[Branch]) -> list[Branch]:
    """Of the branches without a layer those that lie in no branch, and whose sums become the stream of others, or that
    have an attention or an MLP of their own, as a head that pools has.

    What only convolves is left out: so a model makes positions for its stream.
    """
    streams = {value for branch in kept for value in _sums_before(graph, branch)}
    inside = set[int]().union(*(branch.interior for branch in kept))
    sums = {branch.total for branch in kept}
    return [
        branch
        for branch in homeless
        if branch.total not in inside
        and (maps := [v for v in (graph.values[index] for index in branch.path) if v.weighted and "conv" not in v.op])
        and (
            (len(maps) > 1 and sums.isdisjoint(branch.path))  # no skip over whole layers
            or _attends(graph, branch, inside)
            or not streams.isdisjoint(forward(graph, branch.total))
        )
    ]


def _attends(graph: Graph, branch: Branch, claimed: set[int]) -> bool:
    return any(index not in claimed and is_attention(graph, graph.values[index]) for index in branch.path)


def only_homes_of_attentions(graph: Graph, layers: dict[Branch, Layer], kept: list[Branch]) -> list[Branch]:
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


def _is_nested(graph: Graph, branch: Branch, kept: list[Branch], layers: dict[Branch, Layer]) -> bool:
    same = (other for other in kept if layers[other].identity == layers[branch].identity)
    return any(_is_inside(graph, branch, other) and branch not in _beside(graph, other, kept) for other in same)


def _beside(graph: Graph, branch: Branch, kept: list[Branch]) -> list[Branch]:
    """Branches of another stream that runs beside a branch which looks at it, and goes on without that branch.

    So do two streams that look at each other in turns: sums on the one lie on the way from the other to its own sum.
    """
    own = {branch.stream, *branch.path}
    chains: list[list[Branch]] = []
    for other in kept:
        if other.total == branch.total or other.total not in branch.path or _projects(graph, other, branch):
            continue
        before = _sums_before(graph, other)
        chain = next((chain for chain in chains if any(link.total in before for link in chain)), None)
        if chain is not None:
            chain.append(other)
        elif own.isdisjoint(before):
            chains.append([other])
    return [link for chain in chains if _goes_on_beside(graph, branch, chain[-1].total) for link in chain]


def _projects(graph: Graph, other: Branch, branch: Branch) -> bool:
    """Whether all that a branch adds to its stream is a linear map of another's: what a router keeps from layer to
    layer is no stream of sublayers."""
    product = graph.values[see_through(graph, other.term)[-1].value]
    if not product.weighted:
        return False
    read = {seen.value for dep in product.deps if graph.values[dep].active for seen in see_through(graph, dep)}
    for value in tuple(read):
        for call, _ in graph.producers.get(value, ()):
            if is_norm(graph, call):
                read |= {seen.value for source in call.inputs.values() for seen in see_through(graph, source)}
    return not read.isdisjoint({branch.stream, *(seen.value for seen in see_through(graph, branch.skip))})


def _goes_on_beside(graph: Graph, branch: Branch, total: int) -> bool:
    """Whether something later than a branch starts from an earlier sum, or a module around the branch returns it."""
    owner = graph.owner(branch.total)
    around = {value for call in owner.chain() for value in call.outputs.values()}
    return any(
        value in around or any(user > branch.total for user in graph.values[value].users)
        for value in forward(graph, total)
    )


def _is_inside(graph: Graph, inner: Branch, outer: Branch) -> bool:
    """Whether a sum is inside the branch of another; not if that one only crosses another stream there, as in a
    reversible layer."""
    if inner.total == outer.total or inner.total not in outer.path:
        return False
    is_foreign = inner.stream != outer.stream and inner.stream not in outer.path
    return not (is_foreign and all_through(graph, outer, inner.total))


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
