"""Folders of flexible heads without an adapter: ours, and those of the library `adapters`.

head.safetensors    the head's tensors by their names in its module;   head.json    its name, kind and settings
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import state
from .convert import adapterhub
from .convert.adapterhub_record import HEAD_RECORD
from .core.errors import ConfigError, StateError
from .heads import HeadConfig, head_data, read_foreign, read_head
from .tensors import read_tensors

FILES = state.Files("head.safetensors", "head.json", what="a head")
_VERSION = 1


def write(folder: str | os.PathLike[str], name: str, config: HeadConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write one head. Raises `StateError` for a folder that holds something else or cannot be written."""
    record = {"head_format_version": _VERSION, "name": name, "head": head_data(config)}
    state.write(folder, tensors, record, FILES)


def read(folder: str | os.PathLike[str], model: nn.Module) -> tuple[str, HeadConfig, dict[str, Tensor]]:
    """The name, the configuration and the tensors of the head in a folder. Raises `StateError` where there is none."""
    place = Path(folder).expanduser()
    if (place / FILES.record).is_file():
        return _ours(place)
    stored = adapterhub.read_head(place) if (place / HEAD_RECORD).is_file() else None
    if stored is None:
        raise StateError(
            f"The folder of a head holds `{FILES.record}`, as `save_head` writes it, or `{HEAD_RECORD}` "
            f"with tensors, as the library `adapters` does; got neither in `{place}`. Give the folder of one head."
        )
    found = read_foreign(stored.config, stored.tensors, model)
    if found.config is None:
        raise StateError(
            "A head that is added has a type; got one of the modules of "
            f"`{stored.config.get('model_class')}` in `{place}`. Load it with its adapter into a model of that class."
        )
    return found.name, found.config, found.tensors


def _ours(place: Path) -> tuple[str, HeadConfig, dict[str, Tensor]]:
    file = place / FILES.record
    try:
        record: Any = json.loads(file.read_text(encoding="utf-8"))
        version, name, config = record["head_format_version"], str(record["name"]), read_head(record["head"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, ConfigError) as error:
        raise StateError(
            f"`{FILES.record}` must be as `save_head` wrote it; got `{file}`: {type(error).__name__}: {error}. Save "
            "the head again."
        ) from None
    if version != _VERSION:
        raise StateError(f"This version reads heads of format {_VERSION}; got {version!r} in `{file}`. Update inarch.")
    return name, config, read_tensors(place / FILES.tensors)
