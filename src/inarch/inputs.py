"""The hooks of the input port: what changes the sequence of tokens before the layers of a stack see it.

A sequence is changed where token ids are embedded (`words`), where the model's embedding ends (`embedding`), or where
it enters a layer (`layer`, see `beside.py`). Tokens that the first two put in front are there for the layers alone: the
module that is called with the tokens is told of them by its mask and positions, and they are taken off where the layers
end, so that poolers, heads, labels and losses see the user's tokens at the user's positions. Of an encoder they are
kept for the decoder, which attends to them; its mask of the encoder's tokens is extended. In a cache they come first,
so a later token needs nothing but the longer mask.

Tensors: B batch, L tokens, P tokens that are put in front of them, D width.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .bank import Argument, OutputEmbeddings, argument_of, refuse_replica, thread
from .beside import arm_beside
from .compose import Average, Batch, Cut, Fuse, Place, Setup, Stack, Take, run
from .core.config import Config
from .core.errors import SetupError, SiteError
from .core.program import Program, Recorder, Register, apply, apply_all
from .core.site import Entry, Site, Sites
from .methods import InputMethod

_SHIFTED = ("position_ids", "cache_position")


@dataclass(frozen=True, slots=True)
class Armed:
    """A module of the input port, with its configuration and the entry of its stack."""

    config: Config
    entry: Entry | None
    module: InputMethod

    @property
    def point(self) -> str:
        return type(self.module).point(self.config, self.entry)

    @property
    def length(self) -> int:
        return type(self.module).length(self.config)


Modules = Mapping[str, Sequence[Armed]]
"""By adapter, in the order in which they act."""


def arm_inputs(
    model: nn.Module, sites: Sites, setup: Setup, found: Mapping[str, Modules], batch: Batch
) -> list[RemovableHandle]:
    """Register the hooks of the input port; `found` are its modules by site key. Returns what removes them."""
    handles = _arm_layers(model, sites, setup, found, batch)
    for key, modules in found.items():
        if all(one.point == "layer" for armed in modules.values() for one in armed):
            continue
        site, entry = sites[key], sites.entries.get(sites[key].stack)
        assert entry is not None
        cutter = Place(key, 0, batch).cut
        programs = Programs(
            words=_program(setup, _at(modules, "words"), cutter),
            embedding=_program(setup, _at(modules, "embedding"), cutter),
            later=_program(setup, _at(modules, "embedding", adds=False), cutter),
        )
        length = _length(setup, {name: sum(one.length for one in armed) for name, armed in modules.items()}, site)
        slot = EntrySlot(model, entry, programs, length)
        handles += _arm_embedding(model, site, entry, slot)
        if length:
            handles += _arm_tokens(model, sites, entry, slot)
        inverse = _inverse_program(setup, modules, cutter)
        if inverse.steps:
            handles += _arm_inverse(model, site, entry, inverse)
    return handles


def _arm_layers(
    model: nn.Module, sites: Sites, setup: Setup, found: Mapping[str, Modules], batch: Batch
) -> list[RemovableHandle]:
    """Register the hooks of what acts where a sequence enters a layer."""
    places: dict[str, dict[str, set[str]]] = {}
    programs: dict[str, dict[str, Program]] = {}
    for key, modules in found.items():
        at = {name: [one for one in armed if one.point == "layer"] for name, armed in modules.items()}
        if not any(at.values()):
            continue
        site = sites[key]
        _length(setup, {name: sum(one.length for one in armed) for name, armed in at.items()}, site)
        program = _program(setup, _at(modules, "layer"), Place(key, 0, batch).cut)
        programs.setdefault(site.stack, {})[key] = program
        for name in at:
            places.setdefault(site.stack, {}).setdefault(name, set()).add(key)
    for stack, by_name in places.items():
        (name, keys), *others = by_name.items()
        for other, theirs in others:
            if theirs != keys:
                raise SetupError(
                    "Prompts of one setup are new at the same layers; got "
                    f"{', '.join(f'`{key}`' for key in sorted(keys ^ theirs)[:3])} for only one of `{name}` and "
                    f"`{other}` in {setup}, in `{stack}`. Compose shallow ones with shallow ones."
                )
    return [handle for stack, made in programs.items() for handle in arm_beside(model, sites, stack, made)]


def _at(modules: Modules, point: str, *, adds: bool = True) -> dict[str, list[InputMethod]]:
    """The modules at a point; with `adds=False` those that add no tokens."""
    return {
        name: [one.module for one in armed if one.point == point and (adds or not one.length)]
        for name, armed in modules.items()
    }


# What a setup makes of a sequence


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What runs through a setup at the input: the sequence so far."""

    value: Register

    def part(self, cut: Cut, child: int) -> "_Tokens":
        return _Tokens(apply(Take(cut, child), self.value))

    def joined(self, cut: Cut, parts: Sequence["_Tokens"]) -> "_Tokens":
        return _Tokens(apply_all(cut.whole, [part.value for part in parts]))

    def mean(self, results: Sequence["_Tokens"], shares: Sequence[Fraction]) -> "_Tokens":
        pairs = zip(results, shares, strict=True)
        first, *others = [one.value if share == 1 else one.value * share for one, share in pairs]
        return _Tokens(sum(others, start=first))

    def fused(self, block: Fuse, through: Any) -> "_Tokens":
        return self  # what is fused has nothing at the input


def _program(setup: Setup, modules: Mapping[str, list[InputMethod]], cutter: Any, *, inverse: bool = False) -> Program:
    """What the modules of a setup make of a sequence, or, in the opposite order, their inverses."""
    recorder = Recorder(1)

    def step(name: str, tokens: _Tokens) -> _Tokens:
        found = modules.get(name, [])
        for module in reversed(found) if inverse else found:
            tokens = _Tokens(recorder.call(module.inverse if inverse else module, tokens.value))
        return tokens

    order = _reversed(setup) if inverse else setup
    return recorder.program(run(order, _Tokens(recorder.arguments[0]), step, cutter).value)


def _inverse_program(setup: Setup, modules: Modules, cutter: Any) -> Program:
    invertible = {name: [one.module for one in armed if one.module.is_invertible] for name, armed in modules.items()}
    return _program(setup, invertible, cutter, inverse=True)


def _reversed(setup: Setup) -> Setup:
    """The setup with what is stacked in the opposite order."""
    if isinstance(setup, str):
        return setup
    children = [_reversed(child) for child in setup.children]
    if isinstance(setup, Stack):
        return Stack(*reversed(children))
    return type(setup)(*children, **setup.settings())


def _length(setup: Setup, lengths: Mapping[str, int], site: Site) -> int:
    """P of a setup. Raises `SetupError` where its samples would get different numbers of tokens."""
    if isinstance(setup, str):
        return lengths.get(setup, 0)
    inside = [_length(child, lengths, site) for child in setup.children]
    if isinstance(setup, Stack | Fuse):
        return sum(inside)
    if isinstance(setup, Average) and sum(setup.shares()[: len(inside)]) != 1:
        inside.append(0)
    if len(set(inside)) > 1:
        raise SetupError(
            f"All samples of a batch get equally many tokens in front of them; got {inside} from {setup} at "
            f"`{site.key}`. Compose adapters that add the same number, in shares that add up to one."
        )
    return inside[0]


# The hooks


def _arm_embedding(model: nn.Module, site: Site, entry: Entry, slot: "EntrySlot") -> list[RemovableHandle]:
    """The hooks where the embedding ends: its module, or what enters the first layer."""
    if not slot.changes_embedding:
        return []
    if entry.embedding is not None:
        module = model.get_submodule(entry.embedding)
        return [
            module.register_forward_pre_hook(slot.tell_tokens, with_kwargs=True),
            module.register_forward_hook(slot.embedded),
        ]
    layer = model.get_submodule(site.layer_path)
    slot.watch(layer)
    return [layer.register_forward_pre_hook(slot.enter_layer, with_kwargs=True)]


def _arm_tokens(model: nn.Module, sites: Sites, entry: Entry, slot: "EntrySlot") -> list[RemovableHandle]:
    """The hooks that tell the stack of the tokens in front, and take them off where the layers end."""
    assert entry.caller is not None
    caller, runner = model.get_submodule(entry.caller), model.get_submodule(entry.runner)
    handles: list[RemovableHandle] = [caller.register_forward_pre_hook(slot.enter, with_kwargs=True)]
    readers = {site.stack for site in sites if site.kind == "cross_attention"}
    others = {other.caller for stack in readers if (other := sites.entries[stack]).caller is not None}
    slot.keeps = bool(others)
    if not others:
        handles += [module.register_forward_hook(slot.trim) for module in dict.fromkeys((runner, caller))]
    handles.append(caller.register_forward_hook(slot.leave, always_call=True))
    for path in others:
        decoder = model.get_submodule(path)
        handles.append(decoder.register_forward_pre_hook(slot.extend_memory, with_kwargs=True))
    return handles


def _arm_inverse(model: nn.Module, site: Site, entry: Entry, inverse: Program) -> list[RemovableHandle]:
    """The hooks on the output embeddings of the model and of its flexible heads, where there are some."""
    slot = InverseSlot(inverse)
    heads = [module for module in model.modules() if isinstance(module, OutputEmbeddings)]
    handles = [head.register_forward_pre_hook(slot.undo) for head in heads]
    find = getattr(model, "get_output_embeddings", None)
    output = find() if find is not None else None
    if output is None:
        return handles
    width = getattr(output, "in_features", entry.width)
    if width != entry.width:
        raise SiteError(
            "What is undone before the output embeddings has the width that they read; got an embedding of width "
            f"{entry.width} at `{site.key}` and output embeddings of {width} in {type(model).__name__}. Use an adapter "
            "without an invertible part."
        )
    return [*handles, output.register_forward_pre_hook(slot.undo)]


@dataclass(frozen=True, slots=True)
class Programs:
    """What a setup makes of the embedded token ids, and of what the model's embedding gives: of the whole sequence, and
    of later tokens, when those in front are in a cache."""

    words: Program
    embedding: Program
    later: Program


class EntrySlot(nn.Module):
    """The hooks on the modules between a model's tokens and the layers of one stack."""

    keeps = False
    """Whether the tokens in front stay in what the stack gives: a decoder attends to them."""

    def __init__(self, model: nn.Module, entry: Entry, programs: "Programs", length: int) -> None:
        super().__init__()
        self._programs, self._length = programs, length
        # Whether tokens have got their positions before others are put in front of them.
        self._keeps_positions = not programs.words.steps
        self._place = type(model).__name__
        self._table = None if entry.words is None else [model.get_submodule(entry.words)]
        self._layer = Argument()
        self._running: dict[int, int] = {}
        caller = None if entry.caller is None else model.get_submodule(entry.caller)
        self._names = () if caller is None else tuple(inspect.signature(caller.forward).parameters)
        inner = None if entry.embedding is None else model.get_submodule(entry.embedding)
        self._of_embedding = frozenset() if inner is None else frozenset(inspect.signature(inner.forward).parameters)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running forward."""
        return self.__dict__ | {"_running": {}}

    @property
    def changes_embedding(self) -> bool:
        """Whether anything is done where the embedding ends."""
        return bool(self._programs.embedding.steps)

    def watch(self, layer: nn.Module) -> None:
        """Say into which layer the sequence comes as the first argument, for `enter_layer`."""
        self._layer = argument_of(layer, (0,))

    # What changes the embedded sequence

    def tell_tokens(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook on the embedding: of the user's tokens, how many are in a cache, and the mask."""
        past, total = kwargs.get("past_key_values_length"), self._running.get(thread())
        if past:
            return args, kwargs | {"past_key_values_length": past - self._length}
        masks = {name: value for name, value in kwargs.items() if "mask" in name and isinstance(value, Tensor)}
        cut = {name: mask[:, self._length :] for name, mask in masks.items() if mask.dim() == 2}
        return args, kwargs | {name: mask for name, mask in cut.items() if masks[name].shape[1] == total}

    def embedded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook on the embedding: the sequence (B, P + L, D) for the one (B, L, D) that it gives."""
        refuse_replica(module)
        is_later = self._length and self._running.get(thread()) is None  # with the tokens in front in a cache
        program = self._programs.later if is_later else self._programs.embedding
        return program(output) if isinstance(output, Tensor) else (program(output[0]), *output[1:])

    def enter_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook on the first layer, where no module gives the embedded sequence."""
        refuse_replica(module)
        if args:
            return (self._programs.embedding(args[0]), *args[1:]), kwargs
        name = self._layer.name
        return (), kwargs | {name: self._programs.embedding(kwargs[name])}

    # What tells the stack of tokens in front

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook on the module that is called with the tokens."""
        refuse_replica(module)
        given = dict(zip(self._names, args, strict=False)) | kwargs
        ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
        tokens = ids if embedded is None else embedded
        if not isinstance(tokens, Tensor):
            return args, kwargs  # the model says what is missing
        ids = None if ids is None else ids.view(-1, ids.shape[-1])
        cache, length = given.get("past_key_values"), tokens.shape[1] if embedded is not None else tokens.shape[-1]
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if (
            self._keeps_positions
            and not seen
            and given.get("attention_mask") is None
            and "attention_mask" in self._names
        ):
            # Else a model may make one of the ids, which are fewer than what the embedding gives.
            given["attention_mask"] = torch.ones(tokens.shape[0], length, dtype=torch.long, device=tokens.device)
        if "attention_mask" in given:
            given["attention_mask"] = self._mask(given["attention_mask"], length + (seen and seen - self._length))
        for name in _SHIFTED:
            if given.get(name) is not None and not (self._keeps_positions and name in self._of_embedding):
                given[name] = self._positions(given[name], starts=not seen)
        if seen:
            return (), given
        self._running[thread()] = length + self._length
        for name, value in given.items():
            self._check(name, value, tokens, length)
        if not self._keeps_positions:
            assert self._table is not None
            whole = self._programs.words(self._table[0](ids) if embedded is None else embedded)
            mask = given.get("attention_mask")
            if self.keeps and mask is not None:
                order = _behind_padding(mask, self._length)
                given["attention_mask"] = mask.take_along_dim(order, 1)
                whole = whole.take_along_dim(order[..., None], 1)
            given["inputs_embeds"] = whole
            given["input_ids"] = None
            if given.get("token_type_ids") is not None:
                given["token_type_ids"] = _in_front(given["token_type_ids"], self._length, 0)
        return (), given

    def _mask(self, mask: Any, total: int) -> Any:
        """The mask with the tokens in front; without them it has `total`, those in a cache included."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise SetupError(
                f"A mask of tokens is extended by those in front of them; got `attention_mask` of {shape} at "
                f"{self._place}. Pass one of shape (B, L), and use a cache that grows."
            )
        if mask.shape[1] != total:
            raise SetupError(
                f"A mask has a value for every token, and a cache begins with the tokens in front; got a mask of "
                f"{mask.shape[1]} tokens for {total} at {self._place}. Run the whole generation with one setup active, "
                "and without a draft model."
            )
        return _in_front(mask, self._length, 1)

    def _positions(self, positions: Tensor, *, starts: bool) -> Tensor:
        """Positions behind those of the tokens in front, with these where the sequence starts."""
        shifted = positions + self._length
        if not starts:
            return shifted
        front = torch.arange(self._length, dtype=positions.dtype, device=positions.device)
        return torch.cat((front.expand(*positions.shape[:-1], -1), shifted), dim=-1)

    def _check(self, name: str, value: Any, tokens: Tensor, length: int) -> None:
        """Raise `SetupError` for an argument of one value for each token that nobody knows to extend."""
        known = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", *_SHIFTED)
        if name in known or name in self._of_embedding or not isinstance(value, Tensor) or value.dim() < 2:
            return
        if value.shape[:2] == (tokens.shape[0], length) and not name.startswith("encoder_"):
            raise SetupError(
                f"Arguments with a value for each token are extended where their meaning is known; got `{name}` of "
                f"shape {tuple(value.shape)} at {self._place}. Leave it out, or use an adapter without tokens in front."
            )

    def trim(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook where the layers end: what belongs to the user's tokens."""
        total = self._running.get(thread())
        if total is None:
            return None
        if isinstance(output, Tensor | tuple):
            return _trimmed(output, self._length, total)
        for name in ("last_hidden_state", "hidden_states"):
            found = getattr(output, name, None)
            if found is not None:
                setattr(output, name, _trimmed(found, self._length, total))
        return None

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook on the module that is called with the tokens, also after an exception."""
        self._running.pop(thread(), None)

    def extend_memory(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook on a decoder that attends to what the stack gives: the mask of that."""
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if isinstance(mask, Tensor) and isinstance(states, Tensor) and mask.dim() == 2:
            missing = states.shape[1] - mask.shape[1]
            if missing == self._length:
                mask = _in_front(mask, missing, 1)
                if not self._keeps_positions:
                    mask = mask.take_along_dim(_behind_padding(mask, missing), 1)
                kwargs = kwargs | {"encoder_attention_mask": mask}
        return args, kwargs


def _in_front(values: Tensor, count: int, value: int) -> Tensor:
    """(B, L) -> (B, P + L)."""
    return torch.cat((values.new_full((values.shape[0], count), value), values), dim=1)


def _behind_padding(mask: Tensor, count: int) -> Tensor:
    """For each place of a sequence, where its token is now, (B, P + L): tokens in front go behind any padding.

    Encoders count positions by places, so prompts and text would be further apart the more padding there is between
    them. (Decoders are told positions.) `mask` is that of the tokens in front and the others.
    """
    padding = (mask[:, count:].cumsum(1) == 0).sum(1, keepdim=True)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    behind = torch.where(places < padding + count, places - padding, places)
    return torch.where(places < padding, places + count, behind)


def _trimmed(value: Any, count: int, total: int) -> Any:
    """A result without the first tokens of its sequences (B, P + L, D)."""
    if isinstance(value, Tensor):
        # Contiguous: torch multiplies a view by a frozen matrix in another order, with another last bit.
        return value[:, count:].contiguous() if value.dim() == 3 and value.shape[1] == total else value
    return tuple(_trimmed(item, count, total) for item in value) if type(value) is tuple else value


class InverseSlot(nn.Module):
    """The hook that undoes invertible maps before the output embeddings."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program

    def undo(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook: what the output embeddings get, (B, L, D)."""
        return (self._program(args[0]), *args[1:])
