"""What attaching and activating would do, as plain data: no tensor is made, nothing is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .bank import module_key
from .compose import (
    BLOCKS,
    Average,
    BatchSplit,
    Block,
    Fuse,
    MultiTask,
    Parallel,
    Setup,
    Split,
    cases,
    check_nesting,
    fusions,
    last,
    leaves,
    names,
    walk,
)
from .core.config import Config
from .core.errors import ConfigError, SetupError
from .core.site import Site, Sites
from .core.symbols import Expr, symbol
from .core.table import render
from .core.wiring import Settled, layer_output
from .methods import (
    AbstractMethod,
    AdapterConfig,
    LinearMethod,
    Placement,
    SublayerMethod,
    layer_number,
    method_of,
    placements,
)
from .programs import check_circuits, circuit_of, circuit_site, rewire, wired_adapter

X, H, OTHERS = symbol("x"), symbol("h"), symbol("g")
SCALE = "s"
"""What a scale of the layer is called in formulas."""


@dataclass(frozen=True, slots=True)
class Formula:
    """What one site computes: y of the stream x, the branch output h, g, other branches of the same sum, and s, a scale
    of the layer behind the place where h appears."""

    pretrained: Expr
    adapted: Expr
    at_zero: Expr
    """`adapted` with every adapter branch zero."""
    reads_stream: bool
    reads_others: bool
    passes_norm: bool
    """Whether the adapter ends behind the norm after the sum."""


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One module of one adapter."""

    adapter: str
    config: Config
    placement: Placement
    layer: int
    """The layer's number through all stacks."""

    @property
    def method(self) -> str:
        return method_of(self.config).name

    def formula(self) -> str:
        """What its place computes with it, where that is no sum."""
        return method_of(self.config).formula(self.config, self.placement)

    @property
    def key(self) -> str:
        """Its place in an adapter file: site, method and role."""
        return f"{self.placement.site.key}.{module_key(self.method, self.placement)}"

    def sketch(self) -> nn.Module:
        """The module on the meta device. Raises `ConfigError` if it cannot be made."""
        with torch.device("meta"):
            return method_of(self.config)(self.config, self.placement, self.layer)

    @property
    def num_parameters(self) -> int:
        """Counted when it is asked for, so that adding an adapter makes its modules once, not twice."""
        return sum(parameter.numel() for parameter in self.sketch().parameters())


@dataclass(frozen=True, slots=True)
class Plan:
    """Every module of some adapters, and the formula of every site under a setup. Prints as a table."""

    modules: tuple[PlannedModule, ...]
    formulas: Mapping[str, Mapping[Setup, Formula]]
    """By site key and case of the setup; sites and cases whose sum no adapter touches are left out."""

    @property
    def num_parameters(self) -> int:
        """The parameters of all modules, what several share counted once."""
        return sum(self._counts())

    def __str__(self) -> str:
        rows = [
            (module.adapter, module.key, module.placement.port, count, self._formulas_of(module))
            for module, count in zip(self.modules, self._counts(), strict=True)
        ]
        return render(("adapter", "module", "port", "parameters", "formula"), rows)

    def _counts(self) -> list[int]:
        """The parameters of each module; those that an adapter's modules share count at the first."""
        known: dict[tuple[str, str], dict[Any, Any]] = {}
        counts = []
        for module in self.modules:
            sketch = module.sketch()
            if isinstance(sketch, AbstractMethod):
                sketch.share(known.setdefault((module.adapter, module.method), {}))
            counts.append(sum(parameter.numel() for parameter in sketch.parameters()))
        return counts

    def _formulas_of(self, module: PlannedModule) -> str:
        """What its site computes, in the cases in which its adapter acts."""
        if module.placement.port == "stream":
            return module.formula()
        if module.placement.port not in ("sublayer", "fusion"):
            return ""
        at = self.formulas.get(module.placement.site.key, {})
        return "; ".join(f"y = {formula.adapted}" for case, formula in at.items() if module.adapter in names(case))


def plan(sites: Sites, adapters: Mapping[str, AdapterConfig], setup: Setup | None = None) -> Plan:
    """The modules these adapters have on these sites, and the formulas under the setup.

    Raises `ConfigError` if a configuration asks for what the model does not have, `SetupError` for a composition that
    cannot run.
    """
    modules = [
        PlannedModule(name, part, placement, layer_number(placement.site, sites))
        for name, config in adapters.items()
        for part in config.parts
        for placement in placements(part, sites)
    ]
    _check_sums(modules)
    formulas = {}
    if setup is not None:
        check_setup(setup, modules)
        at = sublayer_sites(modules)
        for site in sites:
            present = {name: adapters[name] for name in names(setup) if site.key in at.get(name, ())}
            found = {case: one for case in cases(setup) if (one := formula(site, case, present)) is not None}
            if found:
                formulas[site.key] = found
    return Plan(tuple(modules), formulas)


def check_setup(setup: Setup, modules: Sequence[PlannedModule]) -> None:
    """Raise `SetupError` for blocks that have no meaning where the adapters in them are."""
    check_nesting(setup)
    fused = {block.name for block in fusions(setup)}
    for block in walk(setup):
        inside = [module for module in modules if module.adapter in block.names() and module.adapter not in fused]
        for module in inside:
            _check_block(block, module)
        if isinstance(block, Fuse):
            _check_fuse(block, inside, modules)
        if isinstance(block, BatchSplit | Split | Parallel | MultiTask):
            for module in inside:
                _check_experts(block, module)
        if isinstance(block, Average):
            _check_inputs(block, inside)


def _check_block(block: Block, module: PlannedModule) -> None:
    method, name = method_of(module.config), type(block).__name__
    rule = method.obstacle_to_block(module.config, module.placement, name)
    if rule:
        others = [other for other in BLOCKS if not method.obstacle_to_block(module.config, module.placement, other)]
        raise SetupError(
            f"{rule}; got `{module.method}` of `{module.adapter}` at `{module.key}` in a `{name}`. Compose it by "
            f"{', '.join(f'`{other}`' for other in others)}, or leave that place out."
        )


def _check_fuse(block: Fuse, inside: Sequence[PlannedModule], modules: Sequence[PlannedModule]) -> None:
    sites = {
        child: {module.placement.site.key for module in inside if module.adapter == last(child)}
        for child in block.children
    }
    sites[block.name] = {module.placement.site.key for module in modules if module.adapter == block.name}
    for child, found in sites.items():
        odd = sorted(found ^ next(iter(sites.values())))
        if odd:
            raise SetupError(
                f"The children of a `Fuse` and its fusion layers are at the same sites; got `{odd[0]}` for only one of "
                f"`{block.children[0]}` and `{child}` in {block}. Fuse adapters of one configuration, and make the "
                "layers with `add_fusion`."
            )


def _check_experts(block: Block, module: PlannedModule) -> None:
    placement = module.placement
    if placement.port != "linear":
        return
    path = placement.projection.path
    if any("expert" in part for part in path.split(".")):
        raise SetupError(
            f"A `{type(block).__name__}` cuts what holds whole samples; got `{path}` for `{module.key}` of "
            f"`{module.adapter}`, an expert that sees some of the tokens. Leave that projection out."
        )


def _check_inputs(block: Average, inside: Sequence[PlannedModule]) -> None:
    """A projection's input can be averaged where all that the adapters do is change it."""
    places: dict[tuple[str, str, int], set[tuple[str, bool, bool]]] = {}
    for module in inside:
        placement = module.placement
        method = method_of(module.config)
        if placement.port == "linear" and issubclass(method, LinearMethod):
            key = (placement.site.key, placement.role, placement.part)
            changes = method.changes(module.config, placement)
            places.setdefault(key, set()).add((module.adapter, "input" in changes, "output" in changes))
    for key, found in places.items():
        if any(on_input for _, on_input, _ in found) and any(on_output for _, _, on_output in found):
            raise SetupError(
                "In an `Average`, adapters of one projection all change its input or all its output; got both of "
                f"{', '.join(sorted({f'`{name}`' for name, _, _ in found}))} at `{key[1]}` of `{key[0]}` in {block}. "
                "Average adapters of one method."
            )


def _check_sums(modules: list[PlannedModule]) -> None:
    """Raise `ConfigError` for an adapter with two methods in one sum."""
    taken: dict[tuple[str, str], str] = {}
    for module in modules:
        place = (module.adapter, module.placement.site.key)
        if module.placement.port == "sublayer" and taken.setdefault(place, module.method) != module.method:
            raise ConfigError(
                f"One method of an adapter plugs into a sum; got `{taken[place]}` and `{module.method}` at site "
                f"`{place[1]}`. Leave the site out of one of them with `leave_out_roles`, or add two adapters."
            )


def sublayer_sites(modules: list[PlannedModule]) -> dict[str, set[str]]:
    """By adapter, the keys of the sites whose sum it touches."""
    found: dict[str, set[str]] = {}
    for module in modules:
        if module.placement.port == "sublayer":
            found.setdefault(module.adapter, set()).add(module.placement.site.key)
    return found


def formula(site: Site, setup: Setup, configs: Mapping[str, AdapterConfig]) -> Formula | None:
    """The formula of one site, where `configs` are the adapters present there; None if none touches the sum.

    The function that runs in the forward is run here on symbols.
    """
    wired = {name: part for name in leaves(setup) if name in configs and (part := sublayer_part(configs[name], site))}
    if not wired:
        return None
    branches = {name: _Symbols(str(n) if len(wired) > 1 else "") for n, name in enumerate(wired, start=1)}
    before = None if site.pre_norm is None else _normed
    adapters = {name: wired_adapter(part, site, branches[name], before) for name, part in wired.items()}
    check_circuits(setup, adapters, site)
    circuit = circuit_of(setup, adapters)
    site = circuit_site(site, circuit)

    post = _normed if site.post_norm is not None else None
    settled = rewire(
        setup,
        adapters,
        X,
        H,
        others=OTHERS if site.shared_sum else None,
        norm=_normed if circuit == "last_norm" else post,
        fusions={block.name: _FusionSymbol() for block in fusions(setup)},
    )
    stream = X + OTHERS if site.shared_sum else X

    def output(handed: Settled[Expr]) -> Expr:
        # Where the tap is before a scale of the layer, the layer scales whatever the hook hands it.
        branch = handed.branch if site.exact else handed.branch.applied(SCALE)
        return layer_output(Settled(branch, handed.output), stream, post)

    adapted = output(settled)
    at_zero = adapted
    for branch in branches.values():
        at_zero = at_zero.vanish(branch.name)
    handed = settled.branch if settled.output is None else settled.output
    return Formula(
        pretrained=output(Settled(H)),
        adapted=adapted,
        at_zero=at_zero,
        reads_stream=handed.mentions("x"),
        reads_others=handed.mentions("g"),
        passes_norm=settled.output is not None,
    )


def _normed(value: Expr) -> Expr:
    return value.applied("LN")


def sublayer_part(config: AdapterConfig, site: Site) -> Config | None:
    """The part of an adapter that plugs into the sum of sites like this one."""
    return next((part for part in config.parts if _fits(part, site)), None)


def _fits(part: Config, site: Site) -> bool:
    method = method_of(part)
    return issubclass(method, SublayerMethod) and method.fits(part, site)


class _Symbols:
    """The branch of an adapter in a formula: A, or A1, A2, ... where several act."""

    def __init__(self, number: str) -> None:
        self.name, self.norm_name = f"A{number}", f"N{number}"

    def branch(self, z: Expr) -> Expr:
        return z.applied(self.name)

    def norm_branch(self, w: Expr) -> Expr:
        return w.applied(self.norm_name)


class _FusionSymbol:
    """Fusion layers in a formula: F, which weighs and maps outputs without a constant, so makes nothing of nothing."""

    def fuse(self, query: Expr, outputs: list[Expr]) -> Expr:
        return sum(outputs, start=Expr()).applied("F")
