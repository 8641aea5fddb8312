"""What a branch is, and which linear maps in it play which role; found by following the data, not by names.

Queries, keys and values are what enters the attention's product, wherever they were projected; a fused projection
plays several roles, each with some of its output features.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..core.site import Kind, Projection
from .experts import find_experts
from .features import Features
from .graph import ATTENTIONS, Graph, Value
from .layers import tree
from .maps import LinearMap, find_maps, linear_shape
from .residual import Branch, nearest_products, see_through
from .taps import Reach

_OTHER_MIXERS = ("fft", "pool", "rnn", "lstm", "gru")
_POOLINGS = frozenset({"aten.mean", "aten.sum"})
_PICKS = ("pool", "mean", "cat", "slice", "select", "index", "view", "permute", "transpose", "unsqueeze", "squeeze")
_ACTIVATIONS = ("sigmoid", "silu", "gelu", "relu", "tanh", "erf", "softplus", "swish", "mish", "elu", "aten.exp.")

Roles = dict[str, tuple[Projection, ...]]


@dataclass(frozen=True, slots=True)
class Attention:
    """The product at the heart of an attention: the values that enter it, and the one that leaves it."""

    q: int
    k: int
    v: int
    out: int


@dataclass(frozen=True, slots=True)
class Source:
    """A linear map that a value is computed from, and which of its output features the value uses."""

    map: LinearMap
    features: Features


# -------------------------------------------------------------------- what the branch is


def find_kind(graph: Graph, branch: Branch, attentions: Sequence[Attention], *, on_map: bool) -> Kind:
    """Attention if queries meet keys under a softmax, else a mixer if tokens meet at all, else an MLP.

    `on_map` says that the branch is of a sum of feature maps.
    """
    if attentions:
        looks_at_itself = any(attention.k in branch.path for attention in attentions)
        if not looks_at_itself:
            looks_at_itself = any(_comes_from_same(graph, branch, attention.k) for attention in attentions)
        return "self_attention" if looks_at_itself else "cross_attention"
    values = [graph.values[index] for index in sorted(branch.interior)]
    recurrent = any(isinstance(graph.owner(value.index).module, nn.RNNBase) for value in values)
    if recurrent or any(value.bilinear or any(part in value.op for part in _OTHER_MIXERS) for value in values):
        return "mixer"
    if _scans_tokens(graph, values) or (on_map and _pools_places(graph, values)):
        return "mixer"
    convolutions = [value for value in values if _convolves_tokens(graph, value)]
    return "mixer" if convolutions and not _blurs_hidden_features(graph, values, convolutions) else "mlp"


def _comes_from_same(graph: Graph, branch: Branch, key: int) -> bool:
    """Whether keys are computed from what the stream was picked or pooled from: queries of fewer tokens."""
    whole: set[int] = set()
    todo = [branch.stream]
    while todo:
        index = todo.pop()
        value = graph.values[index]
        if index not in whole and value.active:
            whole.add(index)
            if any(part in value.op for part in _PICKS):
                todo.extend(value.deps)
    whole.discard(branch.stream)
    behind = graph.ancestors(key, after=min(whole) - 1) if whole else set()
    near = {index for index in behind if index in branch.interior}
    return any(not whole.isdisjoint(graph.values[index].deps) for index in near)


def _scans_tokens(graph: Graph, values: list[Value]) -> bool:
    """Whether tokens (B, D) are taken one by one out of (B, L, D): a recurrence that Python loops over."""
    picked = Counter(
        source.index
        for value in values
        if value.op == "aten.select" and value.active and len(value.shape) == 2
        for source in (graph.values[value.deps[0]],)
        if source.active and (source.shape[0], source.shape[-1]) == value.shape and len(source.shape) == 3
    )
    return any(count > 1 for count in picked.values())


def _pools_places(graph: Graph, values: list[Value]) -> bool:
    """Whether a branch on feature maps sums over places: a linear attention, or a gate for whole maps."""
    for value in values:
        if value.op not in _POOLINGS or not value.active or not value.deps:
            continue
        source = graph.values[value.deps[0]]
        products = [graph.values[index] for index in nearest_products(graph, source.index)]
        at = slice(1, 2) if any("conv" in product.op for product in products) else slice(-1, None)
        if products and value.shape[at] == source.shape[at]:
            return True
    return False


def _convolves_tokens(graph: Graph, value: Value) -> bool:
    return "conv" in value.op and any(size > 1 for kernel in _kernels(graph, value) for size in kernel.shape[2:])


def _kernels(graph: Graph, value: Value) -> list[Value]:
    return [graph.values[dep] for dep in value.deps if graph.values[dep].matrix and value.weighted]


def _blurs_hidden_features(graph: Graph, values: list[Value], convolutions: list[Value]) -> bool:
    """Whether this is an MLP with a convolution per channel between its two maps, which hierarchical models use, or
    after them.

    A short convolution next to a gate is a token mixer of its own.
    """
    first, last = convolutions[0].index, convolutions[-1].index
    depthwise = all(kernel.shape[1] == 1 for value in convolutions for kernel in _kernels(graph, value))
    maps = [value.index for value in values if value.weighted and "conv" not in value.op]
    if depthwise and len(maps) > 1 and maps[-1] < first:
        return True
    after = graph.descendants(first, within={value.index for value in values}) | {first}
    gated = any("glu" in value.op or (_is_gate(graph, value) and not after.issuperset(value.deps)) for value in values)
    return depthwise and not gated and bool(maps) and maps[0] < first and maps[-1] > last


def _is_gate(graph: Graph, value: Value) -> bool:
    return value.op == "aten.mul" and sum(graph.values[dep].active for dep in value.deps) > 1


def is_attention(graph: Graph, value: Value) -> bool:
    """Whether the value is what an attention makes of its values: fused, or the product with a softmax."""
    if any(part in value.op for part in ATTENTIONS):
        return value.floating and len(value.shape) > 2
    return value.bilinear and any(
        _is_softmax(graph, graph.values[seen.value]) for dep in value.deps for seen in see_through(graph, dep)
    )


def _is_softmax(graph: Graph, value: Value) -> bool:
    """Whether the value is a softmax, or one that is spelled out: exp(z - logsumexp(z))."""
    if value.op != "aten.exp" or not value.deps:
        return "softmax" in value.op
    shifted = graph.values[value.deps[0]]
    behind = (graph.values[seen.value].op for dep in shifted.deps for seen in see_through(graph, dep))
    return shifted.op == "aten.sub" and "aten.logsumexp" in behind


def find_attentions(graph: Graph, branch: Branch) -> list[Attention]:
    """The attention products of a branch: fused ones, and those spelled out as softmax(q k) v."""
    found: list[Attention] = []
    for index in sorted(branch.interior):
        value = graph.values[index]
        if any(part in value.op for part in ATTENTIONS) and len(value.deps) >= 3:
            q, k, v = value.deps[:3]
            found.append(Attention(q, k, v, index))
        elif _is_softmax(graph, value):
            found += _spelled_out(graph, branch, index)
    # A product with a learned position instead of a token is a bias of the scores, unless there is nothing else.
    between_tokens = [a for a in found if graph.values[a.q].data and graph.values[a.k].data]
    return between_tokens or found


def _spelled_out(graph: Graph, branch: Branch, softmax: int) -> Iterator[Attention]:
    scores = _nearest_products(graph, branch, softmax, lambda value: value.deps)
    outs = _nearest_products(graph, branch, softmax, lambda value: value.users)
    weights = graph.descendants(softmax, within=set(branch.interior)) | {softmax}
    for score in scores:
        q, k = [dep for dep in graph.values[score].deps if graph.values[dep].active][-2:]
        for out in outs:
            for v in graph.values[out].deps:
                if v not in weights and graph.values[v].active:
                    yield Attention(q, k, v, out)


def _nearest_products(
    graph: Graph, branch: Branch, start: int, neighbours: Callable[[Value], Iterable[int]]
) -> list[int]:
    """The first products of two activations on the ways from a value, up or down the branch."""
    found: list[int] = []
    seen: set[int] = set()
    todo = list(neighbours(graph.values[start]))
    while todo:
        index = todo.pop()
        if index in seen or index not in branch.interior or not graph.values[index].active:
            continue
        seen.add(index)
        if graph.values[index].bilinear:
            found.append(index)
        else:
            todo.extend(neighbours(graph.values[index]))
    return sorted(found)


# -------------------------------------------------------------------- which maps play which role


def find_projections(
    graph: Graph, branch: Branch, reach: Reach, kind: Kind, attentions: Sequence[Attention], *, width: int
) -> tuple[Roles, tuple[str, ...]]:
    """The linear maps of a branch whose output has that width, by role, and notes on what could not be told."""
    maps = _Maps(graph, branch, reach)
    if attentions:
        roles = maps.of_attentions(attentions)
    elif kind == "mlp":
        roles = maps.of_mlp(width)
    else:
        roles = {}
    clear, notes = _without_ambiguous(roles)
    experts = maps.experts(width) if kind == "mlp" else {}
    if roles:
        notes += maps.other_weights({part.path for parts in experts.values() for part in parts})
    found = {role: projections for role, sources in clear.items() if (projections := maps.describe(sources))}
    return found | experts, notes


class _Maps:
    """The linear maps inside one branch."""

    def __init__(self, graph: Graph, branch: Branch, reach: Reach) -> None:
        self._graph = graph
        self._branch = branch
        self._reach = reach
        self._at = find_maps(graph, branch, reach)

    def of_attentions(self, attentions: Sequence[Attention]) -> dict[str, list[Source]]:
        return {
            "q": self._behind(attention.q for attention in attentions),
            "k": self._behind(attention.k for attention in attentions),
            "v": self._behind(attention.v for attention in attentions),
            "o": self._after(attention.out for attention in attentions),
        }

    def of_mlp(self, width: int) -> dict[str, list[Source]]:
        down = [s for s in self._behind([self._branch.term]) if s.map.out_features == width]
        roles: dict[str, list[Source]] = {"up": [], "gate": [], "down": down}
        for source in down:
            up, gate = self._up_and_gate(source.map.input)
            roles["up"] += up
            roles["gate"] += gate
        return roles

    def describe(self, sources: list[Source]) -> tuple[Projection, ...]:
        """The sources as records; what several uses of one map add up to counts once."""
        uses: dict[tuple[str, str], list[Source]] = defaultdict(list)
        for source in sources:
            uses[source.map.key].append(source)
        found = {key: _projection(several) for key, several in uses.items()}
        idle = {
            (part.path, part.weight): part for projection in found.values() for part in self._idle_siblings(projection)
        }
        # The number of a projection is part of an adapter's keys: it must not depend on which experts happened to run.
        return tuple(sorted((found | idle).values(), key=_place_in_lists) if idle else found.values())

    def _idle_siblings(self, projection: Projection) -> Iterator[Projection]:
        """The same map of experts that got no token: items of the same list, built alike, that did not run at all."""
        parts = projection.path.split(".")
        for depth, part in enumerate(parts):
            container = self._reach.scope.module.get_submodule(".".join(parts[:depth]))
            if not isinstance(container, nn.ModuleList):
                continue
            built = tree(container.get_submodule(part))
            for other, item in container.named_children():
                if tree(item) == built and not any(id(part) in self._graph.ran for part in item.modules()):
                    yield replace(projection, path=".".join([*parts[:depth], other, *parts[depth + 1 :]]))

    def experts(self, width: int) -> Roles:
        """The projections of experts that modules of the branch hold in one parameter."""
        found: dict[str, list[Projection]] = {}
        for path, module in self._owners().items():
            for role, projection in find_experts(module, path, width).items():
                found.setdefault(role, []).append(projection)
        return {role: tuple(parts) for role, parts in found.items()}

    def other_weights(self, known: set[str]) -> tuple[str, ...]:
        """A note on weights that are no projection: convolutions, experts that are not understood."""
        owners = {path: type(module).__name__ for path, module in self._owners().items() if path not in known}
        return tuple(f"`{path}` ({name}) has weights that are no linear module" for path, name in owners.items())

    def _owners(self) -> dict[str, nn.Module]:
        """The modules that apply weights themselves, by path."""
        return {
            path: owner.module
            for index in sorted(self._branch.path)
            if self._graph.values[index].weighted and index not in self._at
            for owner in [self._graph.owner(index)]
            if linear_shape(owner.module) is None and (path := self._reach.path(owner)) is not None
        }

    def _behind(self, values: Iterable[int]) -> list[Source]:
        """The nearest maps that values are computed from."""
        found = [source for value in dict.fromkeys(values) for source in self._behind_one(value)]
        return list(dict.fromkeys(found))

    def _behind_one(self, start: int) -> Iterator[Source]:
        between = self._back_to_maps(start)
        for index in sorted(between):
            if index in self._at:
                yield Source(self._at[index], self._at[index].features(self._graph, between))

    def _back_to_maps(self, start: int) -> set[int]:
        """What a value is computed from, back to the nearest results of maps and with these."""
        found: set[int] = set()
        todo = [start]
        while todo:
            index = todo.pop()
            if index in self._branch.interior and index not in found:
                found.add(index)
                if index not in self._at:
                    todo.extend(self._graph.values[index].deps)
        return found

    def _after(self, values: Iterable[int]) -> list[Source]:
        """The nearest maps that take what is computed from values."""
        found: dict[int, Source] = {}
        seen: set[int] = set()
        todo = list(values)
        while todo:
            index = todo.pop()
            if index in seen or index not in self._branch.interior:
                continue
            seen.add(index)
            if index in self._at:
                found[index] = Source(self._at[index], self._at[index].features(self._graph, set()))
            else:
                todo.extend(self._graph.values[index].users)
        return [found[index] for index in sorted(found)]

    def _up_and_gate(self, start: int) -> tuple[list[Source], list[Source]]:
        """The maps whose product enters the last one: the gate is the one that passes an activation."""
        for index in sorted(self._back_to_maps(start), reverse=True):
            value = self._graph.values[index]
            operands = [dep for dep in value.deps if self._graph.values[dep].active]
            if value.op != "aten.mul" or len(operands) != 2:
                continue
            left, right = (self._behind([operand]) for operand in operands)
            if left and right and _are_disjoint(left, right):
                activated = [self._passes_activation(operand) for operand in operands]
                if activated == [True, False]:
                    return right, left
                if activated == [False, True]:
                    return left, right
        return self._behind([start]), []

    def _passes_activation(self, start: int) -> bool:
        between = (index for index in self._back_to_maps(start) if index not in self._at)
        return any(part in f"{self._graph.values[index].op}." for index in between for part in _ACTIVATIONS)


def _place_in_lists(projection: Projection) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in projection.path.split(".")]


def _projection(sources: list[Source]) -> Projection:
    used, features = sources[0].map, _all_features(sources)
    return Projection(
        path=used.path,
        weight=used.weight,
        in_features=used.in_features,
        out_features=used.out_features,
        rows=None if features is None or len(features) == used.out_features else _ranges(features),
        transposed=used.transposed,
    )


def _all_features(sources: Iterable[Source]) -> Features:
    parts = [source.features for source in sources]
    return None if None in parts else frozenset().union(*(part for part in parts if part is not None))


def _ranges(features: frozenset[int]) -> tuple[tuple[int, int], ...]:
    starts = sorted(feature for feature in features if feature - 1 not in features)
    stops = sorted(feature + 1 for feature in features if feature + 1 not in features)
    return tuple(zip(starts, stops, strict=True))


def _share(a: Features, b: Features) -> bool:
    return a is None or b is None or not a.isdisjoint(b)


def _are_disjoint(left: Iterable[Source], right: Sequence[Source]) -> bool:
    return not any(a.map.key == b.map.key and _share(a.features, b.features) for a in left for b in right)


def _without_ambiguous(roles: dict[str, list[Source]]) -> tuple[dict[str, list[Source]], tuple[str, ...]]:
    """Drop fused maps whose features could not be told apart: a role must not change what another role computes.

    A map that gives a role no feature does not play it (the latent of keys without rotary features). Two roles may
    share a map altogether (keys that are also values); then their features are the same.
    """
    users: dict[tuple[str, str], dict[str, Features]] = defaultdict(dict)
    for role, sources in roles.items():
        for key in dict.fromkeys(source.map.key for source in sources):
            users[key][role] = _all_features(source for source in sources if source.map.key == key)
    mixed = {key for key, uses in users.items() if _are_mixed(list(uses.values()))}
    clear = {
        role: [source for source in sources if source.map.key not in mixed and source.features != frozenset()]
        for role, sources in roles.items()
    }
    notes = tuple(
        f"`{weight or path.rpartition('.')[2]}` computes {', '.join(users[path, weight])}, "
        "and which of its output features is which could not be told"
        for path, weight in sorted(mixed)
    )
    return clear, notes


def _are_mixed(uses: list[Features]) -> bool:
    if len(uses) > 2 and all(use == uses[0] for use in uses):
        return True
    return any(_share(a, b) and a != b for place, a in enumerate(uses) for b in uses[:place])
