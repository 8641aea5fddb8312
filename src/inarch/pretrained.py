"""Keeps two promises of a transformers model with adapters at once.

What `save_pretrained` writes loads with a plain `from_pretrained` as the base model, without an unexpected key; and no
adapter is lost by it. So the base goes where it always goes and every adapter into `adapters/<name>` beside it. A
checkpoint of the plain `Trainer`, which the trainer reads back with `load_state_dict(strict=False)`, gets the trainable
tensors and the adapters in `pytorch_model.bin` too, the one file the trainer prefers to a sharded base and
`from_pretrained` does not.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .bank import CHILD
from .core.errors import StateError


class Handle(Protocol):
    """What the door needs of the handle of a model."""

    model: nn.Module

    @property
    def names(self) -> tuple[str, ...]: ...
    def save(self, name: str, folder: str | os.PathLike[str]) -> None: ...


logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_WHOLE, _INDEX, _SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"
FOLDER = "adapters"


def is_ours(key: str) -> bool:
    """Whether a key of a model's state dict belongs to an adapter."""
    return f".{CHILD}." in f".{key}"


class Door:
    """Stands in `save_pretrained` and `load_state_dict` of one model while it has adapters."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        model = handle.model
        self._hooks: list[RemovableHandle] = [
            model.register_load_state_dict_post_hook(self.after_load)  # type: ignore[no-untyped-call]
        ]
        if hasattr(model, "save_pretrained"):
            model.__dict__["save_pretrained"] = self.save_pretrained

    def close(self) -> None:
        """Give the model its own methods back."""
        for hook in self._hooks:
            hook.remove()
        self._handle.model.__dict__.pop("save_pretrained", None)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """The model's own `save_pretrained` for the base, and a folder for each adapter."""
        handle = self._handle
        model = handle.model
        given = kwargs.pop("state_dict", None)
        tensors = model.state_dict() if given is None else given
        base = {key: value for key, value in tensors.items() if not is_ours(key)}
        own: Any = type(model)
        result = own.save_pretrained(model, save_directory, *args, state_dict=base, **kwargs)
        if kwargs.get("is_main_process", True):
            folder = Path(save_directory)
            for name in handle.names:
                handle.save(name, folder / FOLDER / name)
            if _CHECKPOINT.fullmatch(folder.name):
                _make_resumable(folder, model, tensors)
        return result

    def after_load(self, module: nn.Module, incompatible: Any) -> None:
        """Refuse a state dict without the adapters; do not report a frozen base that a checkpoint leaves out."""
        absent = [key for key in incompatible.missing_keys if is_ours(key)]
        if absent:
            raise StateError(
                f"A state dict for a model with adapters holds them all; got none for {len(absent)} tensors, first "
                f"`{absent[0]}`. Call `detach()` to load a base model, or `adapters.load` to load an adapter."
            )
        if self._handle.names and _is_partial(module, incompatible.missing_keys):
            incompatible.missing_keys.clear()


def _is_partial(module: nn.Module, missing: list[str]) -> bool:
    """Whether all that is missing is frozen, as in a checkpoint of adapters alone."""
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return not trainable & set(missing)


def _make_resumable(folder: Path, model: nn.Module, tensors: dict[str, Any]) -> None:
    whole = folder / _WHOLE
    if whole.exists():
        whole.replace(folder / _SHARD)
        from safetensors import safe_open

        with safe_open(folder / _SHARD, framework="pt") as file:
            keys = list(file.keys())
        index = {
            "metadata": {"total_size": (folder / _SHARD).stat().st_size},
            "weight_map": dict.fromkeys(keys, _SHARD),
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = {key: value for key, value in tensors.items() if is_ours(key) or key in trained}
    torch.save(kept, folder / "pytorch_model.bin")
