"""Where adapter modules live in the model, and what runs in its forward.

A layer gets one child named `inarch` that holds a `SiteSlot` for each of its sites; a slot holds, by adapter name, the
modules of every method there. Because slots are part of the layer, whatever treats a layer as a unit (FSDP, gradient
checkpointing, `deepcopy`, `.to`) treats its adapters with it. The hooks are bound methods of the slots, so they are
copied and pickled with the model.

Tensors: x the stream, h the output of the branch, both (B batch, L tokens, D width).
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compose import Setup, last, names, run
from .core.errors import SetupError, SiteError
from .core.site import Site, Tap
from .core.wiring import Carry, Circuit, Settled, settle
from .methods import LinearMethod, Placement, SublayerMethod, method_of

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
    """What a site hands to its layer instead of `h`. The forward runs it on tensors, the proof on symbols.

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
    if final.circuit == "unnormed":
        norm = None
    carry = run(setup, Carry(h), _SumStep(adapters, x, norm))
    return settle(carry, x, h, add=add, post_norm=norm is not None)


def check_circuits(setup: Setup, adapters: Mapping[str, WiredAdapter], site: Site) -> None:
    """Raise `SetupError` for adapters that take different things for the stream and the branch of one site."""
    found = {adapters[name].circuit: name for name in names(setup)}
    if len(found) > 1:
        raise SetupError(
            "The adapters of a setup must take the same for stream and branch; got "
            f"{' and '.join(f'`{name}` ({circuit})' for circuit, name in found.items())} at site `{site.key}`. "
            "Activate one of them, or stack adapters of one origin."
        )


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
        # In a tuple, so that the layer's norm does not become a child of ours.
        self._post_norm: tuple[nn.Module | None] = (None,)
        self._held: dict[int, Tensor] = {}
        self._others: dict[int, Tensor] = {}
        self._final: dict[int, Tensor] = {}
        self._calls: dict[int, int] = {}
        self._setup: Setup = ""
        self._wired: dict[str, WiredAdapter] = {}
        self._reads_stream = False
        self._reads_others = False

    def arm(
        self,
        setup: Setup,
        wired: dict[str, WiredAdapter],
        post_norm: nn.Module | None,
        *,
        reads_stream: bool,
        reads_others: bool,
    ) -> None:
        """Choose what the hooks will run."""
        self.let_go()
        self._setup, self._wired = setup, wired
        self._reads_stream, self._reads_others = reads_stream, reads_others
        self._post_norm = (post_norm,)

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
        if not self.site.output.call:
            return True
        number = self._calls.pop(_thread(), None)
        if number is None:  # it has been
            return False
        if number + 1 < self.site.output.call:
            self._calls[_thread()] = number + 1
            return False
        return True

    def hold_argument(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook where the stream is a positional argument: keep x for the branch output of this call."""
        assert self.site.stream is not None
        self._held[_thread()] = pick(args, self.site.stream.key)

    def hold_any_argument(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook where the stream is passed by keyword, or, when the caller differs, by position."""
        assert self.site.stream is not None
        key = self.site.stream.key
        if key[0] in kwargs:
            self._held[_thread()] = pick(kwargs[str(key[0])], key[1:])
        elif args and isinstance(args[0], Tensor):
            self._held[_thread()] = args[0]

    def hold_result(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook where the stream is the result of a module."""
        assert self.site.stream is not None
        self._held[_thread()] = pick(output, self.site.stream.key)

    def hold_other(self, key: tuple[int | str, ...], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook on the output of another branch of the same sum, after that branch's adapters."""
        other, before = pick(output, key), self._others.get(_thread())
        self._others[_thread()] = other if before is None else before + other

    def rewrite(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook on the branch output: the site's new output in the place of h."""
        refuse_replica(module)
        if not self.is_meant():
            return output
        h = pick(output, self.site.output.key)
        x = self._held.pop(_thread(), None) if self._reads_stream else None
        if self._reads_stream and (x is None or x.shape != h.shape):
            raise _stream_error(self.site, x, h)
        others = self._others.pop(_thread(), None) if self._reads_others else None
        post_norm = self._post_norm[0]
        # The norm's forward, not the norm: it must not trigger hooks, ours among them.
        norm = None if post_norm is None else post_norm.forward
        settled = rewire(self._setup, self._wired, x, h, others=others, norm=norm)
        if settled.output is not None:
            self._final[_thread()] = settled.output
            return output
        return _replace(output, self.site.output.key, settled.branch)

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook on the norm after the sum, for adapters that end after it."""
        final = self._final.pop(_thread(), None)
        return output if final is None else final


class ProjectionSlot(nn.Module):
    """The hook on one projection: runs the linear methods of every role the projection plays."""

    def __init__(
        self, program: list[tuple[Setup, dict[str, list[LinearMethod]], tuple[tuple[int, int], ...] | None]]
    ) -> None:
        """`program`: for each role a setup, the modules of its adapters, and the rows of a fused projection."""
        super().__init__()
        self._program = program
        self.changes_input = any(
            module.changes_input for _, modules, _ in program for row in modules.values() for module in row
        )

    def prepare(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook on a projection: its new input, (..., in)."""
        inputs = args[0]
        for setup, modules, _ in self._program:
            inputs = run(setup, inputs, _InputStep(modules))
        return (inputs, *args[1:])

    def adapt(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook on a projection: its new output, (..., out)."""
        refuse_replica(module)
        inputs = args[0]
        for setup, modules, rows in self._program:
            part = output if rows is None else _rows(output, rows)
            part = run(setup, part, _LinearStep(modules, inputs))
            output = part if rows is None else _with_rows(output, rows, part)
        return output


@dataclass(frozen=True, slots=True)
class _InputStep:
    """One adapter of a setup, on the way into a projection."""

    modules: Mapping[str, list[LinearMethod]]

    def __call__(self, name: str, inputs: Tensor) -> Tensor:
        for module in self.modules[name]:
            inputs = module.prepare(inputs)
        return inputs


@dataclass(frozen=True, slots=True)
class _LinearStep:
    """One adapter of a setup, on the projection's input and output."""

    modules: Mapping[str, list[LinearMethod]]
    inputs: Tensor

    def __call__(self, name: str, output: Tensor) -> Tensor:
        for module in self.modules[name]:
            output = module(self.inputs, output)
        return output


def refuse_replica(module: nn.Module) -> None:
    """Raise `SetupError` on a copy of a module that holds no state of its own."""
    if getattr(module, "_is_replica", False):
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


def slots(model: nn.Module) -> Iterator[tuple[str, SiteSlot]]:
    """Every slot of the model with its path."""
    for path, module in model.named_modules():
        if isinstance(module, SiteSlot):
            yield path, module


def tap_module(model: nn.Module, site: Site, tap: Tap) -> nn.Module:
    """The module a tap is at."""
    return model.get_submodule(site.absolute(tap.path))
