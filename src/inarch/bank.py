"""Where adapter modules live in the model, and the hooks that run programs on them in its forward.

A layer gets one child named `inarch` that holds a `SiteSlot` for each of its sites; a slot holds, by adapter name, the
modules of every method there. Because slots are part of the layer, whatever treats a layer as a unit (FSDP, gradient
checkpointing, `deepcopy`, `.to`) treats its adapters with it. The hooks are bound methods of the slots, so they are
copied and pickled with the model.

Tensors: x the stream, h the output of the branch, both (B batch, L tokens, D width).
"""

import inspect
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .core.errors import SetupError, SiteError
from .core.program import Program
from .core.site import Site, Tap
from .methods import Placement
from .undropped import undropped

CHILD = "inarch"
"""The name of the child that a layer is given."""


def module_key(method: str, placement: Placement) -> str:
    """The place of a module among those of one adapter at one site, as in the state dict and on disk."""
    if not placement.role:
        return method
    return f"{method}.{placement.role}{placement.part or ''}"


class LayerSlot(nn.ModuleDict):
    """The child of a layer: its site slots, by `slot_name`."""


class OutputEmbeddings(nn.Module):
    """What stands before the embeddings in a language-modelling head of ours, where an invertible map of the tokens is
    undone: of all rows of the batch, which a setup may cut."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, E)."""
        return hidden


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


class Held(threading.local):
    """What a hook of a slot leaves for a later one, of each thread its own, so that forwards may run side by side."""

    stream: Tensor | None = None
    others: Tensor | None = None
    """The sum of the branches before, of one sum."""
    final: Tensor | None = None
    """What goes in the place of what the norm after the sum gives."""
    calls: int | None = None
    """How often the output's module was called since the counting began."""

    def __reduce__(self) -> tuple[type["Held"], tuple[()]]:
        """As nothing, for tensors of a forward belong to no copy."""
        return Held, ()


class SiteSlot(nn.Module):
    """The adapters of one residual site, and the hooks that run them."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.adapters = Modules()
        self._held = Held()
        self._output = site.output
        self._is_counted = bool(site.output.call)
        self._is_dropped_later = site.dropped_later
        self._stream_at = Argument()
        self._program: Program | FeaturesLast = Program(3, (), (1, 3))
        self._reads_stream = False
        self._reads_others = False

    def arm(self, program: Program, output: Tap) -> None:
        """Choose what the hooks will run, a program of x, h and the other branches of the sum, and where h appears."""
        self.let_go()
        dim = self.site.feature_dim
        self._program = program if dim == -1 else FeaturesLast(program, dim)
        self._output, self._is_counted = output, bool(output.call)
        self._is_dropped_later = self.site.dropped_later and output == self.site.output
        self._reads_stream, self._reads_others = program.reads(0), program.reads(2)

    def watch(self, module: nn.Module) -> None:
        """Say at which module the stream will come in as an argument, for `hold_argument`."""
        assert self.site.stream is not None
        self._stream_at = argument_of(module, self.site.stream.key)

    def let_go(self) -> None:
        """Forget tensors of a forward that did not end, by an exception or by checkpointing."""
        self._held = Held()

    def take_held(self) -> Tensor | None:
        """Hand over the stream that is held."""
        held, self._held.stream = self._held.stream, None
        return held

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook on the module since whose call those of the output's module are counted."""
        self._held.calls = 0

    def is_meant(self) -> bool:
        """Whether the call of the output's module that just ended is the one that gives the branch output."""
        if not self._is_counted:
            return True
        number, self._held.calls = self._held.calls, None
        if number is None:  # it has been
            return False
        if number + 1 < self._output.call:
            self._held.calls = number + 1
            return False
        return True

    def hold_argument(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook where the stream is an argument: keep x for the branch output of this call."""
        at = self._stream_at
        value = args[at.position] if at.position < len(args) else kwargs.get(at.name)
        if value is not None:  # else the branch output says that there was no stream
            self._held.stream = pick(value, at.key) if at.key else value

    def hold_result(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook where the stream is the result of a module."""
        assert self.site.stream is not None
        self._held.stream = pick(output, self.site.stream.key)

    def hold_other(
        self, key: tuple[int | str, ...], is_first: bool, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        """Hook on the output of another branch of the same sum, after that branch's adapters.

        With the first of them a new sum begins, whatever a forward that did not end has left.
        """
        other = pick(output, key)
        before = None if is_first else self._held.others
        self._held.others = other if before is None else before + other

    def rewrite(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook on the branch output: the site's new output in the place of h."""
        refuse_replica(module)
        if self._is_counted and not self.is_meant():
            return output
        key, held, x, others = self._output.key, self._held, None, None
        h = pick(output, key) if key else output
        if self._reads_stream:
            x, held.stream = held.stream, None
            if x is None or x.shape != h.shape:
                raise _stream_error(self.site, x, h)
        if self._reads_others:
            others, held.others = held.others, None
        if self._reads_others and others is None:
            raise SiteError(
                "An adapter that reads the other branches of its sum runs after them; got none before the output of "
                f"site `{self.site.key}` (`{self.site.layer_path}`). Load the adapter without this site."
            )
        if self._is_dropped_later and module.training:
            waiting = undropped(h, self.adapt, x, others)
            return _replace(output, key, waiting) if key else waiting
        branch, final = self._program.run(x, h, others)
        if final is not None:
            held.final = final
            return output
        return _replace(output, key, branch) if key else branch

    def adapt(self, h: Tensor, x: Tensor | None, others: Tensor | None) -> Tensor:
        """What the layer gets in the place of h, where it has dropped h by itself."""
        branch, final = self._program.run(x, h, others)
        if final is None:
            assert branch is not None
            return branch
        self._held.final = final
        return h

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook on the norm after the sum, for adapters that end after it."""
        final, self._held.final = self._held.final, None
        return output if final is None else final


@dataclass(frozen=True, slots=True)
class FeaturesLast:
    """A program of tensors (..., D) where they come with their features in the dimension `dim`, and go so."""

    program: Program
    dim: int

    def run(self, *arguments: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the program."""
        moved = (None if value is None else value.movedim(self.dim, -1) for value in arguments)
        return tuple(None if value is None else value.movedim(-1, self.dim) for value in self.program.run(*moved))


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


def thread() -> int:
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
