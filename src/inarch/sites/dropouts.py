"""Calls of torch's `dropout`, seen where Python makes them: in eval mode they leave no trace among the operators."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .graph import Call, Graph


class SeesDropout(TorchFunctionMode):
    """Calls `note` with whatever is given to `torch.nn.functional.dropout`, by a module or by other code."""

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.dropout:
            self._note(args[0])
        return func(*args, **(kwargs or {}))


def is_dropped(graph: Graph, value: int, after: Call, before: int) -> bool:
    """Whether a dropout takes a value, which the call `after` returned, before the value `before` is there."""
    return any(
        dropout.value == value and dropout.returned > after.returned and dropout.at <= before
        for dropout in graph.dropouts
    )
