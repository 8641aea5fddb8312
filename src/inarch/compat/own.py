"""Calls in the form of transformers' own methods of the same name, which go to the class of the model."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.errors import SetupError

OF_TRANSFORMERS = frozenset({"peft_model_id", "adapter_name", "peft_config", "adapter_state_dict", "adapter_config"})
"""Arguments that the methods of transformers of the same name take, and those of `adapters` do not."""


def own_method(model: nn.Module, name: str) -> Callable[..., Any]:
    """The method of that name that the model's class has."""
    found = getattr(type(model), name, None)
    if found is None:
        raise SetupError(
            f"A call in the form of transformers needs its method; got none named `{name}` for "
            f"{type(model).__name__}. Call it in the form of `adapters`."
        )
    return found.__get__(model)  # type: ignore[no-any-return]
