"""From the graph of one forward to the records of its sites, with all that went wrong."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..core.site import Kind, Site
from .graph import Graph
from .layers import Layer, Tree, is_checkpointed, parent_path, place, tree
from .residual import Branch, find_branches, see_through
from .roles import Roles, find_attentions, find_kind, find_projections
from .stream import carried_on, find_stacks
from .taps import Reach, Taps, find_taps

Identity = tuple[str, int | None]


@dataclass(frozen=True, slots=True)
class Survey:
    """What one forward shows: the sites that hooks can reach, what they must leave alone, and what is wrong."""

    sites: tuple[Site, ...]
    refused: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Reading:
    """One branch in one call of its layer."""

    branch: Branch
    layer: Layer
    taps: Taps
    kind: Kind
    projections: Roles
    notes: tuple[str, ...]


def survey(graph: Graph) -> Survey:
    """Find the sites in a graph. Problems are collected, not raised."""
    layers = place(graph, find_branches(graph))
    kept = carried_on(graph, layers)
    channels_first = [branch for branch in kept if _is_channels_first(graph, branch)]
    kept = [branch for branch in kept if branch not in channels_first]
    readings = _read(graph, kept, layers)
    homes = {
        identity: (stack.name, number)
        for stack in find_stacks(graph, kept, layers)
        for number, identity in enumerate(stack.layers)
    }
    problems: list[str] = []
    sites: list[Site] = []
    for identity, calls in readings.items():
        variants = [_sites_of_call(graph, call, *homes[identity], problems) for call in calls.values()]
        if any(variant != variants[0] for variant in variants):
            problems.append(
                "a layer that runs several times has the same sites each time; got different ones at "
                f"{_name(next(iter(calls.values()))[0].layer)}."
            )
        sites += variants[0]
    problems = list(dict.fromkeys(problems))
    problems += _disagreements(graph, sites)
    refused = [
        f"{_name(layers[branch])}: a sum of feature maps, whose features are not the last dimension"
        for branch in channels_first
    ]
    refused += _never_run(graph, [layers[branch] for branch in kept])
    return Survey(tuple(sites), tuple(dict.fromkeys(refused)), tuple(problems))


def _read(graph: Graph, kept: list[Branch], layers: dict[Branch, Layer]) -> dict[Identity, dict[int, list[_Reading]]]:
    """The readings of every layer, by the call in which they were taken; layers in order of execution."""
    found: dict[Identity, dict[int, list[_Reading]]] = defaultdict(lambda: defaultdict(list))
    reaches: dict[int, Reach] = {}
    for branch in sorted(kept, key=lambda branch: (branch.total, branch.term)):
        layer = layers[branch]
        reach = reaches.setdefault(layer.scope.index, Reach(graph, layer))
        attentions = find_attentions(graph, branch)
        kind = find_kind(graph, branch, attentions)
        projections, notes = find_projections(graph, branch, reach, kind, attentions)
        reading = _Reading(branch, layer, find_taps(graph, branch, reach), kind, projections, notes)
        found[layer.identity][layer.scope.index].append(reading)
    return found


def _sites_of_call(graph: Graph, readings: list[_Reading], stack: str, number: int, problems: list[str]) -> list[Site]:
    sites = []
    counts: Counter[str] = Counter()
    for reading in readings:
        counts[reading.kind] += 1
        count, taps = counts[reading.kind], reading.taps
        role = reading.kind if count == 1 else f"{reading.kind}_{count}"
        if taps.output is None:
            problems.append(_unreachable(graph, reading, role))
            continue
        sites.append(
            Site(
                stack=stack,
                layer=number,
                role=role,
                kind=reading.kind,
                layer_path=reading.layer.path,
                layer_class=type(reading.layer.scope.module).__name__,
                width=graph.values[reading.branch.total].shape[-1],
                arrangement=taps.arrangement,
                output=taps.output,
                stream=taps.stream,
                pre_norm=taps.pre_norm,
                post_norm=taps.post_norm,
                branch_norm=taps.branch_norm,
                same_layout=taps.same_layout,
                exact=taps.exact,
                shared_sum=reading.branch.siblings > 0,
                projections=reading.projections,
                notes=taps.notes + reading.notes,
            )
        )
    return sites


def _name(layer: Layer) -> str:
    return f"`{layer.path}` ({type(layer.scope.module).__name__})"


def _unreachable(graph: Graph, reading: _Reading, role: str) -> str:
    owner = graph.owner(reading.branch.total)
    return (
        f"some module of a layer returns what the layer adds to its stream, once per call; got none for {role} of "
        f"{_name(reading.layer)}, which is added in the forward of `{owner.path}` ({type(owner.module).__name__})."
    )


def _is_channels_first(graph: Graph, branch: Branch) -> bool:
    """Whether the features that the branch's last weight makes are the second dimension of the sum, not the last."""
    weighted = [index for index in branch.path if graph.values[index].weighted]
    shape = graph.values[branch.total].shape
    if not weighted or len(shape) < 3:
        return False
    last = graph.values[max(weighted)]
    moved = see_through(graph, branch.term)[-1].moved
    if "conv" in last.op:
        return last.shape[1] == shape[1] and (not moved or shape[1] != shape[-1])
    return last.shape[-1] == shape[1] and (shape[1] != shape[-1] or (moved and len(shape) > 3))


def _disagreements(graph: Graph, sites: list[Site]) -> Iterator[str]:
    """Layers of one stack that are built alike and yet have other roles than most of their siblings."""
    roles: dict[tuple[str, int], list[str]] = defaultdict(list)
    where: dict[tuple[str, int], Site] = {}
    for site in sites:
        roles[site.stack, site.layer].append(site.role)
        where[site.stack, site.layer] = site
    builds = {site.layer_path: _build(graph.model.get_submodule(site.layer_path)) for site in where.values()}
    siblings: dict[tuple[str, str, Tree], list[tuple[str, int]]] = defaultdict(list)
    for key, site in where.items():
        siblings[site.stack, site.layer_class, builds[site.layer_path]].append(key)
    for members in siblings.values():
        usual, _ = Counter(tuple(roles[key]) for key in members).most_common(1)[0]
        for key in members:
            if tuple(roles[key]) != usual:
                site = where[key]
                yield (
                    f"layers that are built alike have the same sites; got {', '.join(roles[key])} at "
                    f"`{site.layer_path}` ({site.layer_class}, layer {site.layer} of {site.stack}) where its siblings "
                    f"have {', '.join(usual)}."
                )


def _build(layer: nn.Module) -> Tree:
    """What may explain that two layers of one class have different sites: their modules, and switches of these."""
    switches = tuple(
        (f"{path}.{name}", str(value))
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, str)) and name != "training"
    )
    return tree(layer) + switches


def _never_run(graph: Graph, layers: list[Layer]) -> Iterator[str]:
    """Lists of layers that the forward did not reach: their branches are unknown."""
    classes = {type(layer.scope.module) for layer in layers if layer.number is None}
    ran = {id(call.module) for call in graph.calls}
    idle: dict[str, list[str]] = defaultdict(list)
    inside = "."
    for path, module in graph.model.named_modules():
        if id(module) in ran or path.startswith(inside):
            continue
        if type(module) in classes or is_checkpointed(module):
            idle[parent_path(path)].append(type(module).__name__)
            inside = f"{path}."
    for path, names in idle.items():
        yield (
            f"`{path}` ({len(names)} of {', '.join(sorted(set(names)))}): did not run in the probe; to adapt it, pass "
            "`example_inputs=` that reach it"
        )
