"""What a survey may have missed, so that no model gets half of its sites in silence."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..core.site import Site
from .graph import Call, Graph
from .layers import Layer, Tree, is_checkpointed, parent_path, tree
from .residual import Branch, joined_otherwise
from .roles import is_attention
from .stream import forward


@dataclass(frozen=True, slots=True)
class Gaps:
    """What must be left alone, each with its reason, and what is wrong."""

    refused: tuple[str, ...]
    problems: tuple[str, ...]


def find_gaps(graph: Graph, layers: dict[Branch, Layer], refused: list[Layer], sites: list[Site]) -> Gaps:
    """Compare the sites with what ran: with layers built alike, with all attentions, with all layers of the model.

    `layers` has the branches that are sites; `refused` the layers of those that cannot be.
    """
    unclaimed, missed = _unclaimed_attentions(graph, layers, sites)
    found = list(layers.values())
    return Gaps(
        refused=(*unclaimed, *_in_no_layer(graph, layers, refused), *_unused(graph, layers), *_never_run(graph, found)),
        problems=(
            *_disagreements(graph, sites),
            *_without_sites(graph, found, refused),
            *missed,
            *_joined_otherwise(graph, layers),
        ),
    )


def _disagreements(graph: Graph, sites: list[Site]) -> Iterator[str]:
    """Layers of one stack that are built alike and yet have other roles than most of their siblings."""
    roles: dict[tuple[str, int], list[str]] = defaultdict(list)
    where: dict[tuple[str, int], Site] = {}
    for site in sites:
        roles[site.stack, site.layer].append(site.role)
        where[site.stack, site.layer] = site
    builds = {site.layer_path: _build(graph.model.get_submodule(site.layer_path)) for site in where.values()}
    keeping = {call.path for call in graph.calls if call.path in builds and _keeps_shape(graph, call)}
    siblings: dict[tuple[str, str, Tree, bool], list[tuple[str, int]]] = defaultdict(list)
    for key, site in where.items():
        build = (builds[site.layer_path], site.layer_path in keeping)
        siblings[site.stack, site.layer_class, *build].append(key)
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


def _without_sites(graph: Graph, layers: list[Layer], refused: list[Layer]) -> Iterator[str]:
    """Modules that ran and are built like layers next to them, and in which no branch was found."""
    known = {layer.path for layer in [*layers, *refused]}
    builds = {(layer.container, tree(layer.scope.module)) for layer in layers if layer.number is None}
    containers = {container for container, _ in builds}
    for call in {call.path: call for call in graph.calls if parent_path(call.path) in containers}.values():
        if (
            call.path not in known
            and (parent_path(call.path), tree(call.module)) in builds
            and _keeps_shape(graph, call)
        ):
            yield (
                f"layers that are built alike have the same sites; got none at `{call.path}` "
                f"({type(call.module).__name__})."
            )


def _keeps_shape(graph: Graph, call: Call) -> bool:
    """Whether a call returns something that can be added to what it takes: else it has no skip."""
    taken = {graph.values[value].shape for value in call.inputs.values()}
    return not taken.isdisjoint(graph.values[value].shape for value in call.outputs.values())


def _build(layer: nn.Module) -> Tree:
    """What may explain that two layers of one class have different sites: their modules, and switches of these."""
    switches = tuple(
        (f"{path}.{name}", str(value))
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, str)) and name != "training"
    )
    return tree(layer) + switches


def _unclaimed_attentions(graph: Graph, layers: dict[Branch, Layer], sites: list[Site]) -> tuple[list[str], list[str]]:
    """Layers with an attention that no residual sum takes up: those to refuse, and those that are a problem.

    A layer that changes the width of the stream has such an attention legitimately. Where no layer of a class has any
    attention that is added, its sum was missed.
    """
    claimed: set[int] = set().union(*(branch.interior for branch in layers))
    attending = {site.layer_class for site in sites if site.kind in ("self_attention", "cross_attention")}
    scopes = {layer.scope.index: layer.scope for layer in layers.values()}
    idle: dict[str, dict[str, None]] = defaultdict(dict)
    for scope in scopes.values():
        inside = graph.values[scope.start : scope.stop]
        if any(is_attention(graph, value) and value.index not in claimed for value in inside if value.users):
            idle[type(scope.module).__name__][f"`{scope.path}`"] = None
    refused = [
        f"{', '.join(paths)} ({name}): an attention whose result is not added to the stream it looks at"
        for name, paths in idle.items()
        if name in attending
    ]
    problems = [
        f"the attention of a layer is added to its stream; got one that is not at {', '.join(paths)} ({name})."
        for name, paths in idle.items()
        if name not in attending
    ]
    return refused, problems


def _joined_otherwise(graph: Graph, layers: dict[Branch, Layer]) -> Iterator[str]:
    """Layers that hand out what they computed from their stream beside the stream itself, joined by something else than
    a sum."""
    claimed: set[int] = set().union(*(branch.interior for branch in layers))
    for scope in {layer.scope.index: layer.scope for layer in layers.values()}.values():
        outputs = set(scope.outputs.values())
        for value in graph.values[scope.start : scope.stop]:
            if (
                value.index not in claimed
                and joined_otherwise(graph, value)
                and not outputs.isdisjoint(forward(graph, value.index))
            ):
                yield (
                    f"a layer adds what it computes to its stream; got `{value.op.removeprefix('aten.')}` in the "
                    f"forward of `{scope.path}` ({type(scope.module).__name__})."
                )


def _in_no_layer(graph: Graph, layers: dict[Branch, Layer], refused: list[Layer]) -> Iterator[str]:
    """What transformers checkpoints as a layer and has an attention, but no branch that was found."""
    claimed: set[int] = set().union(*(branch.interior for branch in layers))
    known = {layer.scope.index for layer in (*layers.values(), *refused)}
    idle: dict[str, dict[str, None]] = defaultdict(dict)
    for value in graph.values:
        if value.index in claimed or not value.users or not is_attention(graph, value):
            continue
        around = list(graph.owner(value.index).chain())
        home = next((call for call in around if is_checkpointed(call.module)), None)
        if home is not None and known.isdisjoint(call.index for call in around):
            idle[type(home.module).__name__][f"`{home.path}`"] = None
    for layer_class, paths in idle.items():
        yield f"{', '.join(paths)} ({layer_class}): an attention, and no sum that adds it to a stream"


def _unused(graph: Graph, layers: dict[Branch, Layer]) -> Iterator[str]:
    """Layers with weights whose results reach no output of the model: a sublayer that this machine leaves out."""
    used: set[int] = set()
    for value in graph.calls[0].outputs.values():
        used |= graph.ancestors(value, after=-1)
    claimed: set[int] = set().union(*(branch.interior for branch in layers))
    idle: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for scope in {layer.scope.index: layer.scope for layer in layers.values()}.values():
        inside = [value for value in graph.values[scope.start : scope.stop] if value.weighted and value.users]
        lost = (graph.owner(value.index) for value in inside if value.index not in used | claimed)
        names = tuple(dict.fromkeys(call.path.removeprefix(f"{scope.path}.") for call in lost))
        if names:
            idle[type(scope.module).__name__, *names][f"`{scope.path}`"] = None
    for (layer_class, *unused), paths in idle.items():
        yield f"{', '.join(paths)} ({layer_class}): nothing uses the results of {', '.join(unused)}"


def _may_be_layer(graph: Graph, path: str, module: nn.Module) -> bool:
    """Whether an item of a list, in which nothing ran, has several weights, as a layer has."""
    return (
        isinstance(graph.model.get_submodule(parent_path(path)), nn.ModuleList)
        and len(tree(module)) > 1
        and any(parameter.dim() > 1 for parameter in module.parameters())
        and not any(id(part) in graph.ran for part in module.modules())
    )


def _never_run(graph: Graph, layers: list[Layer]) -> Iterator[str]:
    """Lists of layers that the forward did not reach: their branches are unknown."""
    classes = {type(layer.scope.module) for layer in layers if layer.number is None}
    known = tuple(f"{layer.path}." for layer in layers)
    idle: dict[str, list[str]] = defaultdict(list)
    inside = "."
    for path, module in graph.model.named_modules():
        if id(module) in graph.ran or path.startswith(inside):
            continue
        is_layer = type(module) in classes or is_checkpointed(module)
        if is_layer or (not path.startswith(known) and _may_be_layer(graph, path, module)):
            idle[parent_path(path)].append(type(module).__name__)
            inside = f"{path}."
    for path, names in idle.items():
        yield (
            f"`{path}` ({len(names)} of {', '.join(sorted(set(names)))}): did not run in the probe; to adapt it, pass "
            "`example_inputs=` that reach it"
        )
