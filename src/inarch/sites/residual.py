"""Residual branches, found by what they are: a sum in which one operand is computed from another through a weight.

Pre-norm, post-norm, layer scales, parallel sublayers and a residual that is added deep inside the attention are all the
same to this definition; rotary embeddings, biases and attention masks are not branches by it.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .graph import PARAMETER, Call, Graph, Value

SUM = "aten.add"
_SCALES = frozenset({"aten.div", "aten.masked_fill", "aten.mul", "aten.neg", "aten.where"})
_COPIES = frozenset(
    {
        "aten._to_copy", "aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.lift_fresh",
        "aten.native_dropout", "aten.to",
    }
)  # fmt: skip
_RESHAPES = frozenset(
    {"aten._reshape_alias", "aten._unsafe_view", "aten.reshape", "aten.squeeze", "aten.unsqueeze", "aten.view"}
)
_MOVES = frozenset(
    {
        "aten.constant_pad_nd", "aten.expand", "aten.flip", "aten.index", "aten.permute", "aten.roll", "aten.select",
        "aten.slice", "aten.split", "aten.split_with_sizes", "aten.t", "aten.transpose", "aten.unbind",
    }
)  # fmt: skip
_JOIN = "aten.cat"
_WRITES = frozenset({"aten.index_put", "aten.masked_scatter"})
_MIX = "aten.bmm"
_JOINS = frozenset({"aten.addcdiv", "aten.lerp", "aten.sub", "aten.sum"})
"""What two tensors of one shape become one by, and no sum of the two; the last where they were stacked."""
_GATES = frozenset({"aten._softmax", "aten.rsub", "aten.sigmoid"})
"""What gates between 0 and 1 come from; `1 - gate` is one too."""
_MIXERS_WITHOUT_WEIGHT = ("fft", "pool")


@dataclass(frozen=True, slots=True)
class Seen:
    """A value behind another one: what it was before scales, casts and changes of layout."""

    value: int
    scaled: bool = False
    moved: bool = False
    """Whether elements were reordered, dropped or repeated on the way; a mere reshape does none of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One branch of a residual sum: `total = ... + skip + ... + term + ...`, all of them values of the graph."""

    total: int
    skip: int
    stream: int
    """`skip` behind its scales: what the branch is computed from."""
    term: int
    path: frozenset[int]
    """What lies between stream and term: computed from the one, and the other computed from it."""
    interior: frozenset[int]
    """All that the term is computed from after the stream was there; in a cross-attention more than `path`."""
    siblings: int = 0
    """How many more branches the sum has."""
    shifted: bool = False
    """Whether the sum has operands that are neither the skip nor a branch, such as a bias."""

    def inside(self, start: int) -> "Branch":
        """The branch without what came about before `start`."""
        path = frozenset(index for index in self.path if index >= start)
        return replace(self, path=path, interior=frozenset(index for index in self.interior if index >= start))


def see_through(graph: Graph, index: int) -> list[Seen]:
    """The value itself, then what it was before each scale, cast and change of layout, nearest first."""
    chain = [Seen(index)]
    while (step := _step(graph, chain[-1])) is not None:
        chain.append(step)
    return chain


def _step(graph: Graph, seen: Seen) -> Seen | None:
    value = graph.values[seen.value]
    if value.op in _COPIES or value.op in _RESHAPES or value.op in _MOVES:
        source = _only_source(graph, value)
        return None if source is None else Seen(source, seen.scaled, seen.moved or value.op in _MOVES)
    if value.op in _SCALES or _adds_bias(graph, value):
        source = _scaled_source(graph, value)
        return None if source is None else Seen(source, True, seen.moved)
    if value.op == _JOIN:
        source = _main_part(graph, value)
        return None if source is None else Seen(source, seen.scaled, True)
    if value.op in _WRITES:  # some tokens were replaced: the others are what they were
        return Seen(value.deps[0], seen.scaled, True) if graph.values[value.deps[0]].active else None
    if value.op == _MIX:
        source = _mixed_streams(graph, value)
        return None if source is None else Seen(source, True, True)
    return None


def _adds_bias(graph: Graph, value: Value) -> bool:
    deps = [graph.values[dep] for dep in value.deps]
    return value.op == SUM and any(dep.op == PARAMETER and len(dep.shape) == 1 for dep in deps)


def _only_source(graph: Graph, value: Value) -> int | None:
    active = [dep for dep in value.deps if graph.values[dep].active]
    floating = [dep for dep in value.deps if graph.values[dep].floating and graph.values[dep].op != PARAMETER]
    sources = dict.fromkeys(active or floating)
    return next(iter(sources)) if len(sources) == 1 else None


def _scaled_source(graph: Graph, value: Value) -> int | None:
    """The operand that a scale, a mask or a gate per token is applied to."""
    source = _only_source(graph, value)
    if source is not None or len(value.deps) != 2:
        return source
    left, right = (graph.values[dep] for dep in value.deps)
    if left.numel == 1 or right.numel == 1:
        return right.index if left.numel == 1 else left.index
    if left.shape[-1:] == right.shape[-1:] or 1 not in (left.shape[-1], right.shape[-1]):
        return None
    gated, gate = (left, right) if right.shape[-1] == 1 else (right, left)
    # A gate that is computed from what it is applied to is the reciprocal of a norm.
    return None if gated.index in graph.ancestors(gate.index, after=gated.index - 1) else gated.index


def _main_part(graph: Graph, value: Value) -> int | None:
    """Of joined parts the one that makes up most of the whole: the patches beside a class token."""
    parts = list(dict.fromkeys(value.deps))
    if len(parts) > 1:
        parts = [part for part in parts if 2 * graph.values[part].numel > value.numel]
    return parts[0] if len(parts) == 1 and graph.values[parts[0]].active else None


def _mixed_streams(graph: Graph, value: Value) -> int | None:
    """The streams that a small matrix per token mixes: hyper-connections. A product with attention scores is none."""
    if len(value.deps) != 2 or not value.bilinear:
        return None
    matrix, streams = (graph.values[dep] for dep in value.deps)
    if matrix.shape[-1:] != matrix.shape[-2:-1] or streams.shape != value.shape:
        return None
    nearest = nearest_products(graph, matrix.index)
    return streams.index if nearest and not any(graph.values[index].bilinear for index in nearest) else None


def nearest_products(graph: Graph, start: int) -> list[int]:
    """The products that a value is computed from, without going behind them."""
    found: list[int] = []
    seen: set[int] = set()
    todo = [start]
    while todo:
        index = todo.pop()
        if index in seen:
            continue
        seen.add(index)
        value = graph.values[index]
        if value.weighted or value.bilinear:
            found.append(index)
        else:
            todo.extend(value.deps)
    return found


def find_branches(graph: Graph) -> list[Branch]:
    """All residual branches of the graph, whatever they belong to, in the order of their sums."""
    found: list[Branch] = []
    by_owner: dict[str, list[Branch]] = defaultdict(list)
    for value in graph.values:
        if value.op == SUM and value.floating and len(value.shape) >= 2 and _is_whole_sum(graph, value):
            branches = _branches_of(graph, value, by_owner[graph.owner(value.index).path])
            found += branches
            by_owner[graph.owner(value.index).path] += branches
    return found


def _is_whole_sum(graph: Graph, value: Value) -> bool:
    """Whether the value is not itself a partial sum of another."""
    users = set(value.users)
    return not (
        len(users) == 1
        and graph.values[min(users)].op == SUM
        and value.index not in _operands(graph, graph.values[min(users)])
    )


def _operands(graph: Graph, total: Value) -> list[int]:
    """The operands of a sum of sums. A partial sum that some module inside the owner returns counts as one operand."""
    owner = graph.owner(total.index)

    def split(value: Value) -> Iterator[int]:
        parts = [graph.values[dep] for dep in value.deps]
        if (
            value.op != SUM
            or len(parts) != 2
            or any(part.numel != value.numel or not _is_live(part) for part in parts)
            or (value is not total and (len(set(value.users)) > 1 or _returned_inside(graph, value, owner)))
        ):
            yield value.index
        else:
            for part in parts:
                yield from split(part)

    return list(split(total))


def _is_live(value: Value) -> bool:
    return value.floating and value.op != PARAMETER


def _returned_inside(graph: Graph, value: Value, owner: Call) -> bool:
    return any(owner.encloses(call) for call, _ in graph.producers.get(value.index, ()))


def _branches_of(graph: Graph, total: Value, earlier: list[Branch]) -> list[Branch]:
    operands = _operands(graph, total)
    if len(operands) < 2:
        return []
    best: list[Branch] = []
    for skip in operands:
        found = _branches_over(graph, total, skip, operands)
        if len(found) > len(best):
            best = found
    if not best:
        return _weighed_branch(graph, total, operands)
    best += _branches_from_earlier(graph, total, best, operands, earlier)
    shifted = len(best) + 1 < len(operands)
    best = [part for branch in best for part in _split_behind_scale(graph, branch)]
    best.sort(key=lambda branch: branch.term)
    return [replace(branch, siblings=len(best) - 1, shifted=shifted) for branch in best]


def _branches_over(graph: Graph, total: Value, skip: int, operands: list[int]) -> list[Branch]:
    """The branches of a sum if `skip` is its stream, seen through as few scales as possible."""
    for seen in see_through(graph, skip):
        found = [_branch(graph, total, skip, seen.value, term) for term in operands if term != skip]
        branches = [branch for branch in found if branch is not None]
        if branches:
            return branches
    return []


def _branch(graph: Graph, total: Value, skip: int, stream: int, term: int) -> Branch | None:
    interior = graph.ancestors(term, after=stream)
    if not any(stream in graph.values[index].deps for index in interior):
        return None
    path = graph.descendants(stream, within=interior)
    values = (graph.values[index] for index in path)
    if not any(v.weighted or any(part in v.op for part in _MIXERS_WITHOUT_WEIGHT) for v in values):
        return None
    return Branch(total.index, skip, stream, term, frozenset(path), frozenset(interior))


def _weighed_branch(graph: Graph, total: Value, operands: list[int]) -> list[Branch]:
    """The branch of a sum that weighs it against its stream feature by feature: `gate * x + other gate * h`.

    Skip and term are what the gates are applied to.
    """
    weighed = [_weighed(graph, graph.values[operand]) for operand in operands]
    sources = [source for source in weighed if source is not None]
    if len(sources) != 2 or len(operands) != 2:
        return []
    found = [_branch(graph, total, skip, skip, term) for skip, term in (sources, sources[::-1])]
    return [replace(branch, shifted=True) for branch in found if branch is not None][:1]


def _weighed(graph: Graph, product: Value) -> int | None:
    """What a gate is applied to, in a product of the two."""
    if product.op != "aten.mul" or len(set(product.deps)) != 2:
        return None
    others = [dep for dep in product.deps if not _is_gate(graph, dep)]
    return others[0] if len(others) == 1 and graph.values[others[0]].active else None


def _is_gate(graph: Graph, index: int) -> bool:
    return any(graph.values[seen.value].op in _GATES for seen in see_through(graph, index) if not seen.scaled)


def _branches_from_earlier(
    graph: Graph, total: Value, found: list[Branch], operands: list[int], earlier: list[Branch]
) -> list[Branch]:
    """Operands that are computed from an earlier point of the stream than the one they are added to."""
    skip = found[0].skip
    taken = {skip, *(branch.term for branch in found)}
    more = []
    for term in operands:
        if term in taken or not graph.values[term].active:
            continue
        for before in reversed(earlier):
            branch = _branch(graph, total, skip, before.total, term) if before.total < term else None
            if branch is not None:
                more.append(branch)
                break
    return more


def _split_behind_scale(graph: Graph, branch: Branch) -> list[Branch]:
    """The branches of `x + scale * (a + b)`, unless a module returns the sum of a and b: then it is one."""
    chain = see_through(graph, branch.term)
    inner = graph.values[chain[-1].value]
    if inner.op != SUM or any(graph.producers.get(seen.value) for seen in chain):
        return [branch]
    total = graph.values[branch.total]
    parts = [_branch(graph, total, branch.skip, branch.stream, part) for part in _operands(graph, inner)]
    branches = [part for part in parts if part is not None]
    return branches if len(branches) > 1 else [branch]


def joined_otherwise(graph: Graph, value: Value) -> bool:
    """Whether a value would have a branch if what joins its operands were a sum."""
    if value.op not in _JOINS or not value.active or len(value.shape) < 2:
        return False
    if value.op == "aten.sum":
        stacked = graph.values[value.deps[0]]
        operands = list(dict.fromkeys(stacked.deps)) if stacked.op == "aten.stack" else []
    else:
        operands = list(dict.fromkeys(value.deps[:2]))
    operands = [one for one in operands if graph.values[one].active and graph.values[one].numel == value.numel]
    found = (branch for skip in operands for branch in _branches_over(graph, value, skip, operands))
    # Without its average, which has no weight, a series goes on as it is.
    return any(graph.values[index].weighted for branch in found for index in branch.path)
