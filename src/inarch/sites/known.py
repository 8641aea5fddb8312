"""What is known of tensors without memory: token ids, positions and masks keep their values.

A model whose Python asks whether the mask has padding, or how many image tokens there are, so runs without weights.
Only what comes from the weights, such as the choice of an expert, is unknown.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

_MOST_ELEMENTS = 2**16
_MOST_FLOATS = 2**10
"""Few: floating tensors of this size are frequencies and bounds, not activations."""

UNKNOWN = object()

_NEEDS_DATA = re.compile(r"meta|data.dependent", re.IGNORECASE)


def needs_data(error: Exception) -> bool:
    """Whether a forward without weights failed because it has none."""
    return bool(_NEEDS_DATA.search(f"{type(error).__name__} {error}"))


class Known:
    """The values of small tensors on the meta device."""

    def __init__(self) -> None:
        self._values: dict[int, Tensor] = {}

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Let `tensor`, which must live on, have the value of another of its shape and type."""
        if tensor.is_meta and not value.is_meta and _is_small(value):
            self._values[id(tensor)] = value.detach().cpu().clone()

    def value(self, tensor: Tensor) -> Tensor | None:
        """The value of a tensor, None if it is not known."""
        return self._value(tensor) if self._knows(tensor) else None

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors for unknown from now on."""
        for tensor in tensors:
            self._values.pop(id(tensor), None)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
        """Run an operator on tensors without memory, and on their values as far as these are known.

        Returns the result, and whether its values are known too: those written to are unknown otherwise. Where the
        operator needs values (a number for Python, a shape that depends on data) and they are known, it gets them.
        """
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError):
            values = self._evaluate(func, args, kwargs)
            if values is UNKNOWN:
                return self._with_known_masks(func, args, kwargs), False
            stays = torch.device(kwargs.get("device") or "meta").type != "meta"
            result = values if stays else tree_map_only(Tensor, lambda value: value.to("meta"), values)
        else:
            if not all(_is_small(tensor) for tensor in _tensors(result)):
                return result, False
            values = self._evaluate(func, args, kwargs)
        if values is UNKNOWN:
            return result, False
        for tensor, value in zip(_tensors(result), _tensors(values), strict=True):
            if tensor.is_meta:
                self._values[id(tensor)] = value
        return result, True

    def _evaluate(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        tensors = _tensors((args, kwargs))
        makes_meta = torch.device(kwargs.get("device") or "cpu").type == "meta"
        on_meta = makes_meta or any(tensor.is_meta for tensor in tensors)
        if not on_meta or not all(self._knows(tensor) for tensor in tensors) or _is_arbitrary(func):
            return UNKNOWN
        real_args, real_kwargs = tree_map_only(Tensor, self._value, (args, dict(kwargs)))
        if real_kwargs.get("device") is not None:
            real_kwargs["device"] = torch.device("cpu")
        return func(*real_args, **real_kwargs)

    def _knows(self, tensor: Tensor) -> bool:
        return not tensor.is_meta or id(tensor) in self._values

    def _value(self, tensor: Tensor) -> Tensor:
        return self._values[id(tensor)] if tensor.is_meta else tensor

    def _with_known_masks(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator that indexes with a mask: where the mask is known, with what it selects."""

        def places(index: Any) -> list[Any]:
            if isinstance(index, Tensor) and index.dtype == torch.bool and self._knows(index):
                return [place.to("meta") for place in self._value(index).nonzero(as_tuple=True)]
            return [index]

        indexed = [
            [place for index in arg for place in places(index)] if isinstance(arg, (list, tuple)) else arg
            for arg in args
        ]
        return func(*indexed, **kwargs)


class RunsKnown(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, a model without memory runs with the values that are known."""

    def __init__(self, known: Known) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known
        self._alive: list[Any] = []  # values are known by a tensor's identity, which must not be used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = self._known.run(func, args, kwargs or {})[0]
        self._alive.append(result)
        return result


class KeepsNumbers(TorchFunctionMode):
    """Keeps what Python writes into tensors, `tensor[..., [0, 2]]` and `torch.tensor([2], device=...)`: on the meta
    device torch forgets it at once."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__ and args[0].is_meta:
            args = (args[0], _as_places(args[1]))
        elif func is torch.tensor and not _tensors(args) and _is_for_meta(kwargs or {}):
            return func(*args, **{**(kwargs or {}), "device": "cpu"}).to("meta")
        return func(*args, **(kwargs or {}))


def _is_for_meta(kwargs: Mapping[str, Any]) -> bool:
    return torch.device(kwargs.get("device") or "cpu").type == "meta"


def _as_places(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_as_places(part) for part in index)
    if isinstance(index, list) and index and all(type(place) is int for place in index):
        return torch.tensor(index)
    return index


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= (_MOST_FLOATS if tensor.is_floating_point() else _MOST_ELEMENTS)


def _is_arbitrary(func: Any) -> bool:
    """Whether the operator's result is random or uninitialised."""
    return torch.Tag.nondeterministic_seeded in func.tags or "empty" in str(func)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]
