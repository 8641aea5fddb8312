"""Weights that are not plain tensors: quantised, sharded over processes, offloaded, or in a file."""

import os
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .core.errors import StateError

TRAINABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The types of weights that are not quantised."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether each of several processes holds a part of it, as `fully_shard` leaves a weight."""
    return hasattr(tensor, "full_tensor")


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight holds codes instead of its values: in its type, or inside a class of its own."""
    own_class = type(tensor) not in (Tensor, nn.Parameter, nn.Buffer)
    return tensor.dtype not in TRAINABLE or (own_class and not is_sharded(tensor))


def by_library(module: nn.Module) -> Tensor | None:
    """The values (out, in) of a linear map of codes, as the library of its codes gives them; None where none does."""
    weight: Any = module._parameters.get("weight")
    if weight is None or weight.is_meta:
        return None
    blocks = getattr(weight, "quant_state", None)
    if blocks is not None and not getattr(blocks, "packing_format_for_cpu", False):  # that one cannot be read
        four_bits: Tensor = sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, blocks)
        return four_bits
    # It goes from the weight to the state of the module in the first forward.
    scale = getattr(weight, "SCB", None)
    scale = getattr(getattr(module, "state", None), "SCB", None) if scale is None else scale
    if scale is not None:
        eight_bits: Tensor = weight.data * (scale[:, None] / 127)
        return eight_bits
    if type(weight).dequantize is not Tensor.dequantize:
        values: Tensor = weight.dequantize()
        return values
    return None


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


def is_skeleton(model: nn.Module) -> bool:
    """Whether a model has no weights at all: those that accelerate keeps elsewhere are on the meta device too."""
    return all(parameter.is_meta for parameter in model.parameters()) and not any(
        execution_device(module) for module in model.modules()
    )


_HEADER_LIMIT = 16 * 2**20


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `StateError` for a missing, truncated, corrupt or disguised one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with file.open("rb") as stream:
            head = stream.read(10)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise StateError(
            f"An adapter folder holds `{file.name}`; got `{file.parent}`: {error.strerror or error}. "
            "Save the adapter again."
        ) from None
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and not _is_header(head, size):
        raise StateError(
            f"`{file.name}` must be a safetensors file; got a pickle or zip archive at `{file}`. It was not opened, "
            "because a pickle can run code. Save the adapter again as safetensors."
        )
    if not _is_header(head, size):
        raise StateError(
            f"A safetensors file begins with the length of its header, at most {_HEADER_LIMIT:,} bytes and less than "
            f"the file; got {head[:8].hex() or 'nothing'} in {size:,} bytes at `{file}`. The file is damaged: copy it "
            "again."
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"`{file.name}` must be a whole safetensors file; got `{file}`: {error}. The file is damaged: "
            "copy it again."
        ) from None


def _is_header(head: bytes, size: int) -> bool:
    if len(head) < 10:
        return False
    length = struct.unpack("<Q", head[:8])[0]
    return 2 <= length <= min(_HEADER_LIMIT, size - 8) and head[8:9] == b"{"
