"""Runs methods on the stream after a layer: the hook on the layer, and where its tokens stand.

A layer does not know which of its tokens are padding, or how many came in earlier calls. The modules around it do: they
are called with a mask and a cache. So while such an adapter is active, hooks on these modules look at both.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .bank import Argument, argument_of, refuse_replica, thread
from .compose import Cut, Cutter, Fuse, Setup, Take, run
from .core.errors import SetupError, SiteError
from .core.program import Program, Recorder, Register, apply, apply_all
from .core.site import Site
from .methods import Span, StreamMethod, Tokens

_MASK, _CACHE = "attention_mask", "past_key_values"
_OTHER_CACHES = ("cache_params", "mems", "state", "past_buckets_states")
_MASKED = -1e4
"""What is added to the scores of a token that is not looked at is below this."""
_FULL = "full_attention"
_MOST_UNREAD = 16


@dataclass(frozen=True, slots=True)
class _Flow:
    """What runs through a setup after a layer: the stream, and where its tokens stand."""

    stream: Register
    tokens: Register

    def part(self, cut: Cut, child: int) -> "_Flow":
        take = Take(cut, child)
        return _Flow(apply(take, self.stream), apply(take, self.tokens))

    def joined(self, cut: Cut, parts: Sequence["_Flow"]) -> "_Flow":
        return replace(self, stream=apply_all(cut.whole, [part.stream for part in parts]))

    def mean(self, results: Sequence["_Flow"], shares: Sequence[Fraction]) -> "_Flow":
        first, *others = [
            one.stream if share == 1 else one.stream * share for one, share in zip(results, shares, strict=True)
        ]
        return replace(self, stream=sum(others, start=first))

    def fused(self, block: Fuse, through: Callable[[Setup, "_Flow"], "_Flow"]) -> "_Flow":
        return self  # what is fused has nothing here


def stream_program(setup: Setup, modules: Mapping[str, StreamMethod], cutter: Cutter) -> Program:
    """What the stream methods of a setup make of a layer's stream, as a program of the stream and its tokens."""
    recorder = Recorder(2)

    def step(name: str, flow: _Flow) -> _Flow:
        if name not in modules:
            return flow
        return replace(flow, stream=recorder.call(modules[name], flow.stream, flow.tokens))

    return recorder.program(run(setup, _Flow(*recorder.arguments), step, cutter).stream)


class StreamSlot:
    """The hook on one layer."""

    def __init__(self, site: Site, program: Program, calls: "Calls") -> None:
        self._site, self._program, self._calls = site, program, calls

    def rewrite(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook on a layer: its result with the new stream in it."""
        refuse_replica(module)
        is_alone = isinstance(output, Tensor)
        stream = output if is_alone else output[0] if isinstance(output, tuple | list) and output else None
        if not isinstance(stream, Tensor) or stream.dim() != 3 or stream.shape[-1] != self._site.width:
            got = f"a tensor of shape {tuple(stream.shape)}" if isinstance(stream, Tensor) else type(output).__name__
            raise SiteError(
                "An adapter of the stream needs layers that give a sequence (B, L, D) each, alone or first in a tuple; "
                f"got {got} of `{self._site.layer_path}` for `{self._site.key}`, {self._site.width} wide. Use another "
                "method there."
            )
        new = self._program(stream, self._calls.tokens(stream))
        return new if is_alone else type(output)((new, *output[1:]))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a module around the layers was called with."""

    mask: Any
    start: Any
    """How many tokens its cache holds; None without one."""
    has_gradient: bool


class Calls:
    """Where the tokens of one stack stand in the calls of a model. Forwards in several threads each have their own."""

    def __init__(self, site: Site, *, wants_tensors: bool, minds_end: bool) -> None:
        """`wants_tensors`: a batch is cut, so a `Span` will not do; `minds_end`: the end of a prompt matters."""
        self._site, self._wants_tensors, self._minds_end = site, wants_tensors, minds_end
        self._open: dict[int, list[_Seen]] = {}
        self._tokens: dict[int, Tokens] = {}
        self._prompts: dict[int, int | None] = {}
        self._unread: list[Tokens] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running forward."""
        return self.__dict__ | {"_open": {}, "_tokens": {}, "_prompts": {}, "_unread": []}

    # The hooks

    def watch(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hooks on the modules around the layers of the stack."""
        for path in _around(self._site.layer_path):
            module = model.get_submodule(path)
            names = inspect.signature(module.forward).parameters
            wanted = [name for name in (_MASK, _CACHE, *_OTHER_CACHES) if name in names]
            if wanted:
                at = {name: argument_of(module, (name,)) for name in wanted}
                yield module.register_forward_pre_hook(partial(self.enter, at), with_kwargs=True)
                yield module.register_forward_hook(self.leave, always_call=True)
            if hasattr(module, "main_input_name"):  # what is around it may be called with masks of something else
                break

    def enter(
        self, at: Mapping[str, Argument], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Pre-hook on a module around the layers."""
        given = {
            name: args[place.position] if place.position < len(args) else kwargs.get(place.name)
            for name, place in at.items()
        }
        other = next((name for name in _OTHER_CACHES if given.get(name) is not None), None)
        if other is not None:
            raise SiteError(
                "An adapter of the stream must know how many tokens came in earlier calls; got a cache that does not "
                f"tell, `{other}`, at {type(module).__name__}. Call the model without it (`use_cache=False`)."
            )
        key = thread()
        cache = given.get(_CACHE)
        start = None if cache is None else cache.get_seq_length()
        if isinstance(start, Tensor):
            start = start.clone()  # the layers will change it
        self._open.setdefault(key, []).append(_Seen(given.get(_MASK), start, torch.is_grad_enabled()))
        self._tokens.pop(key, None)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook on a module around the layers, also called after an exception."""
        key = thread()
        opened = self._open.get(key)
        if opened:
            opened.pop()
            if not opened:
                del self._open[key]
        self._tokens.pop(key, None)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """A block in which the first call of the stack has the prompt, and later ones have what was generated too."""
        key = thread()
        if key in self._prompts:
            yield
            return
        self._prompts[key] = None
        try:
            yield
        finally:
            del self._prompts[key]

    # What slots ask

    def tokens(self, stream: Tensor) -> Tokens:
        """Where the tokens of a stream stand that a layer has just given."""
        key = thread()
        opened = self._open.get(key)
        if opened is None and _in_backward():
            return self._again(stream)
        found = self._tokens.get(key)
        if found is None:
            found = self._read(stream, opened or [], key)
            if opened is not None:
                self._tokens[key] = found
                if any(seen.has_gradient for seen in opened):  # checkpointing may have switched that off in here
                    self._remember(found)
        return found

    def _read(self, stream: Tensor, opened: list[_Seen], key: int) -> Tokens:
        dim = 1 - self._site.batch_dim
        count, samples = stream.shape[dim], stream.shape[1 - dim]
        start, mask = _innermost(opened)
        # What comes after tokens in a cache was generated, unless it is known better.
        prompt: Any = start if isinstance(start, Tensor) or start else count
        if self._minds_end and key in self._prompts:
            known = self._prompts[key]
            self._prompts[key] = prompt = start + count if known is None else known
        if mask is None and not isinstance(start, Tensor) and not self._wants_tensors:
            return Span(start, count, prompt)
        columns = torch.arange(count, device=stream.device) + start
        real = self._real(mask, samples, start, count, stream)
        numbers = real.long().cumsum(1)
        here = real.index_select(1, columns)
        before = torch.where(here, numbers.index_select(1, columns) - 1, -1)
        whole = (real & (torch.arange(real.shape[1], device=stream.device) < prompt)).sum(1, keepdim=True)
        after = torch.where(here & (columns < prompt), whole - 1 - before, -1)
        found = torch.stack((before, after), dim=-1)
        return found if dim == 1 else found.transpose(0, 1)

    def _real(self, mask: Tensor | None, samples: int, start: Any, count: int, stream: Tensor) -> Tensor:
        """Which columns of the sequence are no padding, (B, start + count)."""
        if mask is None:
            length = start + count if not isinstance(start, Tensor) else int(start) + count
            return torch.ones(samples, length, dtype=torch.bool, device=stream.device)
        if mask.dim() == 4:  # (B, 1 or heads, queries, L), true or zero where a token is looked at
            seen = mask if mask.dtype == torch.bool else mask > _MASKED
            real = seen.any(dim=1).any(dim=1)
        else:
            real = mask != 0
        is_short = not isinstance(start, Tensor) and real.shape[1] < start + count
        is_long = not isinstance(start, Tensor) and mask.dim() == 2 and real.shape[1] > start + count
        if is_short or is_long or real.shape[0] not in (1, samples):
            raise SiteError(
                "An adapter of the stream finds padding in a mask that has a column for every token so far, "
                f"({samples}, {start + count}); got one of shape {tuple(mask.shape)} at `{self._site.key}`. Call the "
                "model with such an `attention_mask`, or without padding and mask."
            )
        return real.to(stream.device).expand(samples, -1)

    # Layers that run again in a backward pass

    def _remember(self, tokens: Tokens) -> None:
        """Keep what a backward pass may ask for."""
        if torch.compiler.is_compiling():
            return
        if len(self._unread) >= _MOST_UNREAD:  # nothing was asked for so long: nothing is checkpointed
            self._unread.clear()
        self._unread.append(tokens)

    def _again(self, stream: Tensor) -> Tokens:
        known = self._unread
        if not known:
            return self._read(stream, [], thread())
        if any(not _equal(one, known[-1]) for one in known[:-1]):
            known.clear()
            raise SetupError(
                "Layers that run again in the backward pass take the padding of the last forward; got forwards of "
                f"other masks before it, at `{self._site.stack}`. Call `backward` after each forward, and run what has "
                "none under `torch.no_grad()`; or turn checkpointing off."
            )
        del known[:-1]
        return known[-1]


class Generating:
    """Stands in a model's `generate`, so that stacks know where its prompt ends."""

    def __init__(self, model: nn.Module, calls: Sequence[Calls]) -> None:
        self._model, self._calls = model, calls
        self._own = model.__dict__.get("generate")
        model.__dict__["generate"] = self.generate

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        model: Any = self._model
        own = self._own or partial(type(model).generate, model)
        config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        if chunk:
            raise SetupError(
                "The last tokens of a prompt are told where the prompt comes in one call; got "
                f"`prefill_chunk_size={chunk}` at {type(model).__name__}. Leave it out, or use an adapter with "
                "`suffix_positions=0`."
            )
        return self._inside(own, list(self._calls), args, kwargs)

    def _inside(self, own: Any, calls: list[Calls], args: Any, kwargs: Any) -> Any:
        if not calls:
            return own(*args, **kwargs)
        with calls[0].generating():
            return self._inside(own, calls[1:], args, kwargs)

    def remove(self) -> None:
        """Give the model its own `generate` back."""
        self._model.__dict__.pop("generate", None)
        if self._own is not None:
            self._model.__dict__["generate"] = self._own


def _around(path: str) -> list[str]:
    """The paths of the modules around one, the nearest first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:stop]) for stop in reversed(range(len(parts)))]


def _innermost(opened: list[_Seen]) -> tuple[Any, Tensor | None]:
    """What the nearest module with a cache, and the nearest with a mask, says; a mask of tokens before one of pairs."""
    start: Any = None
    mask: Tensor | None = None
    for seen in opened:  # the nearest last
        start = start if seen.start is None else seen.start
        found = _plain(seen.mask)
        if found is not None and (mask is None or found.dim() <= mask.dim()):
            mask = found
    return 0 if start is None else start, mask


def _plain(mask: Any) -> Tensor | None:
    """The mask of an argument: one of several by kind, or of a type of its own."""
    if isinstance(mask, Mapping):
        mask = mask.get(_FULL, next(iter(mask.values()), None))
    return mask if isinstance(mask, Tensor) and mask.dim() in (2, 4) else None


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # noqa: SLF001


def _equal(one: Tokens, other: Tokens) -> bool:
    if isinstance(one, Span) or isinstance(other, Span):
        return one is other or (isinstance(one, Span) and one == other)
    return one.shape == other.shape and torch.equal(one.cpu(), other.cpu())
