"""Keeps two promises of a transformers model with adapters at once.

What `save_pretrained` writes loads with a plain `from_pretrained` as the base model, without an unexpected key; and no
adapter is lost by it. So the base goes where it always goes and every adapter into `adapters/<name>` beside it. A
checkpoint of the plain `Trainer`, which the trainer reads back with `load_state_dict(strict=False)`, gets the trainable
tensors and the adapters in `pytorch_model.bin` too, the one file the trainer prefers to a sharded base and
`from_pretrained` does not.
"""

import inspect
import json
import logging
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .bank import CHILD
from .core.errors import SetupError, StateError
from .tensors import is_sharded


class Handle(Protocol):
    """What the door needs of the handle of a model."""

    model: nn.Module

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def merged(self) -> tuple[str, ...]: ...
    @property
    def lone_heads(self) -> tuple[str, ...]: ...
    def save(self, name: str, folder: str | os.PathLike[str]) -> None: ...
    def save_head(self, name: str, folder: str | os.PathLike[str]) -> None: ...


logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_WHOLE, _INDEX, _SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"
FOLDER, HEADS = "adapters", "heads"


def is_ours(key: str) -> bool:
    """Whether a key of a model's state dict belongs to an adapter."""
    return f".{CHILD}." in f".{key}"


class Door:
    """Stands in `save_pretrained`, `push_to_hub` and `load_state_dict` of one model while it has adapters."""

    def __init__(self, handle: Handle, as_base: Callable[[], AbstractContextManager[None]]) -> None:
        """`as_base` gives a block in which transformers takes the model for one without adapters."""
        self._handle = handle
        self._as_base = as_base
        self._forgiven: set[str] = set()
        model = handle.model
        self._hooks: list[RemovableHandle] = [
            model.register_load_state_dict_pre_hook(self.before_load),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_post_hook(self.after_load),  # type: ignore[no-untyped-call]
        ]
        for method in _STOOD_IN:
            if hasattr(model, method):
                model.__dict__[method] = getattr(self, method)
        self._parts = [part for part in model.modules() if part is not model and hasattr(type(part), "save_pretrained")]
        for part in self._parts:
            part.__dict__["save_pretrained"] = Part(part).save_pretrained

    def close(self) -> None:
        """Give the model its own methods back."""
        for hook in self._hooks:
            hook.remove()
        for method in _STOOD_IN:
            self._handle.model.__dict__.pop(method, None)
        for part in self._parts:
            part.__dict__.pop("save_pretrained", None)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `save_pretrained` for the base, and a folder for each adapter, and each head without one."""
        handle = self._handle
        model = handle.model
        if handle.merged:
            raise SetupError(
                "A base is saved as adapters were trained on it; got one with "
                f"{', '.join(f'`{name}`' for name in handle.merged)} in its weights. Call `unmerge()` first, or "
                "`detach(keep_merged=True)` to save it with them."
            )
        own: Any = type(model).save_pretrained  # type: ignore[attr-defined]
        call = inspect.signature(own).bind(model, *args, **kwargs)
        has_ours = bool(handle.names or handle.lone_heads)
        if "save_directory" not in call.signature.parameters:
            if has_ours:
                raise _saved_otherwise(model)
            return own(model, *args, **kwargs)
        if has_ours and (call.arguments.get("push_to_hub") or call.arguments.get("kwargs", {}).get("push_to_hub")):
            raise _unpublished(model)
        tensors = call.arguments.get("state_dict")
        tensors = model.state_dict() if tensors is None else tensors
        call.arguments["state_dict"] = {key: value for key, value in tensors.items() if not is_ours(key)}
        # Where the base is quantised, transformers passes over the state dict it was given and asks the model.
        hook = model.register_state_dict_post_hook(_leave_ours_out)  # type: ignore[no-untyped-call]
        try:
            with self._as_base():
                result = own(*call.args, **call.kwargs)
        finally:
            hook.remove()
        folder, is_main = Path(call.arguments["save_directory"]), call.arguments.get("is_main_process", True)
        # Adapters of which every process holds a part are saved by all of them together.
        if is_main or any(is_sharded(parameter) for parameter in model.parameters()):
            for name in handle.names:
                handle.save(name, folder / FOLDER / name)
            for name in handle.lone_heads:
                handle.save_head(name, folder / HEADS / name)
        if is_main and has_ours and _CHECKPOINT.fullmatch(folder.name):
            _make_resumable(folder, model, tensors)
        return result

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `push_to_hub`, which uploads no folders and so would lose the adapters."""
        if self._handle.names or self._handle.lone_heads:
            raise _unpublished(self._handle.model)
        own: Any = type(self._handle.model)
        return own.push_to_hub(self._handle.model, *args, **kwargs)

    def before_load(self, module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
        """Refuse a state dict without the adapters before anything of it is copied."""
        names = [prefix + name for name in module.state_dict()]
        absent = [name for name in names if is_ours(name) and name not in state_dict]
        if absent:
            raise StateError(
                f"A state dict for a model with adapters holds them all; got none for {len(absent)} tensors, first "
                f"`{absent[0]}`. Call `detach()` to load a base model, or `adapters.load` to load an adapter."
            )
        trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
        base = {name for name in names if not is_ours(name) and name not in trained}
        # A checkpoint of the plain trainer holds what is trained and nothing of the base.
        is_partial = bool(self._handle.names or self._handle.lone_heads) and not any(
            name in state_dict for name in base
        )
        self._forgiven = base if is_partial else set()

    def after_load(self, module: nn.Module, incompatible: Any) -> None:
        """Do not report as missing a frozen base that a checkpoint leaves out as a whole."""
        kept = [name for name in incompatible.missing_keys if name not in self._forgiven]
        incompatible.missing_keys[:] = kept
        self._forgiven = set()


class Part:
    """Stands in `save_pretrained` of a model inside the model that has adapters.

    It knows nothing of the whole, so that a copy of the part copies no more than that.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """The part's own `save_pretrained`, for its base."""
        module: Any = self._module
        ours = [key for key in module.state_dict() if is_ours(key)]
        if ours:
            logger.warning(
                "The base of %s is saved without the %d tensors of adapters in it, which belong to the whole model. "
                "Save those with `adapters.save`.",
                type(module).__name__,
                len(ours),
            )
        if kwargs.get("state_dict"):
            kwargs["state_dict"] = {key: value for key, value in kwargs["state_dict"].items() if not is_ours(key)}
        hook = module.register_state_dict_post_hook(_leave_ours_out)
        try:
            return type(module).save_pretrained(module, *args, **kwargs)
        finally:
            hook.remove()


_STOOD_IN = ("save_pretrained", "push_to_hub")


def _leave_ours_out(_module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Hook on `state_dict` while the base is saved."""
    for key in [key for key in state_dict if is_ours(key)]:
        del state_dict[key]


def _saved_otherwise(model: nn.Module) -> SetupError:
    return SetupError(
        "A `save_pretrained` that writes the base without the adapters in it takes a `save_directory`; got one of "
        f"{type(model).__name__} with a way of its own. Call `adapters.save` for each adapter, and save the base after "
        "`detach()`."
    )


def _unpublished(model: nn.Module) -> SetupError:
    return SetupError(
        f"A model with adapters is published in two parts; got {type(model).__name__} with both. Push the base after "
        "`detach()`, and upload the folders that `adapters.save` and `save_head` write."
    )


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
