"""From the graph of one forward to the records of its sites, with all that went wrong."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..core.site import Kind, Projection, Site
from .axes import acts_across_tokens
from .channels import convolves, split_by_layout
from .gaps import find_gaps
from .graph import Graph
from .layers import Identity, Layer, place
from .projected import find_projected
from .residual import Branch, find_branches, see_through
from .roles import Roles, find_attentions, find_kind, find_projections
from .samples import batch_dim
from .stream import all_through, carried_on, find_stacks, only_homes_of_attentions, outside_layers
from .taps import Reach, Taps, find_taps


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
    branches = find_branches(graph)
    layers = place(graph, branches)
    kept = carried_on(graph, layers)
    projected = find_projected(graph, kept, layers)
    layers |= projected
    kept = [*kept, *projected]
    kept = sorted([*kept, *only_homes_of_attentions(graph, layers, kept)], key=lambda b: (b.total, b.term))
    homeless = outside_layers(graph, [branch for branch in branches if branch not in layers], kept)
    maps, left_alone = split_by_layout(graph, kept, layers)
    kept = [branch for branch in kept if branch not in left_alone]
    readings = _read(graph, kept, layers, maps)
    homes = {
        identity: (stack.name, number)
        for stack in find_stacks(graph, kept, layers)
        for number, identity in enumerate(stack.layers)
    }
    problems: list[str] = []
    # Streams that a layer mixes, convolutions around its layers: by themselves they are no layer's attention or MLP.
    refused: list[str] = []
    sites: list[Site] = []
    for identity, calls in readings.items():
        variants = [_sites_of_call(graph, call, homes[identity], problems, refused) for call in calls.values()]
        if any(variant != variants[0] for variant in variants):
            problems.append(
                "a layer that runs several times has the same sites each time; got different ones at "
                f"{next(iter(calls.values()))[0].layer.name}."
            )
        sites += variants[0]
    refused_layers = [layers[branch] for branch in left_alone]
    gaps = find_gaps(graph, {branch: layers[branch] for branch in kept}, refused_layers, sites)
    refused += [f"{layers[branch].name}: {reason}" for branch, reason in left_alone.items()]
    refused += [
        f"`{call.path}` ({type(call.module).__name__}): a sum outside of the lists of layers"
        for call in (graph.owner(branch.total) for branch in homeless)
    ]
    refused += _convolved(graph, layers, {*kept, *left_alone})
    if not kept:
        refused += [f"{layer.name}: a sum from which no later branch starts" for layer in layers.values()]
    return Survey(
        tuple(sites), tuple(dict.fromkeys([*refused, *gaps.refused])), tuple(dict.fromkeys([*problems, *gaps.problems]))
    )


def _convolved(graph: Graph, layers: dict[Branch, Layer], known: set[Branch]) -> Iterator[str]:
    """Layers around those of a Transformer whose sums are ended by something else than the next sum: a backbone's."""
    inside = set[int]().union(*(branch.interior for branch in known))
    sums = {branch.total for branch in known}
    idle: dict[str, dict[str, None]] = defaultdict(dict)
    for branch, layer in layers.items():
        # Nor is a skip over whole layers one of them.
        is_other = bool(sums) and branch.total not in inside | sums and sums.isdisjoint(branch.path)
        if is_other and convolves(graph, branch):
            idle[type(layer.scope.module).__name__][f"`{layer.path}`"] = None
    for layer_class, paths in idle.items():
        yield f"{', '.join(paths)} ({layer_class}): a sum that convolutions make, from which no later branch starts"


def _read(
    graph: Graph, kept: list[Branch], layers: dict[Branch, Layer], maps: set[Branch]
) -> dict[Identity, dict[int, list[_Reading]]]:
    """The readings of every layer, by the call in which they were taken; layers in order of execution."""
    found: dict[Identity, dict[int, list[_Reading]]] = defaultdict(lambda: defaultdict(list))
    reaches: dict[int, Reach] = {}
    for branch in sorted(kept, key=lambda branch: (branch.total, branch.term)):
        layer = layers[branch]
        if layer.scope.index not in reaches:
            reaches[layer.scope.index] = Reach(graph, layer)
        reach = reaches[layer.scope.index]
        local = branch.inside(max(layer.scope.start, _last_sum_inside(graph, branch, kept) + 1))
        attentions = find_attentions(graph, local)
        kind = find_kind(graph, _without_other_streams(graph, branch, local, kept), attentions, on_map=branch in maps)
        if kind == "mlp" and acts_across_tokens(graph, branch):
            kind = "mixer"
        taps = find_taps(graph, branch, reach, on_map=branch in maps)
        projections, notes = find_projections(graph, local, reach, kind, attentions, width=taps.width)
        reading = _Reading(branch, layer, taps, kind, projections, notes)
        found[layer.identity][layer.scope.index].append(reading)
    return found


def _without_other_streams(graph: Graph, branch: Branch, local: Branch, kept: list[Branch]) -> Branch:
    """The branch without what comes back to it from its stream by way of another stream only."""
    sums = {other.total for other in kept if other.total in branch.path}
    others = {total for total in sums if not all_through(graph, branch, total)}
    if not others:
        return local
    return replace(local, path=local.path & graph.descendants(branch.stream, within=set(branch.path) - others))


def _last_sum_inside(graph: Graph, branch: Branch, kept: list[Branch]) -> int:
    """The last sum that all of a branch passes through: in a reversible layer it is what the branch works on."""
    inside = [other.total for other in kept if other.total in branch.path and all_through(graph, branch, other.total)]
    return max(inside, default=-1)


def _sites_of_call(
    graph: Graph, readings: list[_Reading], home: tuple[str, int], problems: list[str], refused: list[str]
) -> list[Site]:
    stack, number = home
    sites = []
    counts: Counter[str] = Counter()
    for ordinal, reading in enumerate(readings, start=1):
        taps = reading.taps
        if taps.output is None and reading.kind == "mixer":
            refused.append(f"{reading.layer.name}: a mixer whose result no module of the layer returns")
            continue
        counts[reading.kind] += 1
        count = counts[reading.kind]
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
                width=taps.width,
                feature_dim=taps.feature_dim,
                arrangement=taps.arrangement,
                output=taps.output,
                stream=taps.stream,
                pre_norm=taps.pre_norm,
                post_norm=taps.post_norm,
                branch_norm=taps.branch_norm,
                same_layout=taps.same_layout,
                exact=taps.exact,
                dropped_later=taps.dropped_later,
                shared_sum=reading.branch.siblings > 0,
                handed_on=all(_takes_up(graph, reading, following) for following in readings[ordinal : ordinal + 1]),
                batch_dim=batch_dim(graph, reading.layer.scope, graph.values[reading.branch.total]),
                projections=reading.projections,
                notes=taps.notes + reading.notes,
            )
        )
    return list(_with_maps_of_their_own(sites))


def _with_maps_of_their_own(sites: list[Site]) -> Iterator[Site]:
    """The sites of one layer, each map at the first of those that use it: what changes a map changes it for all."""
    homes: dict[Projection, str] = {}
    for site in sites:
        own = {
            role: kept
            for role, parts in site.projections.items()
            if (kept := tuple(part for part in parts if homes.setdefault(part, site.role) == site.role))
        }
        shared = dict.fromkeys(homes[part] for parts in site.projections.values() for part in parts)
        notes = tuple(f"shares linear maps with {role}, where they are adapted" for role in shared if role != site.role)
        yield replace(site, projections=own, notes=site.notes + notes)


def _takes_up(graph: Graph, reading: _Reading, following: _Reading) -> bool:
    if reading.taps.post_norm is not None or reading.branch.total == following.branch.total:
        return True
    return any(
        seen.value == reading.branch.total and not seen.scaled and not seen.moved
        for value in (following.branch.stream, following.branch.skip)
        for seen in see_through(graph, value)
    )


def _unreachable(graph: Graph, reading: _Reading, role: str) -> str:
    owner = graph.owner(reading.branch.total)
    return (
        f"some module of a layer returns what the layer adds to its stream, once per call; got none for {role} of "
        f"{reading.layer.name}, which is added in the forward of `{owner.path}` ({type(owner.module).__name__})."
    )
