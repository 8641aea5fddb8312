"""The port for prefixes: keys and values before those of an attention, put there where it attends.

An attention hands queries, keys and values to one function, after rotary embeddings, caches and all else that knows of
positions. That call is met there, for the attentions that a setup adapts and for no other:

    interface   most models of transformers get the function from `AttentionInterface.get_interface`. While a prefix is
                active in the process, what that returns asks the attention for its prefix first.
    fused       other modules call `scaled_dot_product_attention`; a function mode, of the running thread alone and for
                the length of the attention's forward, meets the call.
    scores      DeBERTa's attention multiplies and normalises by itself: a function mode gives its softmax the scores of
                the prefix, and the product after it the values.
    method      an attention with a method `_attn(query, key, value, attention_mask)`, as GPT-J's, has ours in its
                place.

Nothing is written into a cache: every call puts the prefix before all keys that there are, so a decoding step sees what
a whole forward sees. An attention whose forward never makes the call is an error, not an attention without a prefix.

Tensors: B batch, N heads of keys and values, L queries, S keys, H features of a head, P length of the prefix.
"""

import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from types import CodeType, FrameType
from typing import Any, Literal
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from .bank import argument_of, refuse_replica, thread
from .compose import Average, Cut, Cutter, Fuse, Setup, Take, run, walk
from .core.errors import SetupError, SiteError
from .core.site import Site
from .methods import PrefixMethod

ATTRIBUTE = "_inarch_prefix"
"""Where an attention has its slot, while a setup with prefixes is active."""

Way = Literal["interface", "fused", "scores", "method"]

_IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass(frozen=True, slots=True)
class Attention:
    """The module that attends at a site, and the way in which it does."""

    path: str
    way: Way


def attention_of(model: nn.Module, site: Site) -> Attention:
    """Where the attention of a site can be given a prefix. Raises `SiteError` where it cannot."""
    path = site.absolute(site.projections["k"][0].path)
    below: list[tuple[str, nn.Module]] = []
    while len(path) > len(site.layer_path):
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        way = _way_of(module)
        if way is not None:
            return Attention(path, way)
        if not below:  # a part of it that has no projections may attend
            below = [(f"{path}.{name}", part) for name, part in module.named_modules() if name]
    ways = [(place, way) for place, part in below if (way := _way_of(part)) is not None]
    if len(ways) == 1:
        return Attention(*ways[0])
    raise SiteError(
        "A prefix needs an attention of transformers' attention interface, or one that calls "
        f"`scaled_dot_product_attention`; got {_class_of_parent(model, site)} at site `{site.key}` "
        f"(`{site.layer_path}`). Leave the site out with `leave_out` or `leave_out_roles`, or use another method."
    )


def _class_of_parent(model: nn.Module, site: Site) -> str:
    parent = site.absolute(site.projections["k"][0].path).rpartition(".")[0]
    return f"`{type(model.get_submodule(parent)).__name__}`"


def _way_of(module: nn.Module) -> Way | None:
    names = set(names_in(type(module)))
    if "ALL_ATTENTION_FUNCTIONS" in names:
        return "interface"
    if {"pos_att_type", "softmax", "rel_embeddings"} <= names | set(_arguments(type(module).forward)):
        return None if getattr(module, "talking_head", False) else "scores"
    attend = getattr(type(module), "_attn", None)
    # A buffer `bias` is a causal mask that the method applies by itself, to keys counted from the first one.
    has_method = attend is not None and _arguments(attend) == ("self", "query", "key", "value", "attention_mask")
    if has_method and "bias" not in module._buffers:
        return "method"
    return "fused" if "scaled_dot_product_attention" in names else None


def _arguments(function: Any) -> tuple[str, ...]:
    code = inspect.unwrap(function).__code__
    found: tuple[str, ...] = code.co_varnames[: code.co_argcount]
    return found


def names_in(cls: type) -> Iterator[str]:
    """Every global name and attribute that the methods of a module's class read."""
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for function in vars(base).values():
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if isinstance(code, CodeType):
                yield from code.co_names


# What a setup puts before the keys and values


@dataclass(frozen=True, slots=True)
class Prefixed:
    """The prefix so far, on its way through a setup."""

    rows: Tensor
    """(B, N), of no other meaning than its number of rows."""
    inputs: Tensor | None
    """(B, L, D), what the queries are made of."""
    keys: Tensor | None = None
    """(1 or B, P, features of all heads)."""
    values: Tensor | None = None
    bias: Tensor | None = None
    """(1 or B, P), what is added to the scores; None for nothing."""

    def before(self, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> "Prefixed":
        """With more keys and values in front."""
        if self.keys is None or self.values is None:
            return replace(self, keys=keys, values=values, bias=bias)
        if bias is not None or self.bias is not None:
            bias = _joined(_bias(bias, keys), _bias(self.bias, self.keys), 1)
        return replace(self, keys=_joined(keys, self.keys, 1), values=_joined(values, self.values, 1), bias=bias)

    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[1]

    def part(self, cut: Cut, child: int) -> "Prefixed":
        take = Take(cut, child)

        def share(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or len(tensor) == 1 < len(self.rows) else take(tensor)

        parts = (share(tensor) for tensor in (self.inputs, self.keys, self.values, self.bias))
        return Prefixed(take(self.rows), *parts)

    def joined(self, cut: Cut, parts: Sequence["Prefixed"]) -> "Prefixed":
        """Rows with prefixes of several lengths: the shorter ones are filled up with keys that nobody sees."""
        longest = max(part.length() for part in parts)
        if not longest:
            return self
        known = next(part for part in parts if part.keys is not None)
        filled = [part.filled(longest, known) for part in parts]
        keys, values, bias = (cut.whole(tensors) for tensors in zip(*filled, strict=True))
        return replace(self, keys=keys, values=values, bias=bias if bias.any() else None)

    def filled(self, longest: int, like: "Prefixed") -> tuple[Tensor, Tensor, Tensor]:
        assert like.keys is not None
        assert like.values is not None
        size, missing = len(self.rows), longest - self.length()
        keys = like.keys.new_zeros(1, 0, like.keys.shape[-1]) if self.keys is None else self.keys
        values = like.values.new_zeros(1, 0, like.values.shape[-1]) if self.values is None else self.values
        bias = F.pad(_bias(self.bias, keys), (missing, 0), value=-math.inf)
        spread = (F.pad(part, (0, 0, missing, 0)).expand(size, -1, -1) for part in (keys, values))
        return (*spread, bias.expand(size, -1))  # type: ignore[return-value]

    def mean(self, results: Sequence["Prefixed"], shares: Sequence[Fraction]) -> "Prefixed":
        """All prefixes, each with its share of the attention that it would get alone."""
        whole = self
        for result, share in zip(results, shares, strict=True):
            new = result.length() - self.length()
            if new:
                assert result.keys is not None
                assert result.values is not None
                bias = _bias(result.bias, result.keys)[:, :new] + math.log(share)
                whole = whole.before(result.keys[:, :new], result.values[:, :new], bias)
        return whole

    def fused(self, block: Fuse, through: Any) -> "Prefixed":
        return self  # what is fused has no prefixes


def _bias(bias: Tensor | None, keys: Tensor) -> Tensor:
    return keys.new_zeros(keys.shape[:2]) if bias is None else bias


def _joined(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Two tensors in a row, where one may be for all samples."""
    size = max(len(first), len(second))
    return torch.cat([part.expand(size, *part.shape[1:]) for part in (first, second)], dim)


def check_shares(setup: Setup) -> None:
    """Raise `SetupError` for a share that no attention can have."""
    for block in walk(setup):
        if isinstance(block, Average) and min(block.weights) < 0:
            raise SetupError(
                "Prefixes in an `Average` have shares of the attention, so no weight below zero; got "
                f"{list(block.weights)} in {block}. Give weights from zero."
            )


class PrefixSlot:
    """The prefix of one attention under one setup, and the hooks that put it there."""

    def __init__(self, site: Site, way: Way, setup: Setup, modules: Mapping[str, PrefixMethod], cutter: Cutter) -> None:
        self.site = site
        self.way = way
        self._setup = setup
        self._modules = dict(modules)
        self._cutter = cutter
        self._input_name = ""
        self._reads_input = any(module.reads_input for module in modules.values())
        self._inputs: dict[int, Tensor] = {}
        self._calls: dict[int, list[int]] = {}
        self._modes: dict[int, list[_Mode]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running forward."""
        return self.__dict__ | {"_inputs": {}, "_calls": {}, "_modes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.way == "interface":
            _open(self)

    def arm(self, attention: nn.Module, projection: nn.Module | None) -> Iterator[Any]:
        """Register what puts the prefix there. Gives what removes it."""
        if ATTRIBUTE in attention.__dict__:
            raise SiteError(
                "An attention that is given a prefix belongs to one site; got "
                f"`{type(attention).__name__}`, which attends at another one too, for `{self.site.key}` "
                f"(`{self.site.layer_path}`). Leave one of them out with `leave_out` or `leave_out_roles`."
            )
        yield _Armed(attention, self)
        if self.way == "interface":
            _open(self)
        elif self.way == "method":
            attention.__dict__["_attn"] = partial(self.attend_by_method, attention)
        if projection is not None and self._reads_input:
            self._input_name = argument_of(projection, (0,)).name
            yield projection.register_forward_pre_hook(self.hold_input, with_kwargs=True, prepend=True)
        attention.__dict__[ATTRIBUTE] = self
        yield attention.register_forward_pre_hook(self.enter)
        yield attention.register_forward_hook(self.leave, always_call=True)

    # Hooks

    def hold_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook on the query projection: keep what the gates read."""
        inputs = args[0] if args else kwargs[self._input_name]
        self._inputs[thread()] = inputs.movedim(self.site.batch_dim, 0) if inputs.dim() == 3 else inputs

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook on the attention."""
        refuse_replica(module)
        if not torch.compiler.is_compiling():
            self._calls.setdefault(thread(), []).append(0)
        if self.way in ("fused", "scores"):
            if not torch.compiler.is_compiling():
                self.clear()
            mode = _Attending(self, module) if self.way == "fused" else _Scoring(self, module)
            self._modes.setdefault(thread(), []).append(mode)
            mode.__enter__()  # type: ignore[no-untyped-call]  # torch has no annotation there

    def clear(self) -> None:
        """Leave the modes of this thread that an interrupted forward has left behind."""
        modes = self._modes.get(thread())
        while modes and not modes[-1].is_running() and _innermost() is modes[-1]:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # as above

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook on the attention, also called after an exception."""
        if self.way in ("fused", "scores"):
            modes = self._modes.get(thread())
            if modes:  # else an exception came before `enter`
                modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # as above
        self._inputs.pop(thread(), None)
        if torch.compiler.is_compiling():
            return
        calls = self._calls.get(thread())
        if calls and not calls.pop() and output is not None:
            raise SiteError(
                "A prefix is put before the keys where the attention attends; got a forward of "
                f"`{type(module).__name__}` that did so nowhere that can be seen, at site "
                f"`{self.site.key}` (`{self.site.layer_path}`). Load the "
                'model with `attn_implementation="sdpa"` or `"eager"`, or leave the site out.'
            )

    # The calls

    def attend_by_interface(  # noqa: PLR0917  the call of every attention of transformers
        self,
        function: Callable[..., Any],
        implementation: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The call of a function of transformers' attention interface."""
        if implementation not in _IMPLEMENTATIONS or kwargs.get("cache") is not None:
            raise SiteError(
                f"A prefix goes to attentions that are computed by `eager` or `sdpa`; got `{implementation}` at "
                f"`{self.site.key}` (`{self.site.layer_path}`). Load the model with "
                '`attn_implementation="sdpa"`, or call `model.set_attn_implementation("sdpa")`.'
            )
        is_causal = False
        if implementation == "sdpa":
            given = kwargs.get("is_causal")
            is_causal = bool(getattr(module, "is_causal", True) if given is None else given)
        key, value, attention_mask = self._extended(query, key, value, attention_mask, is_causal=is_causal)
        bias = kwargs.get("position_bias")
        if isinstance(bias, Tensor):
            kwargs["position_bias"] = F.pad(bias, (key.shape[-2] - bias.shape[-1], 0))
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    def attend_by_method(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> Any:
        """The call of the attention's own method `_attn`."""
        key, value, attention_mask = self._extended(query, key, value, attention_mask, is_causal=False)
        return type(module)._attn(module, query, key, value, attention_mask)  # noqa: SLF001  it stands before this

    def attend_fused(  # noqa: PLR0917  the call of torch's function
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """The call of `scaled_dot_product_attention`."""
        key, value, attn_mask = self._extended(query, key, value, attn_mask, is_causal=is_causal)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)

    def _extended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask with the prefix in front."""
        self.count()
        if key.dim() != 4 or not (mask is None or (isinstance(mask, Tensor) and mask.dim() >= 2)):
            raise SiteError(
                "A prefix goes before keys (B, heads, S, features) under a mask of the scores, if any; got keys of "
                f"shape {tuple(key.shape)} and {_described(mask)} at `{self.site.key}` (`{self.site.layer_path}`). "
                "Leave the site out, or pass the model a mask of shape (B, L)."
            )
        found = self.prefix(key[:, :, 0, 0])
        if found.keys is None or found.values is None:
            return key, value, mask
        keys, values = self.in_heads(found.keys, key), self.in_heads(found.values, value)
        if mask is None and is_causal and query.shape[-2] > 1:
            # As `scaled_dot_product_attention` has it: queries and keys are counted from the first ones.
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()[None, None]
        return (
            torch.cat([keys, key], -2),
            torch.cat([values, value], -2),
            _extended_mask(mask, found.bias, keys, key.shape[-2]),
        )

    def count(self) -> None:
        """Remember that the running forward has attended."""
        if not torch.compiler.is_compiling() and self._calls.get(thread()):
            self._calls[thread()][-1] += 1

    def prefix(self, rows: Tensor) -> Prefixed:
        """What the setup puts before the keys and values of these rows, (B, N)."""
        return run(self._setup, Prefixed(rows, self._read_inputs(rows)), self._step, self._cutter)

    def _read_inputs(self, rows: Tensor) -> Tensor | None:
        if not self._reads_input:
            return None
        inputs = self._inputs.get(thread())
        if inputs is None or inputs.dim() != 3 or len(inputs) != len(rows):
            raise SiteError(
                "A gate of a prefix reads the input of the query projection, (B, L, D); got "
                f"{'none' if inputs is None else f'one of shape {tuple(inputs.shape)}'} for keys of {len(rows)} "
                f"samples at `{self.site.key}` (`{self.site.layer_path}`). Use `use_gating=False`."
            )
        return inputs

    def _step(self, name: str, state: Prefixed) -> Prefixed:
        module = self._modules.get(name)
        return state if module is None else state.before(*module(state.inputs))

    def in_heads(self, prefix: Tensor, own: Tensor) -> Tensor:
        """(1 or B, P, features of all heads) -> (B, N, P, H), for keys or values (B, N, S, H)."""
        size, heads, _, features = own.shape
        if prefix.shape[-1] != heads * features:
            raise SiteError(
                "A prefix has the heads that its attention's projections make; got keys or values of "
                f"{heads} heads of {features} features, and {prefix.shape[-1]} projected ones, at `{self.site.key}` "
                f"(`{self.site.layer_path}`). Leave the site out, or use another method."
            )
        return prefix.to(own).view(*prefix.shape[:2], heads, features).transpose(1, 2).expand(size, -1, -1, -1)


def _extended_mask(mask: Tensor | None, bias: Tensor | None, prefix: Tensor, length: int) -> Tensor | None:
    """The mask of the scores, (..., L, S), with columns for the prefix, which all queries see but for its bias."""
    width = prefix.shape[-2]
    if bias is not None:  # (1 or B, P)
        bias = bias.clamp(min=torch.finfo(prefix.dtype).min).to(prefix.dtype)[:, None, None, :]
        mask = prefix.new_zeros(1, 1, 1, length) if mask is None else _additive(mask, prefix.dtype)
    if mask is None:
        return None
    if mask.shape[-1] == 1 != length:
        mask = mask.expand(*mask.shape[:-1], length)
    if bias is None:
        return F.pad(mask, (width, 0), value=mask.dtype == torch.bool)
    mask = mask.expand(max(len(mask), len(bias)), *mask.shape[1:])
    return torch.cat([bias.expand(*mask.shape[:-1], width).to(mask), mask], -1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _described(mask: Any) -> str:
    return f"a mask of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"`{type(mask).__name__}`"


class _Mode(TorchFunctionMode):
    """Meets the calls of torch's functions in one forward of an attention, in one thread.

    Python's `KeyboardInterrupt` passes by the hook that leaves it. What is left then meets nothing any more.
    """

    def __init__(self, slot: PrefixSlot, attention: nn.Module) -> None:
        super().__init__()
        self._slot = slot
        # A compiled graph has no frames, and no interrupts.
        self._frame = None if torch.compiler.is_compiling() else _frame_of(attention)

    def is_running(self) -> bool:
        """Whether the forward has not ended."""
        if self._frame is None or torch.compiler.is_compiling():
            return True
        frame: FrameType | None = sys._getframe()  # noqa: SLF001  there is no public name for it
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None


def _innermost() -> object:
    """The function mode that a call of torch's meets first in this thread."""
    return _get_current_function_mode()  # type: ignore[no-untyped-call]  # torch has no annotation there


def _frame_of(module: nn.Module) -> FrameType | None:
    """The frame in which a module is being called, among those of this thread; None where that cannot be seen."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001  as above
    while frame is not None and not (frame.f_code is _CALL and frame.f_locals.get("self") is module):
        frame = frame.f_back
    return frame


_CALL = nn.Module._call_impl.__code__  # noqa: SLF001  what calls a module's hooks and its forward


class _Attending(_Mode):
    """Meets the calls of `scaled_dot_product_attention`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.is_running():
            return self._slot.attend_fused(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Scoring(_Mode):
    """Meets the products and the softmax of a disentangled attention (DeBERTa).

    Its first product is that of queries and keys; either may be scaled already. Of the scores of a prefix only that one
    has a meaning: those of relative positions belong to keys with a position.
    """

    def __init__(self, slot: PrefixSlot, attention: Any) -> None:
        super().__init__(slot, attention)
        self._attention = attention
        self._query: Tensor | None = None
        self._values: Tensor | None = None
        self._is_scaled = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _SCORES or not self.is_running():
            return func(*args, **(kwargs or {}))
        if func in (torch.matmul, torch.bmm):
            if self._query is None:
                self._query, self._is_scaled = args[0], func is torch.matmul  # v2 scales the keys instead
            elif self._values is not None:
                own, values = args[1], self._values
                args = (args[0], torch.cat([values.reshape(*own.shape[:-2], *values.shape[-2:]), own], -2))
                self._values = None
        else:
            args = (self._extended(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def _extended(self, scores: Tensor) -> Tensor:
        """The scores (B, N, L, S) with columns for the prefix."""
        slot, query = self._slot, self._query
        assert query is not None
        slot.count()
        found = slot.prefix(scores[:, :, 0, 0])
        if found.keys is None or found.values is None:
            return scores
        query = query.reshape(*scores.shape[:3], -1)
        keys, self._values = (slot.in_heads(part, query) for part in (found.keys, found.values))
        more = query @ keys.mT
        if not self._is_scaled:
            more = more / math.sqrt(query.shape[-1] * (1 + len(self._attention.pos_att_type)))
        if found.bias is not None:
            more = more + found.bias.clamp(min=torch.finfo(more.dtype).min).to(more.dtype)[:, None, None, :]
        return torch.cat([more.to(scores.dtype), scores], -1)


_SCORES = frozenset({torch.matmul, torch.bmm, F.softmax})


@dataclass(frozen=True, slots=True)
class _Armed:
    """An attention with a slot."""

    attention: nn.Module
    slot: PrefixSlot

    def remove(self) -> None:
        """Take the slot away."""
        if self.attention.__dict__.get(ATTRIBUTE) is self.slot:
            del self.attention.__dict__[ATTRIBUTE]
            self.attention.__dict__.pop("_attn", None)
        self.slot.clear()
        _close(id(self.slot))


# The attention interface of transformers, which every model of the process shares

_LOCK = threading.RLock()
_OPENED: "dict[int, finalize[..., Any]]" = {}
"""The slots that ask for it, by identity; one that is forgotten without a word is taken off by its finaliser."""
_BEFORE: list[Any] = [None]
"""The `get_interface` in whose place ours stands, or stood."""


def _open(slot: PrefixSlot) -> None:
    with _LOCK:
        interface = _interface()
        if interface.get_interface is not _get_interface:
            _BEFORE[0] = interface.get_interface
            interface.get_interface = _get_interface
        ending = finalize(slot, _close, id(slot))
        ending.atexit = False
        _OPENED[id(slot)] = ending


def _close(slot: int) -> None:
    with _LOCK:
        ending = _OPENED.pop(slot, None)
        if ending is None:
            return
        ending.detach()
        if not _OPENED and _interface().get_interface is _get_interface:
            _interface().get_interface = _BEFORE[0]


def _interface() -> Any:
    """The class of the interfaces, which a model that uses one has imported."""
    return sys.modules["transformers.modeling_utils"].AttentionInterface


def _get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """The function that the interface would give, with a look at the attention that calls it."""
    function = _BEFORE[0](self, attn_implementation, default)
    return partial(_attend, function, attn_implementation)


def _attend(function: Callable[..., Any], implementation: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    slot = module.__dict__.get(ATTRIBUTE)
    if slot is None:
        return function(module, *args, **kwargs)
    return slot.attend_by_interface(function, implementation, module, *args, **kwargs)
