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

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_TRAINED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The types a weight has where it is not quantised."""

_PLAIN_ATTENTIONS = ("eager", "sdpa")
"""The implementations that need no kernel of their own."""


def meta_copy(model: nn.Module) -> nn.Module:
    """The model on the meta device, in eval mode and without hooks; tied parameters stay tied.

    A deep copy instead of a new model from the configuration: so models that were edited, written by hand or made by
    another library are copied as they are. Raises what `copy.deepcopy` raises for a model that cannot be copied.
    """
    memo: dict[int, Any] = {id(module): like for module in model.modules() if (like := _dequantised(module))}
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
    # What accelerate puts around a forward brings weights from where it keeps them, to a model that has none.
    if "_old_forward" in vars(module):
        vars(module).pop("_hf_hook", None)
        vars(module)["forward"] = vars(module).pop("_old_forward")
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
        if type(tensor) in _PLAIN:
            return torch.empty_like(tensor, device="meta")
        # Quantised and sharded tensors have the shape and type of what they stand for.
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _dequantised(module: nn.Module) -> nn.Module | None:
    """The plain linear map that a quantised one stands for; None for any other module.

    A quantised map is what has the sizes of a linear one and no weight of a type that one can have.
    """
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(inputs, int) or not isinstance(outputs, int) or any(module.children()):
        return None
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    weight = getattr(module, "weight", None)
    if not own or (isinstance(weight, Tensor) and weight.dtype in _TRAINED):
        return None
    return _Linear(inputs, outputs, bias=getattr(module, "bias", None) is not None)


class _Linear(nn.Linear):
    """A linear map without memory, of any type: quantised ones compute in the type of their input."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias, device="meta")
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


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
