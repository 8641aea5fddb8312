"""What the base has for one role of a projection, as plain tensors, for methods that read it.

A quantised map is read by the library of its codes, or by running it on unit vectors, whatever they are; an offloaded
one from where accelerate keeps it. One that is spread over processes is read inside its layer's forward, where it is
whole; elsewhere it is refused.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .core.errors import SiteError
from .core.site import Projection
from .methods import Frozen
from .tensors import by_library, execution_device, is_quantised, is_sharded, kept_elsewhere

_CHUNK = 1024
"""Unit vectors that a quantised map is run on at once."""


@dataclass(frozen=True, slots=True)
class Base:
    """A projection of the base in one role; `owner` is the module at its path."""

    owner: nn.Module
    projection: Projection
    place: str
    """Its name in messages."""

    @torch.no_grad()
    def read(self) -> Frozen:
        """Its values now. Raises `SiteError` where they cannot be had."""
        name = self.projection.weight or "weight"
        holder, leaf = _holder(self.owner, name)
        weight = _value(holder, leaf)
        if weight is None or (is_quantised(weight) and not is_sharded(weight)):
            return self._of_quantised()
        bias = None if self.projection.weight else _value(self.owner, "bias")
        return self._in_role(
            self._whole(holder, leaf, weight), None if bias is None else self._whole(holder, "bias", bias)
        )

    def _whole(self, holder: nn.Module, name: str, tensor: Tensor) -> Tensor:
        if is_sharded(tensor):
            raise SiteError(
                "A method that reads the base reads it inside its layer's forward; got a weight that is spread over "
                f"processes at `{self.place}`. Shard whole layers, not single modules, or use LoRA."
            )
        if not tensor.is_meta:
            return tensor.detach()
        kept = kept_elsewhere(holder, name)
        return tensor.detach() if kept is None else kept.to(execution_device(holder))

    def _of_quantised(self) -> Frozen:
        """By the values of the map, W e_i + b and b."""
        if self.projection.weight:
            raise SiteError(
                "A method that reads the base reads weights in floating point, or of a linear module; got quantised "
                f"ones at `{self.place}`. Leave this projection out, or use LoRA."
            )
        known = by_library(self.owner)
        if known is not None:
            own = self.owner._parameters.get("bias")
            return self._in_role(known, None if own is None else own.detach(), transposed=False)
        example = next((p for p in (*self.owner.parameters(), *self.owner.buffers())), None)
        device = torch.device("cpu") if example is None else example.device
        size = self.projection.in_features
        run = self.owner.forward
        zero = torch.zeros(1, size, device=device)
        bias = run(zero)[0]
        pieces = [
            run(torch.eye(size, device=device)[start : start + _CHUNK]) - bias for start in range(0, size, _CHUNK)
        ]
        has_bias = getattr(self.owner, "bias", None) is not None
        return self._in_role(torch.cat(pieces), bias if has_bias else None, transposed=True)

    def _in_role(self, weight: Tensor, bias: Tensor | None, *, transposed: bool | None = None) -> Frozen:
        if self.projection.transposed if transposed is None else transposed:
            weight = weight.mT
        rows = self.projection.rows
        if rows is None:
            return Frozen(weight, bias)
        return Frozen(_rows(weight, rows), None if bias is None else _rows(bias, rows))


@dataclass(frozen=True, slots=True)
class OnBase:
    """A module that reads the base, as a function of a projection's input and output."""

    module: Any
    base: Base

    def __call__(self, inputs: Tensor, output: Tensor) -> Tensor:
        result: Tensor = self.module(inputs, output, self.base.read())
        return result


def _value(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, or what a module computes in the place of one (`torch.nn.utils.parametrize`)."""
    registered = module._parameters.get(name)  # first: an effective weight may stand before it
    found = getattr(module, name, None) if registered is None else registered
    return found if isinstance(found, Tensor) else None


def _holder(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _rows(tensor: Tensor, rows: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [tensor[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
