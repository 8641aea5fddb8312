"""Lets adapters act after a dropout that a layer applies itself, where no hook can be between it and the sum.

A hook on the branch hands the layer a tensor that waits for the layer's own call of `dropout`, with the layer's own
probability and random numbers: its result goes to the adapters, and theirs to the layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Undropped(Tensor):
    """A branch output (B, L, D) that is still to be dropped and adapted.

    The first operator that takes it adapts it, after dropping where that operator is `dropout`; what is asked of it
    before that (shape, type, device) it answers as the branch output does.
    """

    output: Tensor
    adapt: Callable[..., Tensor]
    given: tuple[Any, ...]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and isinstance(args[0], Undropped):
            waiting = args[0]
            return waiting.adapt(F.dropout(waiting.output, *args[1:], **kwargs), *waiting.given)
        if func in _QUESTIONS:
            return func(*_replaced(args, _output), **kwargs)
        if args and isinstance(args[0], Undropped) and _is_in_place(func.__name__):
            # What a hook of the user's changes in place is what the layer goes on with.
            args[0].output, args[0].adapt, args[0].given = _adapted(args[0]), _unchanged, ()
        return func(*_replaced(args, _adapted), **{name: _one(value, _adapted) for name, value in kwargs.items()})


_QUESTIONS = frozenset(
    {
        Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__, Tensor.is_cuda.__get__, Tensor.size, Tensor.dim, Tensor.numel,  # type: ignore[attr-defined]
        Tensor.is_floating_point, torch.is_floating_point,
    }
)  # fmt: skip


def undropped(output: Tensor, adapt: Callable[..., Tensor], *given: Any) -> Tensor:
    """A tensor in the place of `output` of which the layer gets `adapt(dropout(output), *given)`."""
    waiting: Undropped = output.as_subclass(Undropped)
    # Attributes, for the compiler can trace no `as_subclass` back to a plain tensor.
    waiting.output, waiting.adapt, waiting.given = output, adapt, given
    return waiting


def _is_in_place(name: str) -> bool:
    return name in _IN_PLACE if name.startswith("__") else name.endswith("_")


_IN_PLACE = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"})


def _unchanged(output: Tensor) -> Tensor:
    return output


def _output(waiting: Undropped) -> Tensor:
    return waiting.output


def _adapted(waiting: Undropped) -> Tensor:
    return waiting.adapt(waiting.output, *waiting.given)


def _one(value: Any, change: Callable[[Undropped], Tensor]) -> Any:
    if isinstance(value, Undropped):
        return change(value)
    return _replaced(value, change) if type(value) in (list, tuple) else value


def _replaced(values: Any, change: Callable[[Undropped], Tensor]) -> Any:
    return type(values)([_one(value, change) for value in values])
