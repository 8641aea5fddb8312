"""Which module is the layer of a branch.

A layer is the nearest module that transformers itself checkpoints as one, else an item of a list of modules; where a
stage holds blocks, the blocks are the layers. A model that keeps its sublayers in parallel lists ("attentions.3",
"ffns.3") has layers that are no module of their own: their path is the module that runs them.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .graph import Call, Graph
from .residual import Branch, see_through

Identity = tuple[str, int | None]


@dataclass(frozen=True, slots=True)
class Layer:
    """The layer of one branch in one call of it."""

    path: str
    """Where the layer's module is; for a layer without a module, the one that runs it."""
    container: str
    """What its sibling layers have in common: the path of their list."""
    scope: Call
    """The call of `path` in which the branch ran."""
    number: int | None = None
    """Tells layers without a module apart; None for the others."""

    @property
    def identity(self) -> Identity:
        return self.path, self.number

    @property
    def name(self) -> str:
        """How messages call the layer."""
        return f"`{self.path}` ({type(self.scope.module).__name__})"


@dataclass(frozen=True, slots=True)
class _Level:
    """A module around a branch that may be its layer; `call` is None for a list that is an item of a list."""

    path: str
    call: Call | None


def place(graph: Graph, branches: list[Branch]) -> dict[Branch, Layer]:
    """The layer of every branch that is in one."""
    levels = {branch: _levels(graph, branch) for branch in branches}
    chosen = _choose([branch for branch in branches if levels[branch]], levels, graph)
    found = {branch: _layer_of_level(graph, branch, level) for branch, level in chosen.items()}
    for branch in branches:
        if not levels[branch]:
            layer = _listed_sublayers(graph, branch) or _repeated_class(graph, branch)
            if layer is not None:
                found[branch] = layer
    if not found:
        found = _single_layer(graph, branches)
    return _separate_runs({branch: found[branch] for branch in branches if branch in found})


# -------------------------------------------------------------------- modules around a branch


def _levels(graph: Graph, branch: Branch) -> list[_Level]:
    """Candidates for the layer, outermost first; from the nearest checkpointed module on, if there is one."""
    found: list[_Level] = []
    around = ""
    for call in reversed(list(graph.owner(branch.total).chain())):
        if _is_below(call.path, around):  # else it is shared, and known by another place in the tree
            found += [_Level(path, None) for path in _items(graph.model, around, call.path) if path != call.path]
        if _is_item(graph.model, call.path) or is_checkpointed(call.module):
            found.append(_Level(call.path, call))
        around = call.path
    starts = [depth for depth, level in enumerate(found) if level.call and is_checkpointed(level.call.module)]
    return found[starts[-1] :] if starts else found


def is_checkpointed(module: nn.Module) -> bool:
    """Whether transformers checkpoints the module as one layer."""
    layers: Any = sys.modules.get("transformers.modeling_layers")  # not loaded: then no module is of its classes
    return layers is not None and isinstance(module, layers.GradientCheckpointingLayer)


def _items(model: nn.Module, above: str, path: str) -> Iterator[str]:
    """The prefixes of a path below `above` that are items of a list of modules, shortest first."""
    parts = path.split(".") if path else []
    for stop in range(len(above.split(".")) + 1 if above else 1, len(parts) + 1):
        prefix = ".".join(parts[:stop])
        if _is_item(model, prefix):
            yield prefix


def _is_item(model: nn.Module, path: str) -> bool:
    return bool(path) and isinstance(
        model.get_submodule(parent_path(path)), (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    )


def _is_below(path: str, above: str) -> bool:
    return path != above and (not above or path.startswith(f"{above}."))


def parent_path(path: str) -> str:
    """The path of the module that holds the one at `path`."""
    return path.rpartition(".")[0]


def _choose(branches: list[Branch], levels: dict[Branch, list[_Level]], graph: Graph) -> dict[Branch, _Level]:
    """Of the modules around each branch the one that is its layer: stages are opened, sublayers are not."""
    chosen: dict[Branch, _Level] = {}
    todo = [(0, group) for group in _by_container(branches, 0, levels)]
    while todo:
        depth, group = todo.pop()
        inner = [branch for branch in group if _has_own_weights(graph, branch, levels[branch][depth + 1 :])]
        if _is_stage(graph, group, inner, levels, depth):
            todo += [(depth + 1, deeper) for deeper in _by_container(inner, depth + 1, levels)]
        else:
            chosen |= {branch: levels[branch][depth] for branch in group}
    return chosen


def _by_container(branches: list[Branch], depth: int, levels: dict[Branch, list[_Level]]) -> list[list[Branch]]:
    """Branches whose modules at this depth lie in the same list, or in equal lists of sibling stages."""
    groups: dict[str, list[Branch]] = defaultdict(list)
    for branch in branches:
        groups[list_pattern(parent_path(levels[branch][depth].path))].append(branch)
    return list(groups.values())


def list_pattern(path: str) -> str:
    """What the paths of equal lists in sibling stages have in common: their numbers do not count."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def _has_own_weights(graph: Graph, branch: Branch, inner: list[_Level]) -> bool:
    """Whether the next module around the branch holds its weights, and does not merely add what others compute."""
    if not inner:
        return False
    prefix = inner[0].path + "."
    weighted = [index for index in branch.path if graph.values[index].weighted]
    return all(graph.owner(index).path.startswith(prefix) for index in weighted)


def _is_stage(
    graph: Graph, group: list[Branch], inner: list[Branch], levels: dict[Branch, list[_Level]], depth: int
) -> bool:
    """Whether what looks like a layer is a stage that holds the layers.

    It is one if an inner item has two branches; or if every branch is in an inner item and these are all alike.
    """
    sums = Counter(
        (level.path, level.call.index if level.call else graph.owner(branch.total).index)
        for branch, level in {
            (branch.total, levels[branch][depth + 1].path): (branch, levels[branch][depth + 1]) for branch in inner
        }.values()
    )
    if any(count > 1 for count in sums.values()):
        return True
    items = {levels[branch][depth + 1].path for branch in inner}
    outer = Counter(parent_path(item) for item in items)
    alike = len({tree(graph.model.get_submodule(item)) for item in items}) == 1
    return len(inner) == len(group) and alike and max(outer.values(), default=0) > 1


Tree = tuple[tuple[str, str], ...]


def tree(module: nn.Module) -> Tree:
    """The names and classes of all modules below that hold parameters: what makes two layers alike."""
    return tuple((path, type(part).__name__) for path, part in module.named_modules() if part._parameters)


def _layer_of_level(graph: Graph, branch: Branch, level: _Level) -> Layer:
    if level.call is not None:
        return Layer(level.path, parent_path(level.path), level.call)
    around = next(call for call in graph.owner(branch.total).chain() if _is_below(level.path, call.path))
    return Layer(around.path, around.path, around, _number(level.path))


def _number(item: str) -> int:
    last = item.rpartition(".")[2]
    return int(last) if last.isdigit() else 0


# -------------------------------------------------------------------- branches that no list item encloses


def _listed_sublayers(graph: Graph, branch: Branch) -> Layer | None:
    """The layer of a loop over parallel lists of sublayers: it is told by the sublayer's place in its list."""
    owner = graph.owner(branch.total)
    returns = [
        call
        for seen in see_through(graph, branch.term)
        for call, _ in graph.producers.get(seen.value, ())
        if owner.encloses(call) and any(True for _ in call.module.parameters())  # not a dropout that all layers share
    ]
    computes = [graph.owner(index) for index in sorted(branch.path) if graph.values[index].weighted]
    sublayer = max(returns, key=lambda call: call.returned) if returns else computes[0] if computes else owner
    for item in _items(graph.model, owner.path, sublayer.path) if _is_below(sublayer.path, owner.path) else ():
        return Layer(owner.path, owner.path, owner, _number(item))
    return None


def _repeated_class(graph: Graph, branch: Branch) -> Layer | None:
    """The layer of a model that keeps its layers as attributes: a module that has a sibling of its own class."""
    for call in reversed(list(graph.owner(branch.total).chain())):
        if call.path:
            siblings = graph.model.get_submodule(parent_path(call.path)).children()
            if sum(type(sibling) is type(call.module) for sibling in siblings) > 1:
                return Layer(call.path, parent_path(call.path), call)
    return None


def _single_layer(graph: Graph, branches: list[Branch]) -> dict[Branch, Layer]:
    """The layer of a model that repeats no module: the innermost one around all branches, however often it runs."""
    chains = {branch: {call.path: call for call in graph.owner(branch.total).chain()} for branch in branches}
    common = [path for path in next(iter(chains.values()), {}) if all(path in chain for chain in chains.values())]
    return {branch: Layer(common[0], parent_path(common[0]), chain[common[0]]) for branch, chain in chains.items()}


def _separate_runs(layers: dict[Branch, Layer]) -> dict[Branch, Layer]:
    """Number the layers that are no module by the order in which they run: two loops of one module are not one."""
    found: dict[Branch, Layer] = {}
    run = 0
    previous: Layer | None = None
    for branch, layer in layers.items():
        if layer.number is None:
            found[branch] = layer
            continue
        same_scope = previous is not None and previous.scope is layer.scope
        run = run + (previous.number != layer.number) if previous is not None and same_scope else 0
        previous = layer
        found[branch] = replace(layer, number=run)
    return found
