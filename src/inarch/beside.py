"""Tokens that only the layers of a stack see: put in front of the others before a layer, taken off behind it.

What the layer makes of them is kept until the next layer takes it up, unless that has new ones. So whatever stands
between or behind the layers (recorded hidden states, feature maps, poolers, heads) sees the user's tokens alone. An
attention mask among a layer's arguments, and the bias that a module of it gives for relative positions, are extended.

Tensors: B batch, L tokens, P tokens in front of them, D width, H heads.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .bank import argument_of, refuse_replica, thread
from .core.errors import SetupError, SiteError
from .core.program import Program
from .core.site import Site, Sites

_TABLE = "relative_position_bias_table"
"""The parameter of a module that gives a bias (1, H, L, L) for the relative positions of tokens."""


def arm_beside(model: nn.Module, sites: Sites, stack: str, programs: Mapping[str, Program]) -> list[RemovableHandle]:
    """Register the hooks on the layers of a stack; `programs` put tokens in front, by site key."""
    layers: dict[int, Site] = {}
    for site in sites:
        if site.stack == stack:
            layers.setdefault(site.layer, site)
    order = [layers[number] for number in sorted(layers)]
    start = min(place for place, site in enumerate(order) if site.key in programs)
    order = order[start:]
    carried = Carried()
    handles: list[RemovableHandle] = []
    for place, site in enumerate(order):
        layer = model.get_submodule(site.layer_path)
        goes_on = place + 1 < len(order) and order[place + 1].key not in programs
        slot = BesideSlot(site, layer, programs.get(site.key), carried, goes_on=goes_on)
        handles.append(layer.register_forward_pre_hook(slot.enter, with_kwargs=True, prepend=True))
        handles.append(layer.register_forward_hook(slot.leave, prepend=True))
        for module in layer.modules():
            if _TABLE in module._parameters:
                handles.append(module.register_forward_pre_hook(slot.tell_length, with_kwargs=True))
                handles.append(module.register_forward_hook(slot.extend_bias))
    # What records hidden states takes the first of them from the arguments of the first layer.
    path = order[0].layer_path.split(".")[:-1]
    owners = dict.fromkeys(model.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1))
    handles += [owner.register_forward_hook(carried.trim_first) for owner in owners]
    return handles


class Carried(nn.Module):
    """What goes from layer to layer beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[int, Tensor] = {}
        self.lengths: dict[int, tuple[int, int]] = {}
        """P and L of the last layer that ran."""

    def __getstate__(self) -> dict[str, Any]:
        """Without tensors of a forward, which belong to no copy."""
        return self.__dict__ | {"tokens": {}, "lengths": {}}

    def trim_first(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook on a module around the layers: the first hidden state that it has recorded."""
        states = getattr(output, "hidden_states", None)
        if not isinstance(states, tuple) or not states:
            return
        count, length = self.lengths.get(thread(), (0, 0))
        first = states[0]
        if isinstance(first, Tensor) and first.dim() == 3 and first.shape[1] == count + length:
            output.hidden_states = (first[:, count:], *states[1:])


class BesideSlot(nn.Module):
    """The hooks on one layer."""

    def __init__(
        self, site: Site, layer: nn.Module, program: Program | None, carried: Carried, *, goes_on: bool
    ) -> None:
        super().__init__()
        self._place = f"`{site.key}` (`{site.layer_path}`)"
        self._program, self._carried, self._goes_on = program, carried, goes_on
        self._stream = argument_of(layer, (0,)).name
        names = argument_names(layer)
        self._masks = frozenset(name for name in names if "mask" in name or "bias" in name)
        self._positions = tuple(place for place, name in enumerate(names) if name in self._masks)

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook on the layer: its sequence with the tokens in front."""
        refuse_replica(module)
        tokens = args[0] if args else kwargs[self._stream]
        whole = self._extended(tokens)
        length = tokens.shape[1]
        count = whole.shape[1] - length
        self._carried.lengths[thread()] = count, length
        for name in self._masks & kwargs.keys():
            kwargs = kwargs | {name: _padded(kwargs[name], count, length)}
        if not args:
            return args, kwargs | {self._stream: whole}
        rest = [_padded(one, count, length) if n in self._positions else one for n, one in enumerate(args)][1:]
        return (whole, *rest), kwargs

    def _extended(self, tokens: Any) -> Tensor:
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise SiteError(
                f"Tokens are put in front of a sequence (B, L, D); got {shape} for the layer of {self._place}. Use a "
                "plain Transformer, or another method."
            )
        if self._program is not None:
            whole: Tensor = self._program(tokens)
            return whole
        front = self._carried.tokens.pop(thread(), None)
        if front is None:
            raise SetupError(
                f"Tokens in front of a sequence come from the layer before; got none at {self._place}. Run the layers "
                "in their order; where they run again in the backward pass, use `vpt_deep`, or a release of "
                "transformers whose checkpointing leaves hooks outside."
            )
        return torch.cat((front, tokens), dim=1)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook on the layer: the user's tokens of what it gives."""
        count, length = self._carried.lengths[thread()]
        whole = output if isinstance(output, Tensor) else output[0]
        if not isinstance(whole, Tensor) or whole.dim() != 3 or whole.shape[1] != count + length:
            shape = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
            raise SiteError(
                f"A layer gives a sequence as long as the one that it gets; got {shape} for {count + length} tokens at "
                f"{self._place}. Use a plain Transformer, or another method."
            )
        if self._goes_on:
            self._carried.tokens[thread()] = whole[:, :count]
        rest = whole[:, count:]
        return rest if isinstance(output, Tensor) else (rest, *output[1:])

    def tell_length(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook on what gives a bias of relative positions: how many tokens have one."""
        count, length = self._carried.lengths[thread()]
        return args, kwargs | {"dim_size": length} if kwargs.get("dim_size") == count + length else kwargs

    def extend_bias(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook on what gives a bias of relative positions: zero for the tokens in front."""
        return _padded(output, *self._carried.lengths[thread()])


def _padded(mask: Any, count: int, length: int) -> Any:
    """A mask or bias (..., L, L) or (..., 1, L) that lets all tokens see those in front, and these what anyone sees.

    Numbers are added to scores, so they are zero; truth says what is seen.
    """
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[-1] != length:
        return mask
    if mask.shape[-2] == length and mask.dim() > 2:
        if mask.dtype == torch.bool:
            rows = mask.any(-2, keepdim=True)
        else:
            is_seen = (mask > torch.finfo(mask.dtype).min / 2).any(-2, keepdim=True)
            rows = mask[..., :1, :].masked_fill(is_seen, 0.0)
        mask = torch.cat((rows.expand(*mask.shape[:-2], count, length), mask), dim=-2)
    return F.pad(mask, (count, 0), value=True if mask.dtype == torch.bool else 0.0)


def argument_names(module: nn.Module) -> Sequence[str]:
    """The names of what a module is called with, in their order."""
    return tuple(inspect.signature(module.forward).parameters)
