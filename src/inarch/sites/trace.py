"""Records one forward of a model as a graph.

Names of modules mean nothing here, and neither does Python code: the tracer sees what reaches the dispatcher (in-place
sums, fused attention, views), so that an unusual spelling of the same computation gives the same graph.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from .dropouts import SeesDropout
from .graph import ALIAS, ATTENTIONS, CONSTANT, INPUT, PARAMETER, Call, Dropout, Graph, Key, Value
from .known import KeepsNumbers, Known
from .native import unfused

_PRODUCTS = ("mm", "bmm", "conv", "linear", "matmul", "dot", "rnn", "lstm", "gru")
_NOT_COMPUTED = ("aten.sym_", "aten.is_same_size", "prim.")
_MOST_PLACES = 2**12
_SUM_OF_PRODUCT = "aten.addcmul"
"""`x + scale * h`, spelled as one operator."""


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], known: Known | None = None) -> Graph:
    """Run one forward without gradients and record it. The model keeps the hooks it had.

    `known` has the values of inputs and buffers of a model without memory.
    """
    recorder = _Recorder(model, known)
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                for handle in recorder.watch(path, module):
                    stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(unfused())
        if known is not None:
            stack.enter_context(KeepsNumbers())
        stack.enter_context(SeesDropout(recorder.note_dropout))
        stack.enter_context(recorder)
        model(*args, **kwargs)
    return Graph(
        model, recorder.values, recorder.calls, recorder.roots, recorder.indices, recorder.parameters, recorder.dropouts
    )


@dataclass(frozen=True, slots=True)
class _Traits:
    name: str
    computed: bool
    product: bool
    lookup: bool
    only_shape: bool
    """Whether the arguments give the result its shape and type but no data."""
    writes: tuple[int, ...]
    """Positions of the arguments that the operator writes to."""


@cache
def _traits(func: Any) -> _Traits:
    full = str(func)
    name = ".".join(full.split(".")[:2]).rstrip("_")
    last = name.rpartition(".")[2]
    is_attention = any(part in full for part in ATTENTIONS)
    foreign = not name.startswith(("aten.", "prim", "_c10d"))  # a kernel of some other library: take it for a product
    return _Traits(
        name=name,
        computed=not full.startswith(_NOT_COMPUTED),
        product=not is_attention and (foreign or any(part in last for part in _PRODUCTS)),
        lookup=any(part in last for part in ("embedding", "index", "gather")),
        only_shape=last.startswith("new_") or last.endswith("_like"),
        writes=tuple(
            place
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def leaves(value: Any, key: Key = (), depth: int = 3) -> Iterator[tuple[Key, Tensor]]:
    """The tensors of a nested argument or result, each with the way to it."""
    if isinstance(value, Tensor):
        yield key, value
    elif depth:
        items = value.items() if isinstance(value, Mapping) else enumerate(value) if _is_sequence(value) else ()
        for name, item in items:
            yield from leaves(item, (*key, name), depth - 1)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records while it is entered. Keeps every tensor alive meanwhile, so that identities are not reused."""

    def __init__(self, model: nn.Module, known: Known | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.roots: dict[int, str] = {}
        self.dropouts: list[Dropout] = []
        self.indices: dict[int, tuple[Tensor | None, ...]] = {}
        self._open: list[Call] = []
        self._returned = 0
        self._version: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._on_storage: dict[int, list[Tensor]] = defaultdict(list)
        self.parameters: dict[int, nn.Parameter] = {}
        self._parameters = {id(parameter): parameter for parameter in model.parameters()}
        self._argument_names = [
            p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.KEYWORD_ONLY
        ]

    # ---------------------------------------------------------------- values

    def _new(self, tensor: Tensor, op: str, deps: tuple[int, ...] = ()) -> Value:
        value = Value(
            index=len(self.values),
            op=op,
            deps=deps,
            shape=tuple(tensor.shape),
            floating=tensor.is_floating_point() or tensor.is_complex(),
            storage=_storage(tensor),
            offset=int(tensor.storage_offset()) if tensor.layout is torch.strided else 0,
            strides=tensor.stride() if tensor.layout is torch.strided else (),
            call=self._open[-1].index if self._open else None,
        )
        self.values.append(value)
        for dep in dict.fromkeys(deps):
            self.values[dep].users.append(value.index)
        self._version[id(tensor)] = value.index
        return value

    def _keep(self, tensor: Tensor) -> None:
        self._alive.append(tensor)
        self._on_storage[_storage(tensor)].append(tensor)

    def _index(self, tensor: Tensor) -> int:
        known = self._version.get(id(tensor))
        if known is not None:
            return known
        is_parameter = id(tensor) in self._parameters
        value = self._new(tensor, PARAMETER if is_parameter else CONSTANT)
        if is_parameter:
            value.matrix = tensor.dim() >= 2
            self.parameters[value.index] = self._parameters[id(tensor)]
        self._keep(tensor)
        return value.index

    def _root(self, tensor: Tensor, name: str) -> None:
        if id(tensor) in self._version or id(tensor) in self._parameters:
            return
        value = self._new(tensor, INPUT)
        value.data, value.active = True, value.floating
        self.roots[value.index] = name
        self._keep(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        traits = _traits(func)
        # The versions that go in are read before the operator runs: it may write to them.
        deps = [self._index(tensor) for tensor in _tensors((*args, *kwargs.values()))] if traits.computed else []
        result, is_known = self._known.run(func, args, kwargs) if self._known else (func(*args, **kwargs), True)
        if not traits.computed:
            return result
        if kwargs.get("alpha", 1) != 1 and len(args) > 1 and isinstance(args[1], Tensor):
            deps[1] = self._scaled(args[1], deps[1])  # x + alpha * h, spelled as one operator
        if traits.name == _SUM_OF_PRODUCT:
            larger = max(args[1:3], key=Tensor.numel)
            traits, deps = _traits(torch.ops.aten.add.Tensor), [deps[0], self._scaled(larger, *deps[1:3])]
        outputs = list(_tensors((result,)))
        written = [args[place] for place in traits.writes if place < len(args) and isinstance(args[place], Tensor)]
        if traits.only_shape:
            deps = []
        made: set[int] = set()
        for tensor in [*outputs, *written]:
            if id(tensor) not in made:
                made.add(id(tensor))
                self._computed(tensor, traits, tuple(deps))
        if traits.name == "aten.index":
            self._note_indices(result, args[1])
        for tensor in written:
            self._refresh_aliases(tensor, made)
            if self._known and not is_known:
                self._known.forget(self._on_storage[_storage(tensor)])
        return result

    def note_dropout(self, tensor: Tensor) -> None:
        self.dropouts.append(Dropout(self._index(tensor), len(self.values), self._returned))

    def _note_indices(self, result: Tensor, places: list[Tensor | None]) -> None:
        given = [index for index in places if index is not None]
        values = [self._known.value(index) if self._known else index for index in given]
        if all(value is not None and value.numel() <= _MOST_PLACES for value in values):
            known = iter(values)
            found = (None if index is None else next(known) for index in places)
            self.indices[self._version[id(result)]] = tuple(v if v is None else v.detach().cpu().clone() for v in found)

    def _scaled(self, tensor: Tensor, *deps: int) -> int:
        previous = self._version[id(tensor)]
        value = self._new(tensor, "aten.mul", deps)
        value.data = any(self.values[dep].data for dep in deps)
        value.active = any(self.values[dep].active for dep in deps)
        self._version[id(tensor)] = previous
        return value.index

    def _computed(self, tensor: Tensor, traits: _Traits, deps: tuple[int, ...]) -> None:
        known = id(tensor) in self._version
        value = self._new(tensor, traits.name, deps)
        if not known:
            self._keep(tensor)
        sources = [self.values[dep] for dep in deps]
        active = sum(source.active for source in sources)
        matrices = sum(source.matrix for source in sources)
        value.data = any(source.data for source in sources)
        # Token ids become activations in an embedding; learned or constant queries in the first weight they meet.
        embedded = matrices > 0 and value.data and (traits.lookup or traits.product)
        queries = matrices > 1 or any(
            source.floating and not source.matrix and source.op != PARAMETER and len(source.shape) > 1
            for source in sources
        )
        projected = matrices > 0 and queries and traits.product
        value.active = value.floating and (active > 0 or embedded or projected)
        value.matrix = matrices > 0 and not value.active
        value.weighted = projected or (traits.product and matrices > 0 and active > 0)
        value.bilinear = active > 1 and traits.product

    def _refresh_aliases(self, tensor: Tensor, made: set[int]) -> None:
        """Give the other views of a storage that was written to a new version."""
        new = self._version[id(tensor)]
        for view in self._on_storage[_storage(tensor)]:
            if id(view) not in made:
                old = self._version[id(view)]
                value = self._new(view, ALIAS, (old, new))
                value.data = self.values[old].data or self.values[new].data
                value.active = value.floating and (self.values[old].active or self.values[new].active)

    # ---------------------------------------------------------------- calls

    def watch(self, path: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks that record the calls of one module: before its other hooks, and after them."""
        yield module.register_forward_pre_hook(self._entering(path), with_kwargs=True, prepend=True)
        yield module.register_forward_hook(self._leaving(), with_kwargs=True)

    def _entering(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.calls:
                self._read_roots(args, kwargs)
            call = Call(
                index=len(self.calls),
                path=path,
                module=module,
                parent=self._open[-1] if self._open else None,
                start=len(self.values),
            )
            self.calls.append(call)
            self._open.append(call)
            call.inputs = {key: self._index(tensor) for key, tensor in leaves((*args,))}
            call.inputs |= {key: self._index(tensor) for key, tensor in leaves(kwargs)}

        return enter

    def _leaving(self) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def leave(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], result: Any) -> None:
            call = self._open.pop()
            call.outputs = {key: self._index(tensor) for key, tensor in leaves(result)}
            call.stop = len(self.values)
            call.returned = self._returned
            self._returned += 1

        return leave

    def _read_roots(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = [*self._argument_names, *(f"argument {place}" for place in range(len(args)))]
        for name, argument in [*zip(names, args, strict=False), *kwargs.items()]:
            for _, tensor in leaves(argument):
                self._root(tensor, name)


def _storage(tensor: Tensor) -> int:
    """What tells storages apart: a tensor without memory has no address, but its storage is still an object."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
