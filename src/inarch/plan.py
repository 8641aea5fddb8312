"""What attaching and activating would do, as plain data: no tensor is made, nothing is changed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .bank import module_key
from .compose import Setup, check_runnable, keep_only, last, names
from .core.config import Config
from .core.errors import ConfigError
from .core.site import Site, Sites
from .core.symbols import Expr, symbol
from .core.table import render
from .core.wiring import Settled, layer_output
from .methods import AdapterConfig, Placement, SublayerMethod, layer_number, method_of, placements
from .programs import check_circuits, circuit_site, rewire, wired_adapter

X, H, OTHERS = symbol("x"), symbol("h"), symbol("g")


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
    formulas: Mapping[str, Formula]
    """By site key; sites whose sum no adapter touches are left out."""

    @property
    def num_parameters(self) -> int:
        return sum(module.num_parameters for module in self.modules)

    def __str__(self) -> str:
        rows = [
            (
                module.adapter,
                module.key,
                module.placement.port,
                module.num_parameters,
                f"y = {self.formulas[module.placement.site.key].adapted}"
                if module.placement.port == "sublayer" and module.placement.site.key in self.formulas
                else "",
            )
            for module in self.modules
        ]
        return render(("adapter", "module", "port", "parameters", "formula"), rows)


def plan(sites: Sites, adapters: Mapping[str, AdapterConfig], setup: Setup | None = None) -> Plan:
    """The modules these adapters have on these sites, and the formulas under the setup.

    Raises `ConfigError` if a configuration asks for what the model does not have, `SetupError` for a composition that
    cannot run.
    """
    if setup is not None:
        check_runnable(setup)
    modules = [
        PlannedModule(name, part, placement, layer_number(placement.site, sites))
        for name, config in adapters.items()
        for part in config.parts
        for placement in placements(part, sites)
    ]
    _check_sums(modules)
    formulas = {}
    if setup is not None:
        at = sublayer_sites(modules)
        for site in sites:
            found = formula(site, setup, {n: adapters[n] for n in names(setup) if site.key in at.get(n, ())})
            if found is not None:
                formulas[site.key] = found
    return Plan(tuple(modules), formulas)


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
    wired = {name: part for name in names(setup) if name in configs and (part := sublayer_part(configs[name], site))}
    kept = keep_only(setup, lambda name: name in wired)
    if kept is None:
        return None
    branches = {name: _Symbols(str(n) if len(wired) > 1 else "") for n, name in enumerate(wired, start=1)}
    adapters = {name: wired_adapter(part, site, branches[name]) for name, part in wired.items()}
    check_circuits(kept, adapters, site)
    circuit = adapters[last(kept)].circuit
    site = circuit_site(site, circuit)

    def norm(total: Expr) -> Expr:
        return total.applied("LN")

    post = norm if site.post_norm is not None else None
    settled = rewire(
        kept, adapters, X, H, others=OTHERS if site.shared_sum else None, norm=norm if circuit == "last_norm" else post
    )
    stream = X + OTHERS if site.shared_sum else X

    def output(handed: Settled[Expr]) -> Expr:
        # Where the tap is before a scale of the layer, the layer scales whatever the hook hands it.
        branch = handed.branch if site.exact else handed.branch.applied("s")
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
