"""What a setup does at a sum or at a projection, written down as a program: its operations, in their order.

`rewire` is the one function that wires adapters into a sum. The proof runs it on symbols; here it runs on registers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Generic, Protocol

from torch import Tensor

from .compose import Cut, Cutter, Fuse, Setup, Take, last, leaves, run, uncut
from .core.errors import SetupError, SiteError
from .core.offloaded import with_weights
from .core.program import Program, Recorder, Register, apply, apply_all
from .core.site import Site, Sites, Tap
from .core.wiring import Carry, Circuit, Settled, V, settle
from .frozen import Base, OnBase
from .methods import LinearMethod, SublayerMethod, method_of


@dataclass(frozen=True, slots=True)
class WiredAdapter:
    """An adapter at one site, as the sum sees it: `branch` is the module when tensors run, symbols in a proof."""

    config: Any
    method: type[SublayerMethod]
    branch: Any
    circuit: Circuit


def wired_adapter(config: Any, site: Site, branch: Any, pre_norm: Callable[[Any], Any] | None = None) -> WiredAdapter:
    """One part of an adapter, at a site; `pre_norm` is the norm before the branch, for methods that read behind it."""
    method = method_of(config)
    assert issubclass(method, SublayerMethod)
    if pre_norm is not None and method.reads_normed(config):
        branch = _BehindNorm(branch, pre_norm)
    return WiredAdapter(config, method, branch, method.circuit(config, site.kind))


@dataclass(frozen=True, slots=True)
class _Flow(Generic[V]):
    """What runs through a setup at a sum, for the samples and tokens that it is about."""

    sum: "_Sum"
    x: V
    h: V
    carry: Carry[V]
    """What the adapters so far have made of the branch output."""
    end: Settled[V]
    """What the layer gets if none comes after them."""

    def part(self, cut: Cut, child: int) -> "_Flow[V]":
        take = Take(cut, child)
        end = Settled(apply(take, self.end.branch), None if self.end.output is None else apply(take, self.end.output))
        carry = Carry(apply(take, self.carry.rest), self.carry.count)
        return _Flow(self.sum, apply(take, self.x), apply(take, self.h), carry, end)

    def joined(self, cut: Cut, parts: Sequence["_Flow[V]"]) -> "_Flow[V]":
        def whole(values: list[V]) -> V:
            found: V = apply_all(cut.whole, values)
            return found

        return self._merged(parts, whole)

    def mean(self, results: Sequence["_Flow[V]"], shares: Sequence[Fraction]) -> "_Flow[V]":
        def weighted(values: list[V]) -> V:
            first, *others = [
                value if share == 1 else value * share for value, share in zip(values, shares, strict=True)
            ]
            return sum(others, start=first)

        return self._merged(results, weighted)

    def _merged(self, flows: Sequence["_Flow[V]"], merge: Callable[[list[V]], V]) -> "_Flow[V]":
        """Several flows as one. The coefficients of a mean add up to one, so equal multiples of the stream stay so."""
        if len({flow.carry.count for flow in flows}) == 1:
            carry = Carry(merge([flow.carry.rest for flow in flows]), flows[0].carry.count)
        else:
            is_exchanged = any(one.circuit == "exchanged" for one in self.sum.adapters.values())  # then h is counted
            carry = Carry(merge([flow.carry.value(flow.h if is_exchanged else flow.x) for flow in flows]))
        ends = [flow.end for flow in flows]
        if all(end.output is None for end in ends):
            return _Flow(self.sum, self.x, self.h, carry, Settled(merge([end.branch for end in ends])))
        norm = self.sum.norm
        assert norm is not None, "only a norm is passed over"
        outputs = [norm(f.x + f.end.branch) if f.end.output is None else f.end.output for f in flows]
        return _Flow(self.sum, self.x, self.h, carry, Settled(self.h, merge(outputs)))

    def fused(self, block: Fuse, through: Callable[[Setup, "_Flow[V]"], "_Flow[V]"]) -> "_Flow[V]":
        present = [child for child in block.children if last(child) in self.sum.adapters]
        if not present:
            return self
        outputs = [self._output_of(child, through) for child in present]
        final = self.sum.adapters[last(present[-1])]
        return self.sum.step(replace(final, branch=_Fused(self.sum.fusions[block.name], outputs)), self)

    def _output_of(self, child: Setup, through: Callable[[Setup, "_Flow[V]"], "_Flow[V]"]) -> V:
        """What the branch of a child, of its last adapter, gives."""
        flow = self
        while not isinstance(child, str):
            for earlier in child.children[:-1]:
                flow = through(earlier, flow)
            child = child.children[-1]
        seen: list[V] = []
        adapter = self.sum.adapters[child]
        self.sum.step(replace(adapter, branch=_Watched(adapter.branch, seen)), flow)
        return seen[0]


@dataclass(frozen=True, slots=True)
class _BehindNorm:
    """A branch that reads its input behind a norm."""

    inner: Any
    norm: Callable[[Any], Any]

    def branch(self, z: Any) -> Any:
        return self.inner.branch(self.norm(z))

    def norm_branch(self, w: Any) -> Any:
        return self.inner.norm_branch(w)


@dataclass(frozen=True, slots=True)
class _Fused:
    """The branch of fused adapters: a fusion of their outputs, whose query is the input of the last one."""

    fusion: Any
    outputs: list[Any]

    def branch(self, z: Any) -> Any:
        return self.fusion.fuse(z, self.outputs)

    def norm_branch(self, w: Any) -> Any:
        return w  # what is fused is what adapters give before a norm of their own


@dataclass(frozen=True, slots=True)
class _Watched:
    """The branch of an adapter, and what it gives."""

    inner: Any
    seen: list[Any]

    def branch(self, z: Any) -> Any:
        self.seen.append(self.inner.branch(z))
        return self.seen[-1]

    def norm_branch(self, w: Any) -> Any:
        return self.inner.norm_branch(w)


@dataclass(frozen=True, slots=True)
class _Sum:
    """One sum of a layer, with the adapters there."""

    adapters: Mapping[str, WiredAdapter]
    fusions: Mapping[str, Any]
    """Fusion layers by name; symbols in a proof."""
    norm: Callable[[Any], Any] | None

    def apply(self, name: str, flow: _Flow[Any]) -> _Flow[Any]:
        """One adapter of a setup, on what the ones before it made of the branch output."""
        return self.step(self.adapters[name], flow) if name in self.adapters else flow

    def step(self, adapter: WiredAdapter, flow: _Flow[Any]) -> _Flow[Any]:
        add = adapter.method.keeps_sum(adapter.config)
        x, h, norm = flow.x, flow.h, self.norm
        if adapter.circuit == "exchanged":
            carry = adapter.method.wire(adapter.config, h, flow.carry, norm, adapter.branch)
            total = carry.value(h)
            if add:
                total = total + h if norm is None else norm(total + h)
            return replace(flow, carry=carry, end=settle(Carry(total), x, h, add=False, post_norm=norm is not None))
        carry = adapter.method.wire(adapter.config, x, flow.carry, norm, adapter.branch)
        if adapter.circuit == "last_norm":
            return replace(flow, carry=carry, end=Settled(carry.value(x)))
        return replace(flow, carry=carry, end=settle(carry, x, h, add=add, post_norm=norm is not None))


def rewire(
    setup: Setup,
    adapters: Mapping[str, WiredAdapter],
    x: Any,
    h: Any,
    *,
    others: Any,
    norm: Callable[[Any], Any] | None,
    fusions: Mapping[str, Any] | None = None,
    cutter: Cutter = uncut,
) -> Settled[Any]:
    """What a site hands to its layer instead of `h`. The proof runs it on symbols, `sum_program` on registers.

    `adapters` are those of the setup that are present at the site, all of one circuit; `others` is what branches of
    the same sum that ran before hand to it; None where there are none; `fusions` are the fusion layers of the site.
    """
    circuit = circuit_of(setup, adapters)
    if circuit == "joined" and others is not None:
        x = x + others
    if circuit in ("unnormed", "inner"):
        norm = None
    place = _Sum(adapters, fusions or {}, norm)
    flow = _Flow(place, x, h, Carry(x if circuit == "exchanged" else h), Settled(h))
    return run(setup, flow, place.apply, cutter).end


def circuit_of(setup: Setup, adapters: Mapping[str, WiredAdapter]) -> Circuit:
    """The circuit of the adapters that are present."""
    return next(adapters[name].circuit for name in leaves(setup) if name in adapters)


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
    found = {adapters[name].circuit: name for name in leaves(setup) if name in adapters}
    if len(found) > 1:
        raise SetupError(
            "The adapters of a setup must take the same for stream and branch; got "
            f"{' and '.join(f'`{name}` ({circuit})' for circuit, name in found.items())} at site `{site.key}`. "
            "Activate one of them, or stack adapters of one origin."
        )


def sum_program(
    setup: Setup,
    adapters: Mapping[str, WiredAdapter],
    norm: "Forward | None",
    *,
    joins_others: bool,
    fusions: Mapping[str, Any] | None = None,
    cutter: Cutter = uncut,
    feature_dim: int = -1,
) -> Program:
    """What `rewire` does, as a program of x, h and others that returns the branch and the output of `Settled`.

    The program takes features in the last dimension; `feature_dim` is where the norm takes them.
    """
    recorder = Recorder(3)
    x, h, others = recorder.arguments
    recorded = {name: replace(part, branch=_Recorded(recorder, part.branch)) for name, part in adapters.items()}
    call = None if norm is None else _Recording(recorder, ForwardOf(norm, feature_dim))
    fused = {name: _Recorded(recorder, module) for name, module in (fusions or {}).items()}
    joined = others if joins_others else None
    settled: Settled[Register] = rewire(setup, recorded, x, h, others=joined, norm=call, fusions=fused, cutter=cutter)
    return recorder.program(settled.branch, settled.output)


def input_program(setup: Setup, modules: Mapping[str, list[LinearMethod]], cutter: Cutter = uncut) -> Program:
    """What the linear methods of a setup make of a projection's input."""
    recorder = Recorder(1)
    flow = _LinearFlow(recorder.arguments[0], recorder.arguments[0])
    return recorder.program(run(setup, flow, _InputStep(recorder, modules), cutter).value)


def linear_program(
    setup: Setup, modules: Mapping[str, list[LinearMethod]], cutter: Cutter = uncut, base: Base | None = None
) -> Program:
    """What the linear methods of a setup make of a projection's output, as a program of its input and output."""
    recorder = Recorder(2)
    flow = _LinearFlow(*recorder.arguments)
    return recorder.program(run(setup, flow, _LinearStep(recorder, modules, base), cutter).value)


@dataclass(frozen=True, slots=True)
class _LinearFlow:
    """What runs through a setup at a projection: its input, and what the adapters make of its output (or its input)."""

    inputs: Register
    value: Register

    def part(self, cut: Cut, child: int) -> "_LinearFlow":
        take = Take(cut, child)
        return _LinearFlow(apply(take, self.inputs, self.inputs), apply(take, self.value, self.inputs))

    def joined(self, cut: Cut, parts: Sequence["_LinearFlow"]) -> "_LinearFlow":
        return replace(self, value=apply_all(cut.whole, [part.value for part in parts]))

    def mean(self, results: Sequence["_LinearFlow"], shares: Sequence[Fraction]) -> "_LinearFlow":
        first, *others = [
            result.value if share == 1 else result.value * share for result, share in zip(results, shares, strict=True)
        ]
        return replace(self, value=sum(others, start=first))

    def fused(self, block: Fuse, through: Any) -> "_LinearFlow":
        return self  # what is fused has nothing at projections


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The branch of an adapter while its wiring is recorded."""

    recorder: Recorder
    module: Any

    def branch(self, z: Register) -> Register:
        return self.recorder.call(self.module.branch, z)

    def norm_branch(self, w: Register) -> Register:
        return self.recorder.call(self.module.norm_branch, w)

    def fuse(self, query: Register, outputs: list[Register]) -> Register:
        found: Register = apply_all(self.module.fuse, [query, *outputs])
        return found


@dataclass(frozen=True, slots=True)
class _Recording:
    """A function while calls of it are recorded."""

    recorder: Recorder
    function: Callable[[Any], Any]

    def __call__(self, value: Register) -> Register:
        return self.recorder.call(self.function, value)


class Forward(Protocol):
    """What has the forward of a norm."""

    @property
    def forward(self) -> Callable[..., Any]: ...


@dataclass(frozen=True, slots=True)
class ForwardOf:
    """The forward that a module has when it is called; not the module, which would run hooks, ours among them."""

    module: Forward
    feature_dim: int = -1

    def __call__(self, value: Tensor) -> Tensor:
        if self.feature_dim == -1:
            return self.module.forward(value)  # type: ignore[no-any-return]
        moved: Tensor = self.module.forward(value.movedim(-1, self.feature_dim))
        return moved.movedim(self.feature_dim, -1)


@dataclass(frozen=True, slots=True)
class _InputStep:
    """One adapter of a setup, on the way into a projection."""

    recorder: Recorder
    modules: Mapping[str, list[LinearMethod]]

    def __call__(self, name: str, flow: _LinearFlow) -> _LinearFlow:
        value = flow.value
        for module in self.modules.get(name, ()):
            value = self.recorder.call(_Preparing(module), value) if module.changes_input else value
        return replace(flow, value=value)


@dataclass(frozen=True, slots=True)
class _Preparing:
    """What a linear method makes of a projection's input."""

    module: LinearMethod

    def __call__(self, value: Tensor) -> Tensor:
        return with_weights(self.module, self.module.prepare, value)


@dataclass(frozen=True, slots=True)
class _LinearStep:
    """One adapter of a setup, on the projection's input and output."""

    recorder: Recorder
    modules: Mapping[str, list[LinearMethod]]
    base: Base | None

    def __call__(self, name: str, flow: _LinearFlow) -> _LinearFlow:
        value = flow.value
        for module in self.modules.get(name, ()):
            reads = self.base is not None and module.reads_base
            value = self.recorder.call(OnBase(module, self.base) if reads else module, flow.inputs, value)  # type: ignore[arg-type]
        return replace(flow, value=value)
