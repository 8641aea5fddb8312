"""What a setup does at a sum or at a projection, written down as a program: its operations, in their order.

`rewire` is the one function that wires adapters into a sum. The proof runs it on symbols; here it runs on registers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .compose import Setup, last, names, run
from .core.errors import SetupError, SiteError
from .core.program import Program, Recorder, Register
from .core.site import Site, Sites, Tap
from .core.wiring import Carry, Circuit, Settled, settle
from .methods import LinearMethod, SublayerMethod, method_of


@dataclass(frozen=True, slots=True)
class WiredAdapter:
    """An adapter at one site, as the sum sees it: `branch` is the module when tensors run, symbols in a proof."""

    config: Any
    method: type[SublayerMethod]
    branch: Any
    circuit: Circuit


def wired_adapter(config: Any, site: Site, branch: Any) -> WiredAdapter:
    """One part of an adapter, at a site."""
    method = method_of(config)
    assert issubclass(method, SublayerMethod)
    return WiredAdapter(config, method, branch, method.circuit(config, site.kind))


@dataclass(frozen=True, slots=True)
class _SumStep:
    """One adapter of a setup, on what the ones before it made of the branch output."""

    adapters: Mapping[str, WiredAdapter]
    x: Any
    norm: Callable[[Any], Any] | None

    def __call__(self, name: str, carry: Carry[Any]) -> Carry[Any]:
        adapter = self.adapters[name]
        return adapter.method.wire(adapter.config, self.x, carry, self.norm, adapter.branch)


def rewire(
    setup: Setup,
    adapters: Mapping[str, WiredAdapter],
    x: Any,
    h: Any,
    *,
    others: Any,
    norm: Callable[[Any], Any] | None,
) -> Settled[Any]:
    """What a site hands to its layer instead of `h`. The proof runs it on symbols, `sum_program` on registers.

    `others` is what branches of the same sum that ran before hand to it; None where there are none.
    """
    final = adapters[last(setup)]
    add = final.method.keeps_sum(final.config)
    if final.circuit == "exchanged":
        total = run(setup, Carry(x), _SumStep(adapters, h, norm)).value(h)
        if add:
            total = total + h if norm is None else norm(total + h)
        return settle(Carry(total), x, h, add=False, post_norm=norm is not None)
    if final.circuit == "joined" and others is not None:
        x = x + others
    if final.circuit in ("unnormed", "inner"):
        norm = None
    carry = run(setup, Carry(h), _SumStep(adapters, x, norm))
    if final.circuit == "last_norm":
        return Settled(carry.value(x))
    return settle(carry, x, h, add=add, post_norm=norm is not None)


def circuit_site(site: Site, circuit: Circuit) -> Site:
    """The site as the adapters of a circuit see it. Raises `SiteError` where they cannot be had there."""
    if circuit not in ("inner", "last_norm"):
        return site
    last_projections = site.projections.get("down" if site.kind == "mlp" else "o", ())
    if len(last_projections) != 1 or last_projections[0].weight:
        raise SiteError(
            "An adapter on the last projection of a branch needs one that can be hooked; got "
            f"{len(last_projections)} known ones at site `{site.key}` (`{site.layer_path}`). Use another adapter."
        )
    tap = Tap(path=last_projections[0].path, side="out")
    return replace(site, output=tap, exact=site.exact and site.branch_norm is None)


def circuit_norm(site: Site, sites: Sites, circuit: Circuit) -> str | None:
    """The path in the model of the norm that the adapters of a circuit are given; None for none.

    Raises `SiteError` where there is none that the circuit could mean.
    """
    if circuit != "last_norm":
        return None if site.post_norm is None else site.absolute(site.post_norm)
    final = [other for other in sites if (other.stack, other.role) == (site.stack, site.role)][-1]
    if final.branch_norm is None:
        raise SiteError(
            "An adapter that takes the norm of the last layer needs one at the end of that branch; got none at site "
            f"`{final.key}` (`{final.layer_path}`). Use another adapter."
        )
    return final.absolute(final.branch_norm)


def check_circuits(setup: Setup, adapters: Mapping[str, WiredAdapter], site: Site) -> None:
    """Raise `SetupError` for adapters that take different things for the stream and the branch of one site."""
    found = {adapters[name].circuit: name for name in names(setup)}
    if len(found) > 1:
        raise SetupError(
            "The adapters of a setup must take the same for stream and branch; got "
            f"{' and '.join(f'`{name}` ({circuit})' for circuit, name in found.items())} at site `{site.key}`. "
            "Activate one of them, or stack adapters of one origin."
        )


def sum_program(
    setup: Setup, adapters: Mapping[str, WiredAdapter], norm: nn.Module | None, *, joins_others: bool
) -> Program:
    """What `rewire` does, as a program of x, h and others that returns the branch and the output of `Settled`."""
    recorder = Recorder(3)
    x, h, others = recorder.arguments
    recorded = {name: replace(part, branch=_Recorded(recorder, part.branch)) for name, part in adapters.items()}
    call = None if norm is None else _Recording(recorder, _ForwardOf(norm))
    settled: Settled[Register] = rewire(setup, recorded, x, h, others=others if joins_others else None, norm=call)
    return recorder.program(settled.branch, settled.output)


def input_program(setup: Setup, modules: Mapping[str, list[LinearMethod]]) -> Program:
    """What the linear methods of a setup make of a projection's input."""
    recorder = Recorder(1)
    return recorder.program(run(setup, recorder.arguments[0], _InputStep(recorder, modules)))


def linear_program(setup: Setup, modules: Mapping[str, list[LinearMethod]]) -> Program:
    """What the linear methods of a setup make of a projection's output, as a program of its input and output."""
    recorder = Recorder(2)
    inputs, output = recorder.arguments
    return recorder.program(run(setup, output, _LinearStep(recorder, modules, inputs)))


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The branch of an adapter while its wiring is recorded."""

    recorder: Recorder
    module: Any

    def branch(self, z: Register) -> Register:
        return self.recorder.call(self.module.branch, z)

    def norm_branch(self, w: Register) -> Register:
        return self.recorder.call(self.module.norm_branch, w)


@dataclass(frozen=True, slots=True)
class _Recording:
    """A function while calls of it are recorded."""

    recorder: Recorder
    function: Callable[[Any], Any]

    def __call__(self, value: Register) -> Register:
        return self.recorder.call(self.function, value)


@dataclass(frozen=True, slots=True)
class _ForwardOf:
    """The forward that a module has when it is called; not the module, which would run hooks, ours among them."""

    module: nn.Module

    def __call__(self, value: Tensor) -> Tensor:
        return self.module.forward(value)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _InputStep:
    """One adapter of a setup, on the way into a projection."""

    recorder: Recorder
    modules: Mapping[str, list[LinearMethod]]

    def __call__(self, name: str, inputs: Register) -> Register:
        for module in self.modules[name]:
            inputs = self.recorder.call(module.prepare, inputs) if module.changes_input else inputs
        return inputs


@dataclass(frozen=True, slots=True)
class _LinearStep:
    """One adapter of a setup, on the projection's input and output."""

    recorder: Recorder
    modules: Mapping[str, list[LinearMethod]]
    inputs: Register

    def __call__(self, name: str, output: Register) -> Register:
        for module in self.modules[name]:
            output = self.recorder.call(module, self.inputs, output)
        return output
