"""The port for frozen parameters that no linear module applies: their effective value, for the length of one forward.

`nn.MultiheadAttention` reads `in_proj_weight` and `out_proj.weight` itself, so no hook sees the input or the output of
these maps. Before its forward the effective parameter is put into the instance's `__dict__`, where Python finds it
before the registered parameter; after the forward, also after an exception, it is taken away. The registered parameter,
the state dict and the classes stay as they are.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .bank import refuse_replica
from .compose import Cut, Fuse, Setup, run, uncut
from .core.errors import SiteError
from .core.offloaded import with_weights
from .core.site import Projection
from .frozen import Base
from .methods import Frozen, LinearMethod
from .tensors import execution_device, kept_elsewhere


class ParameterRole(Protocol):
    """What adapters make of a parameter, or of the part of it that plays a role."""

    @property
    def modules(self) -> Mapping[str, Sequence[nn.Module]]: ...
    def apply(self, weight: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class WeightRole:
    """The adapters of one role that a projection plays."""

    projection: Projection
    setup: Setup
    modules: Mapping[str, list[LinearMethod]]
    base: Base

    def apply(self, weight: Tensor) -> Tensor:
        """The parameter with the role's features changed: (out, in), or (in, out) where it is stored so."""
        dim, rows = (-1 if self.projection.transposed else -2), self.projection.rows
        part = weight if rows is None else torch.cat([weight.narrow(dim, a, b - a) for a, b in rows], dim)
        part = part.mT if self.projection.transposed else part
        reads = any(module.reads_base for modules in self.modules.values() for module in modules)
        step = _WeightStep(self.modules, self.base.read() if reads else None)
        part = run(self.setup, WeightState(part), step, uncut).weight
        part = part.mT if self.projection.transposed else part
        if rows is None:
            return part
        place = 0
        for start, stop in rows:
            piece = part.narrow(dim, place, stop - start)
            weight = torch.slice_scatter(weight, piece, dim, start, stop)
            place += stop - start
        return weight


@dataclass(frozen=True, slots=True)
class _WeightStep:
    """One adapter of a setup, on the weight the ones before it made."""

    modules: Mapping[str, list[LinearMethod]]
    base: Frozen | None

    def __call__(self, name: str, state: "WeightState") -> "WeightState":
        weight = state.weight
        for module in self.modules.get(name, ()):
            weight = with_weights(module, module.effective, weight, self.base)
        return WeightState(weight)


@dataclass(frozen=True, slots=True)
class WeightState:
    """A parameter on its way through a setup. It has no rows of a batch to be cut."""

    weight: Tensor

    def part(self, cut: Cut, child: int) -> "WeightState":
        raise AssertionError(f"{cut} was let through to a weight, for child {child}")

    def joined(self, cut: Cut, parts: Sequence["WeightState"]) -> "WeightState":
        raise AssertionError(f"{cut} was let through to a weight, of {len(parts)} children")

    def mean(self, results: Sequence["WeightState"], shares: Sequence[Fraction]) -> "WeightState":
        first, *others = [result.weight * float(share) for result, share in zip(results, shares, strict=True)]
        return WeightState(sum(others, start=first))

    def fused(self, block: Fuse, through: Any) -> "WeightState":
        return self  # what is fused has nothing at weights


class WeightSlot(nn.Module):
    """The hooks on one module that applies parameters itself.

    Forwards of one module in several threads wait for each other: the effective parameter is an attribute of the
    module, and belongs to the autograd graph of the thread that made it.
    """

    def __init__(self, owner: str, program: Mapping[str, Sequence[ParameterRole]]) -> None:
        """`owner`: the module's path, for messages; `program`: by parameter, its name relative to the module."""
        super().__init__()
        self._owner = owner
        self._program = program
        self._before: list[dict[str, tuple[Any, bool]]] = []
        self._running = 0
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before": [], "_running": 0, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch has no annotation there
        self._lock = threading.RLock()

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook: put the effective parameters where the module will read them."""
        refuse_replica(module)
        if torch.compiler.is_compiling():  # one thread, and a graph that does not end by exceptions
            for name in self._program:
                _shadow(module, name, self._effective(module, name))
            return
        effective = {name: self._effective(module, name) for name in self._program}
        self._lock.acquire()
        self._running = threading.get_ident()
        # What was there before: the effective parameters of an outer call, where a module calls itself.
        self._before.append(
            {
                name: (_shadow(module, name, value), _registered(module, name).requires_grad)
                for name, value in effective.items()
            }
        )

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook, also called after an exception: the module reads its own parameters again."""
        if torch.compiler.is_compiling():
            for name in self._program:
                _shadow(module, name, None)
            return
        if not self._before or self._running != threading.get_ident():  # an exception came before `enter`
            return
        for name, (value, is_trained) in self._before.pop().items():
            _shadow(module, name, value)
            # Accelerate, which takes offloaded ones away, gives the new one the flag of the effective one.
            if _registered(module, name).requires_grad != is_trained:
                _registered(module, name).requires_grad_(is_trained)
        self._lock.release()

    def _effective(self, module: nn.Module, name: str) -> Tensor:
        weight: Tensor = _registered(module, name)
        if weight.is_meta:  # accelerate brings it in inside the forward, after this
            holder, leaf = _holder(module, name)
            kept = kept_elsewhere(holder, leaf)
            weight = weight if kept is None else kept.to(execution_device(holder))
        result = weight
        for role in self._program[name]:
            if not torch.compiler.is_compiling():
                self._check(name, weight, next(iter(role.modules.values()))[0])
            result = role.apply(result)
        return result

    def _check(self, name: str, weight: Tensor, adapter: nn.Module) -> None:
        device = next(adapter.parameters()).device
        device = execution_device(adapter) or device if device.type == "meta" else device
        if weight.device != device or not weight.is_floating_point():
            raise SiteError(
                "An adapter of a weight needs that weight in floating point, on its own device; got "
                f"{weight.dtype} on `{weight.device}` for an adapter on `{device}` at `{name}` of `{self._owner}`. "
                "Leave this projection out, or keep the module neither offloaded nor quantised."
            )


@dataclass(frozen=True, slots=True)
class Shadows:
    """What a forward that was interrupted left before the parameters of a module, until it is removed.

    (Python's `KeyboardInterrupt` and the like pass by every hook.)
    """

    module: nn.Module
    parameters: tuple[str, ...]

    def remove(self) -> None:
        """Let the module read its own parameters again. Runs when no forward does."""
        for name in self.parameters:
            _shadow(self.module, name, None)


def _holder(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _registered(module: nn.Module, name: str) -> nn.Parameter:
    holder, leaf = _holder(module, name)
    found = holder._parameters[leaf]
    assert found is not None
    return found


def _shadow(module: nn.Module, name: str, value: Any) -> Any:
    """Put a value before a registered parameter, or take away what is there. Returns what was there."""
    holder, leaf = _holder(module, name)
    before = holder.__dict__.pop(leaf, None)
    if value is not None:
        object.__setattr__(holder, leaf, value)
    return before
