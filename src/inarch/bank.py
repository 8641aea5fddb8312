"""Where adapter modules live in the model, and what runs in its forward.

A layer gets one child named `inarch` that holds a `SiteSlot` for each of its sites; a slot holds, by adapter name, the
modules of every method there. Because slots are part of the layer, whatever treats a layer as a unit (FSDP, gradient
checkpointing, `deepcopy`, `.to`) treats its adapters with it. The hooks are bound methods of the slots, so they are
copied and pickled with the model.

Tensors: x the stream, h the output of the branch, both (B batch, L tokens, D width).
"""

import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .compose import Setup, last, names, run
from .core.errors import SetupError, SiteError
from .core.program import Program, Recorder, Register
from .core.site import Site, Sites, Tap
from .core.wiring import Carry, Circuit, Settled, settle
from .methods import LinearMethod, Placement, SublayerMethod, method_of
from .undropped import undropped

CHILD = "inarch"
"""The name of the child that a layer is given."""


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
    """One adapter of a setup, on what the ones before it made of the branch output. (A class, because the compiler
    cannot trace a function with annotations that is defined while it runs.)"""

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


def module_key(method: str, placement: Placement) -> str:
    """The place of a module among those of one adapter at one site, as in the state dict and on disk."""
    if placement.port == "sublayer":
        return method
    return f"{method}.{placement.role}{placement.part or ''}"


class LayerSlot(nn.ModuleDict):
    """The child of a layer: its site slots, by `slot_name`."""


def slot_name(site: Site) -> str:
    """A module name that is unique even where the layers of a stack share one owner."""
    return site.key.replace(".", "_")


class Modules(nn.Module):
    """Named children in a mapping that, unlike `nn.ModuleDict`, takes names such as "keys" and nested keys."""

    def put(self, key: str, module: nn.Module) -> None:
        """Store a module under a dotted key, making the levels between."""
        head, _, rest = key.partition(".")
        if not rest:
            self._modules[head] = module
            return
        inner = self._modules.setdefault(head, Modules())
        assert isinstance(inner, Modules)
        inner.put(rest, module)

    def find(self, key: str) -> nn.Module | None:
        """The module under a dotted key."""
        head, _, rest = key.partition(".")
        child = self._modules.get(head)
        return child.find(rest) if rest and isinstance(child, Modules) else child

    def drop(self, key: str) -> None:
        """Forget the module of that name, if there is one."""
        self._modules.pop(key, None)


class SiteSlot(nn.Module):
    """The adapters of one residual site, and the hooks that run them."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.adapters = Modules()
        self._held: dict[int, Tensor] = {}
        self._others: dict[int, Tensor] = {}
        self._final: dict[int, Tensor] = {}
        self._calls: dict[int, int] = {}
        self._output = site.output
        self._is_counted = bool(site.output.call)
        self._is_dropped_later = site.dropped_later
        self._stream_at = Argument()
        self._program = Program(3, (), (1, 3))
        self._reads_stream = False
        self._reads_others = False

    def arm(self, program: Program, output: Tap) -> None:
        """Choose what the hooks will run, a program of x, h and the other branches of the sum, and where h appears."""
        self.let_go()
        self._program, self._output, self._is_counted = program, output, bool(output.call)
        self._is_dropped_later = self.site.dropped_later and output == self.site.output
        self._reads_stream, self._reads_others = program.reads(0), program.reads(2)

    def watch(self, module: nn.Module) -> None:
        """Say at which module the stream will come in as an argument, for `hold_argument`."""
        assert self.site.stream is not None
        self._stream_at = argument_of(module, self.site.stream.key)

    def let_go(self) -> None:
        """Forget tensors of a forward that did not end, by an exception or by checkpointing."""
        self._held.clear()
        self._others.clear()
        self._final.clear()
        self._calls.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Without tensors of a forward, which belong to no copy."""
        return self.__dict__ | {"_held": {}, "_others": {}, "_final": {}, "_calls": {}}

    def take_held(self) -> list[Tensor]:
        """Hand over what is held."""
        held = list(self._held.values())
        self._held.clear()
        return held

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook on the module since whose call those of the output's module are counted."""
        self._calls[_thread()] = 0

    def is_meant(self) -> bool:
        """Whether the call of the output's module that just ended is the one that gives the branch output."""
        if not self._is_counted:
            return True
        number = self._calls.pop(_thread(), None)
        if number is None:  # it has been
            return False
        if number + 1 < self._output.call:
            self._calls[_thread()] = number + 1
            return False
        return True

    def hold_argument(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook where the stream is an argument: keep x for the branch output of this call."""
        at = self._stream_at
        value = args[at.position] if at.position < len(args) else kwargs.get(at.name)
        if value is not None:  # else the branch output says that there was no stream
            self._held[_thread()] = pick(value, at.key) if at.key else value

    def hold_result(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook where the stream is the result of a module."""
        assert self.site.stream is not None
        self._held[_thread()] = pick(output, self.site.stream.key)

    def hold_other(
        self, key: tuple[int | str, ...], is_first: bool, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        """Hook on the output of another branch of the same sum, after that branch's adapters.

        With the first of them a new sum begins, whatever a forward that did not end has left.
        """
        other = pick(output, key)
        before = None if is_first else self._others.get(_thread())
        self._others[_thread()] = other if before is None else before + other

    def rewrite(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook on the branch output: the site's new output in the place of h."""
        refuse_replica(module)
        if self._is_counted and not self.is_meant():
            return output
        key, x = self._output.key, None
        h = pick(output, key) if key else output
        if self._reads_stream:
            x = self._held.pop(_thread(), None)
            if x is None or x.shape != h.shape:
                raise _stream_error(self.site, x, h)
        others = self._others.pop(_thread(), None) if self._reads_others else None
        if self._reads_others and others is None:
            raise SiteError(
                "An adapter that reads the other branches of its sum runs after them; got none before the output of "
                f"site `{self.site.key}` (`{self.site.layer_path}`). Load the adapter without this site."
            )
        if self._is_dropped_later and module.training:
            waiting = undropped(h, self.adapt, x, others)
            return _replace(output, key, waiting) if key else waiting
        branch, final = self._program(x, h, others)
        if final is not None:
            self._final[_thread()] = final
            return output
        return _replace(output, key, branch) if key else branch

    def adapt(self, h: Tensor, x: Tensor | None, others: Tensor | None) -> Tensor:
        """What the layer gets in the place of h, where it has dropped h by itself."""
        branch, final = self._program(x, h, others)
        if final is None:
            return branch  # type: ignore[no-any-return]
        self._final[_thread()] = final
        return h

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook on the norm after the sum, for adapters that end after it."""
        final = self._final.pop(_thread(), None)
        return output if final is None else final


@dataclass(frozen=True, slots=True)
class Role:
    """What the adapters of a setup do at a projection in one role."""

    on_input: Program
    on_output: Program
    rows: tuple[tuple[int, int], ...] | None
    """The output features that play the role, where the projection is a fused one."""


class ProjectionSlot(nn.Module):
    """The hooks on one projection: they run the linear methods of every role that the projection plays."""

    def __init__(self, module: nn.Module, roles: list[Role]) -> None:
        super().__init__()
        self._roles = roles
        self._input = argument_of(module, (0,))
        self.changes_input = any(role.on_input.steps for role in roles)

    def prepare(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook on a projection: its new input, (..., in)."""
        inputs = args[0] if args else self._find(module, kwargs)
        for role in self._roles:
            inputs = role.on_input(inputs)
        return ((inputs, *args[1:]), kwargs) if args else ((), kwargs | {self._input.name: inputs})

    def adapt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Hook on a projection: its new output, (..., out)."""
        refuse_replica(module)
        inputs = args[0] if args else self._find(module, kwargs)
        for role in self._roles:
            if role.rows is None:
                output = role.on_output(inputs, output)
            else:
                part = role.on_output(inputs, _rows(output, role.rows))
                output = _with_rows(output, role.rows, part)
        return output

    def _find(self, module: nn.Module, kwargs: dict[str, Any]) -> Any:
        """The input of a call that passes it by name."""
        name = self._input.name
        if name not in kwargs:
            raise SiteError(
                f"An adapter on a projection reads the projection's input, its argument `{name}`; got a call with "
                f"{', '.join(f'`{name}`' for name in kwargs) or 'no argument'} of a {type(module).__name__}. Leave "
                "this projection out of the adapter."
            )
        return kwargs[name]


@dataclass(frozen=True, slots=True)
class Argument:
    """Where a tensor is among the arguments of a module's forward, which callers may pass by position or by name."""

    position: int = sys.maxsize
    name: str = ""
    key: tuple[int | str, ...] = ()
    """The way to the tensor inside the argument."""


def argument_of(module: nn.Module, key: tuple[int | str, ...]) -> Argument:
    """The argument of a module's forward that a tap names by position or by name."""
    parameters = inspect.signature(module.forward).parameters.values()
    ordered = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    head, rest = key[0], key[1:]
    if isinstance(head, int):
        return Argument(head, ordered[head] if head < len(ordered) else "", rest)
    return Argument(ordered.index(head) if head in ordered else sys.maxsize, head, rest)


def refuse_replica(module: nn.Module) -> None:
    """Raise `SetupError` on a copy of a module that holds no state of its own."""
    if "_is_replica" in module.__dict__:  # not by `getattr`: a module takes long to say what it does not have
        raise SetupError(
            "Adapters run on a model, not on copies of it made for each batch; got a replica of `nn.DataParallel`. Use "
            "`DistributedDataParallel`, with `accelerate launch` or `torchrun`, or one device."
        )


def _thread() -> int:
    """What a held tensor belongs to: the calling thread, so that forwards may run side by side.

    A compiled graph has no threads inside it; there the tensor is an ordinary intermediate value.
    """
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def pick(value: Any, key: tuple[int | str, ...]) -> Any:
    """The item of a call's arguments or result that a tap names."""
    for part in key:
        value = value[part]
    return value


def _replace(output: Any, key: tuple[int | str, ...], value: Any) -> Any:
    """`output` with the item at `key` replaced, in a container of the same type."""
    if not key:
        return value
    head, rest = key[0], key[1:]
    inner = _replace(output[head], rest, value)
    if isinstance(output, tuple) and isinstance(head, int):
        items = (*output[:head], inner, *output[head + 1 :])
        return items if type(output) is tuple else type(output)(*items)
    if isinstance(output, list) and isinstance(head, int):
        return [*output[:head], inner, *output[head + 1 :]]
    changed = type(output)(output)  # a mapping, such as transformers' ModelOutput
    changed[head] = inner
    return changed


def _rows(output: Tensor, rows: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [output[..., start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _with_rows(output: Tensor, rows: tuple[tuple[int, int], ...], part: Tensor) -> Tensor:
    place = 0
    for start, stop in rows:
        piece = part[..., place : place + stop - start]
        output = torch.slice_scatter(output, piece.to(output.dtype), dim=-1, start=start, end=stop)
        place += stop - start
    return output


def _stream_error(site: Site, x: Tensor | None, h: Tensor) -> SiteError:
    got = "no stream" if x is None else f"a stream of shape {tuple(x.shape)}"
    return SiteError(
        f"An adapter that reads the stream needs it before the branch output, in the same shape; got {got} for an "
        f"output of shape {tuple(h.shape)} at site `{site.key}` (`{site.layer_path}`). Use a configuration with "
        "`original_ln_before=False` and `is_parallel=False`, or pass `inarch.attach(model, example_inputs=...)` like "
        "the inputs you run."
    )


def layer_home(model: nn.Module, site: Site) -> nn.Module:
    """The module that holds the site's slot: its layer or, where the layer runs all its children in turn, the module
    whose output is the branch output."""
    layer = model.get_submodule(site.layer_path)
    if isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return layer.get_submodule(site.output.path)
    return layer


def tap_module(model: nn.Module, site: Site, tap: Tap) -> nn.Module:
    """The module a tap is at."""
    return model.get_submodule(site.absolute(tap.path))
