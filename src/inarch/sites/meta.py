"""A copy of a model that has its structure and no weights: it runs in microseconds and needs no memory."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip

_PLAIN_ATTENTIONS = ("eager", "sdpa")
"""The implementations that need no kernel of their own."""


def meta_copy(model: nn.Module) -> nn.Module:
    """The model on the meta device, in eval mode and without hooks; tied parameters stay tied.

    A deep copy instead of a new model from the configuration: so models that were edited, written by hand or made by
    another library are copied as they are. Raises what `copy.deepcopy` raises for a model that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_empty(parameter.data), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = _empty(buffer)
    with _CopiesToMeta():
        twin = copy.deepcopy(model, memo)
    originals = {id(module) for module in model.modules()}
    if any(id(module) in originals for module in twin.modules()):
        raise TypeError(f"{type(model).__name__} has a module that a deep copy shares")
    for module in twin.modules():
        _simplify(module)
    return twin.eval()


def _simplify(module: nn.Module) -> None:
    """Leave out of a copy what cannot run without memory."""
    # A hook may close over the original model and its weights; what it adds is no part of the model.
    for name in _HOOKS:
        getattr(module, name).clear()
    # transformers installs the hooks by which a model hands out hidden states once, and marks that it has.
    module.__dict__.pop("_output_capturing_hooks_installed", None)
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) not in (None, *_PLAIN_ATTENTIONS):
        # Not by the model's public setter: that one may ask the hub for kernels.
        config._attn_implementation = _PLAIN_ATTENTIONS[0]  # type: ignore[union-attr]  # noqa: SLF001


def _empty(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.empty_like(tensor, device="meta")


class _CopiesToMeta(TorchFunctionMode):
    """Copies of tensors that are neither parameters nor buffers have no memory either."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            memo[id(tensor)] = _empty(tensor.detach())
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
