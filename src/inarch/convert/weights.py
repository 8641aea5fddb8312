"""Reads the tensors of foreign adapter folders: safetensors, or a torch file of nothing but tensors.

A torch file is a pickle. It is opened by torch's restricted unpickler, which makes tensors and plain containers and
calls nothing else; whatever asks for more is refused unopened.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import StateError
from ..tensors import read_tensors


def read_weights(folder: Path, safe_name: str, torch_name: str) -> dict[str, Tensor]:
    """The tensors of a folder, from its safetensors file if it has one.

    Raises `StateError` if there is neither file, or what is there is damaged or holds anything but dense tensors of
    floating point numbers.
    """
    if (folder / safe_name).is_file():
        return _checked(read_tensors(folder / safe_name), folder / safe_name)
    if (folder / torch_name).is_file():
        return _checked(_read_torch(folder / torch_name), folder / torch_name)
    raise StateError(
        f"The weights of an adapter lie in `{safe_name}` or `{torch_name}`; got neither in `{folder}`. "
        "Give the whole folder that was saved."
    )


def read_tensor(folder: Path, safe_name: str, torch_name: str, key: str) -> Tensor:
    """The one tensor of a folder: under `key` in its safetensors file, or by itself in a torch file.

    Raises `StateError` as `read_weights` does.
    """
    if (folder / safe_name).is_file() or not (folder / torch_name).is_file():
        tensors = read_weights(folder, safe_name, torch_name)
        if key not in tensors:
            raise StateError(f"`{safe_name}` must hold `{key}`; got none at `{folder}`. Save it again.")
        return tensors[key]
    found = _read_torch(folder / torch_name)
    return _checked({key: found}, folder / torch_name)[key].detach()


def _read_torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  the unpickler fails in as many ways as a file can be damaged or crafted
        raise StateError(
            f"`{file.name}` must be a torch file of nothing but tensors; got `{file}`, which is none: "
            f"{_reason(error)}. Nothing in it was run. Get it as safetensors from a source you trust, or delete it."
        ) from None


def _reason(error: Exception) -> str:
    """What went wrong, without the advice to switch the protection off that torch adds."""
    text = str(error).strip()
    for _, _, rest in (text.partition("WeightsUnpickler error: "), text.partition("load: ")):
        text = rest or text
    return text.splitlines()[0].split(". ")[0] if text else type(error).__name__


def _checked(found: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise StateError(
            f"`{file.name}` must hold tensors by name; got {type(found).__name__} at `{file}`. Save the adapter again."
        )
    for key, value in found.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
            got = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise StateError(
                f"`{file.name}` must hold dense tensors of floating point numbers; got {got} for `{key}` at `{file}`. "
                "Save the adapter again."
            )
    return dict(found)
