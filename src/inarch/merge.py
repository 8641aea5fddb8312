"""Writes an adapter's projections into the weights of the base, and takes them out again bit for bit.

What is overwritten is kept, in the memory of the CPU: as much as the adapted matrices and biases of the base take.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attach import base_of, slot_of, stored
from .bank import module_key
from .check import difference, run_of
from .core.errors import SetupError
from .core.site import Affine, Projection, Sites
from .frozen import Base
from .methods import AdapterConfig, Frozen, LinearMethod, ParameterMethod, Placement, method_of, placements
from .sites import Inputs
from .tensors import copy_into, is_quantised, is_sharded

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.02}
"""How far outputs may be apart because weights are rounded with an update in them, relative to their size."""


@dataclass(slots=True)
class Merged:
    """The adapters that are in the weights of a model, and what was there before."""

    names: list[str] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    """By path, parameters of the base with their values before anything was merged, on the CPU. By path, for a model
    may get others in their place: in another type, or spread over processes."""

    def keep(self, path: str, parameter: nn.Parameter) -> None:
        """Keep the values of a parameter, if they are not kept already."""
        if path not in self.kept:
            self.kept[path] = parameter.detach().to("cpu", copy=True)

    def restore(self, model: nn.Module) -> None:
        """Put back what was kept. Raises `SetupError` where it does not fit, before anything is put back."""
        found = {path: _parameter(model, path) for path in self.kept}
        for path, values in self.kept.items():
            if is_quantised(found[path]) or found[path].is_meta or found[path].shape != values.shape:
                raise SetupError(
                    "What was merged is taken out of weights in floating point, in memory, of the shape that they had; "
                    f"got others at `{path}` of {type(model).__name__}. Load the base anew, or keep the adapters in it "
                    "with `detach(keep_merged=True)`."
                )
        for path, values in reversed(
            self.kept.items()
        ):  # of a parameter with two paths the first has the base's values
            copy_into(found[path], values)
        self.kept.clear()


@contextmanager
def undone_on_error(model: nn.Module, merged: Merged) -> Iterator[None]:
    """A block in which an adapter is merged: where it raises, the weights are as they were at its beginning."""
    before = {path: _parameter(model, path).detach().clone() for path in merged.kept}
    known = dict(merged.kept)
    try:
        yield
    except BaseException:
        merged.restore(model)
        merged.kept.update(known)
        for path, values in before.items():
            copy_into(_parameter(model, path), values)
        raise


def check_mergeable(name: str, config: AdapterConfig, sites: Sites) -> None:
    """Raise `SetupError` that names what of an adapter is no change of a weight."""
    for part in config.parts:
        obstacle = method_of(part).obstacle_to_merge(part)
        if obstacle:
            raise SetupError(
                f"What is merged is a change of weights alone; got {obstacle} in `{name}` for {sites.model_class}. "
                "Keep the adapter active instead."
            )


def merge(
    model: nn.Module,
    sites: Sites,
    name: str,
    config: AdapterConfig,
    merged: Merged,
    *,
    inputs: Inputs | None,
    active: Callable[[], AbstractContextManager[None]],
    alone: Callable[[], AbstractContextManager[None]],
    tolerance: float | None,
) -> float:
    """Write an adapter into the weights, and compare the output on one batch with that of the active adapter.

    Arguments: `active` is a block in which the adapter is active, `alone` one in which none is. Returns the difference.
    Raises `SetupError` without inputs, for weights that cannot be overwritten, and for outputs that differ by more; the
    weights are then as they were.
    """
    if inputs is None:
        raise SetupError(
            f"A merged model is compared with the active adapter on one batch; got none for {type(model).__name__}. "
            "Pass `example_inputs`."
        )
    allowed = tolerance
    if allowed is None:
        # What rounding may change, but never half of what the adapter does, unless that is next to nothing.
        effect = difference(model, run_of(model, inputs), alone, active)
        allowed = min(_rounding(model, sites, name, config), max(effect / 2, _ROUNDING[torch.float32]))

    @contextmanager
    def folded() -> Iterator[None]:
        with alone():
            fold(model, sites, name, config, merged)
            yield

    with undone_on_error(model, merged):
        found = difference(model, run_of(model, inputs), active, folded)
        check_agreement(name, found, allowed)
    merged.names.append(name)
    return found


def _rounding(model: nn.Module, sites: Sites, name: str, config: AdapterConfig) -> float:
    """How far outputs may be apart by the coarsest of the types in which an adapter is added to the base."""
    own = {p.dtype for modules in stored(model, sites, name).values() for p in modules.parameters()}
    base = {row[1].dtype for row in _projections(model, sites, name, config)}
    base |= {row[1].dtype for row in _vectors(model, sites, name, config)}
    return max(_ROUNDING.get(dtype, 0.1) for dtype in own | base)


def check_agreement(name: str, found: float, allowed: float) -> None:
    """Raise `SetupError` where outputs are further apart than is allowed, or not numbers."""
    if not found <= allowed:
        raise SetupError(
            f"A merged adapter gives what it gave while it was active, within {allowed:.2g} of the output; got a "
            f"difference of {found:.2g} for `{name}`. Keep it active instead, or pass a `tolerance` if that much is "
            "wanted."
        )


def fold(model: nn.Module, sites: Sites, name: str, config: AdapterConfig, merged: Merged) -> None:
    """Write an adapter into the weights. Raises `SetupError` for weights that cannot be overwritten; then none is."""
    found = list(_projections(model, sites, name, config))
    vectors = list(_vectors(model, sites, name, config))
    for place, parameter in [row[:2] for row in found] + [row[:2] for row in vectors]:
        _check_whole(place, parameter)
    for place, _, bias, _, module, _ in found:
        if bias is None and module.adds_bias:
            raise SetupError(
                "An adapter's bias is merged into that of its projection; got a projection without one at "
                f"`{place}`. Keep the adapter active instead."
            )
    with torch.no_grad():
        # Before anything is written: an adapter of several methods is one of the frozen base.
        frozen = [base.read() if module.reads_base else None for *_, module, base in found]
        frozen = [None if one is None else Frozen(one.weight.clone(), None) for one in frozen]
        # Then vectors: what adapters make of an output, they make of one with the effective bias.
        for path, parameter, part, leaf, changing in vectors:
            merged.keep(path, parameter)
            rows = _indices(part.rows, parameter.device)
            parameter[rows] = changing.effective(leaf, parameter[rows])
        for (path, parameter, bias, projection, module, _), base in zip(found, frozen, strict=True):
            merged.keep(path, parameter)
            weight = parameter.mT if projection.transposed else parameter
            rows = _indices(projection.rows, parameter.device)
            new, new_bias = module.fold(weight[rows], None if bias is None else bias[rows], base)
            weight[rows] = new.to(weight.dtype)
            if bias is not None and new_bias is not None:
                merged.keep(f"{path.rpartition('.')[0]}.bias", bias)
                bias[rows] = new_bias.to(bias.dtype)


def _check_whole(place: str, parameter: nn.Parameter) -> None:
    if is_sharded(parameter) or is_quantised(parameter) or parameter.is_meta:
        state = "sharded" if is_sharded(parameter) else "offloaded" if parameter.is_meta else "quantised"
        raise SetupError(
            f"An adapter is merged into whole weights in floating point, in memory; got {state} ones at `{place}`. "
            "Keep the adapter active instead, or load the base in full precision."
        )


def _vectors(
    model: nn.Module, sites: Sites, name: str, config: AdapterConfig
) -> Iterator[tuple[str, nn.Parameter, Affine, str, ParameterMethod]]:
    """Every vector of an adapter: its place and parameter, what is known of it, and the adapter's module."""
    for part in config.parts:
        method = method_of(part)
        for placement in placements(part, sites) if issubclass(method, ParameterMethod) else ():
            module = _module(model, name, method.name, placement)
            assert isinstance(module, ParameterMethod)
            for leaf, own in placement.vectors.names.items():
                if module.changes(leaf):
                    path = f"{placement.site.absolute(placement.vectors.path)}.{own}"
                    yield path, _parameter(model, path), placement.vectors, leaf, module


def _projections(
    model: nn.Module, sites: Sites, name: str, config: AdapterConfig
) -> Iterator[tuple[str, nn.Parameter, nn.Parameter | None, Projection, LinearMethod, Base]]:
    """Every projection of an adapter: its place, weight and bias, what is known of it, and the adapter's module."""
    for part in config.parts:
        method = method_of(part)
        for placement in placements(part, sites) if issubclass(method, LinearMethod) else ():
            module = _module(model, name, method.name, placement)
            assert isinstance(module, LinearMethod)
            projection = placement.projection
            path = placement.site.absolute(projection.path)
            weight_name = projection.weight or "weight"
            weight = _parameter(model, f"{path}.{weight_name}")
            # A module that applies its weight itself keeps no bias that a method could change.
            has_bias = not projection.weight and getattr(model.get_submodule(path), "bias", None) is not None
            bias = _parameter(model, f"{path}.bias") if has_bias else None
            yield f"{path}.{weight_name}", weight, bias, projection, module, base_of(model, placement.site, projection)


def _parameter(model: nn.Module, path: str) -> nn.Parameter:
    """A parameter of the base. Raises `SetupError` where the model computes what is at its place."""
    owner, _, leaf = path.rpartition(".")
    found = model.get_submodule(owner)._parameters.get(leaf)
    if found is None:
        raise SetupError(
            f"An adapter is merged into parameters; got `{path}`, which {type(model).__name__} computes from others "
            "or holds in a form of its own. Keep the adapter active instead, or remove the parametrization first."
        )
    return found


def _module(model: nn.Module, name: str, method: str, placement: Placement) -> nn.Module:
    modules = slot_of(model, placement.site).adapters.find(name)
    found = modules.find(module_key(method, placement))  # type: ignore[union-attr, operator]
    assert isinstance(found, nn.Module)
    return found


def _indices(rows: tuple[tuple[int, int], ...] | None, device: torch.device) -> Tensor | slice:
    """The rows of a parameter that play the role."""
    if rows is None:
        return slice(None)
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in rows])
