"""Weights that are not plain tensors: quantised, sharded over processes, or offloaded."""

import torch
from torch import Tensor, nn

TRAINABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The types of weights that are not quantised."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether each of several processes holds a part of it, as `fully_shard` leaves a weight."""
    return hasattr(tensor, "full_tensor")


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight holds codes instead of its values: in its type, or inside a class of its own."""
    own_class = type(tensor) not in (Tensor, nn.Parameter, nn.Buffer)
    return tensor.dtype not in TRAINABLE or (own_class and not is_sharded(tensor))


def whole(tensor: Tensor) -> Tensor:
    """The values of a tensor. If it is sharded, every process must call this, and gets all of them."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def copy_into(target: Tensor, values: Tensor) -> None:
    """Overwrite a weight, also one of which this process holds a part."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(
            values.to(target.device, target.dtype),
            target.device_mesh,  # type: ignore[attr-defined]
            target.placements,  # type: ignore[attr-defined]
        )
    with torch.no_grad():
        target.copy_(values)


def kept_elsewhere(module: nn.Module, name: str) -> Tensor | None:
    """The values of a weight that accelerate keeps elsewhere between forwards; None for one without its hook."""
    hook = getattr(module, "_hf_hook", None)
    maps = [getattr(part, "weights_map", None) for part in getattr(hook, "hooks", (hook,))]
    found = next((weights[name] for weights in maps if weights is not None and name in weights), None)
    return None if found is None else torch.as_tensor(found)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module whose weights it keeps elsewhere; None for one without its hook."""
    hook = getattr(module, "_hf_hook", None)
    found = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,))]
    return next((torch.device(device) for device in found if device is not None), None)
