"""The files of a folder of the library `adapters`, and what its record says of the adapter and its base.

Older records are brought up to date as the reference does it: `gelu` of folders without a version, which means
`gelu_new`, and LoRA of versions before 1.1.0, which was trained without its factor alpha / r.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import StateError
from ..core.site import Sites
from .adapterhub_names import RANDOM_BASES, Tower, interface_towers
from .adapterhub_sites import known_towers
from .consent import consent

INTERFACE = "adapter_interface.json"

RECORD, SAFE, TORCH = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"

HEAD_RECORD, HEAD_SAFE, HEAD_TORCH = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"

FUSION_RECORD = "adapter_fusion_config.json"

FUSION_SAFE, FUSION_TORCH = "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"

OTHER_RECORDS = {FUSION_RECORD: "an AdapterFusion", "adapter_setup.json": "a setup of several adapters"}

RECORDS = (RECORD, HEAD_RECORD, *OTHER_RECORDS)

WEIGHTS = {RECORD: (SAFE, TORCH), HEAD_RECORD: (HEAD_SAFE, HEAD_TORCH), FUSION_RECORD: (FUSION_SAFE, FUSION_TORCH)}
"""The files beside a record: of each pair one is there; the first is preferred."""

LATEST = (1, 3)
"""The latest version whose configurations are known."""

_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def is_adapterhub(folder: Path) -> bool:
    """Whether a folder is in this format. (PEFT's, too, holds an `adapter_config.json`.)"""
    if not (folder / RECORD).is_file():
        return any((folder / record).is_file() for record in OTHER_RECORDS)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return (folder / SAFE).is_file() or (folder / TORCH).is_file()
    return not (isinstance(record, dict) and "peft_type" in record)


def own_head_labels(folder: Path) -> tuple[str, ...]:
    """The labels of a model's own head stored beside an adapter, by number; none where it does not say."""
    try:
        record = json.loads((folder / HEAD_RECORD).read_text(encoding="utf-8"))
        numbers = {int(number): str(label) for label, number in record["label2id"].items()}
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return ()
    is_own = not record.get("config") and sorted(numbers) == list(range(len(numbers)))
    return tuple(numbers[number] for number in sorted(numbers)) if is_own else ()


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an adapter. Raises `StateError` for a folder of anything else."""
    if not (folder / RECORD).is_file():
        found = next((what for file, what in OTHER_RECORDS.items() if (folder / file).is_file()), "nothing known")
        raise StateError(
            f"This version reads single adapters of the library `adapters`, folders with `{RECORD}`; got {found} at "
            f"`{folder}`. Load the adapters one by one."
        )
    record = read_json(folder / RECORD)
    missing = [key for key in ("name", "model_type") if not isinstance(record.get(key), str)]
    if missing or "config" not in record:
        raise StateError(
            f"`{RECORD}` must hold `name`, `model_type` and `config`; got none of `{(missing or ['config'])[0]}` at "
            f"`{folder}`. Save the adapter again with the library that wrote it."
        )
    return record


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises `StateError` for anything else."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(
            f"`{file.name}` must be readable JSON; got `{file}`: {error}. Copy or download it again."
        ) from None
    if not isinstance(record, dict):
        raise StateError(f"`{file.name}` must hold a mapping; got {record!r} at `{file}`. Save the adapter again.")
    return record


def base_towers(model_type: str, folder: Path) -> tuple[Tower, ...]:
    """The towers of the model a folder was made for: by its interface, or by the model type."""
    return _interface(folder) or known_towers(model_type, folder)


def _interface(folder: Path) -> tuple[Tower, ...]:
    """The towers of a folder with an interface; none for one without."""
    if not (folder / INTERFACE).is_file():
        return ()
    interface = read_json(folder / INTERFACE).get("interface")
    try:
        return interface_towers(interface)  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(
            f"`{INTERFACE}` must name the modules of a model under `interface`; got none for {error} at `{folder}`. "
            "Save the adapter again with the library that wrote it."
        ) from None


def check_base(record: Mapping[str, Any], sites: Sites, folder: Path, other_base: str) -> str:
    """How the base of a folder differs from the model, as a sentence. Raises `StateError` unless that is allowed."""
    if record["model_type"] != sites.model_type:
        difference = (
            f"the model types of an adapter's base and of the model must agree; got `{record['model_type']}` at "
            f"`{folder}` and `{sites.model_type}` for {sites.model_class}"
        )
        remedy = f"Load the base model `{record.get('model_name')}`"
    elif record["model_type"] in RANDOM_BASES and version_of(record) > (0, 0):
        difference = (
            "an adapter must have been trained on the base it names; got one of the library `adapters`, which adds a "
            f"random bias to {sites.model_class} and does not save it, at `{folder}`"
        )
        remedy = "Train the adapter anew"
    else:
        return ""
    return consent(difference, remedy, folder, other_base)


def updated(record: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Any:
    """The settings of a folder in the terms of the latest version."""
    settings = record["config"]
    if not isinstance(settings, Mapping):
        return settings
    settings = dict(settings)
    if record.get("version") is None and settings.get("non_linearity") in _OLD_ACTIVATIONS:
        settings["non_linearity"] = _OLD_ACTIVATIONS[settings["non_linearity"]]
    if settings.get("architecture") == "lora" and (0, 0) < version_of(record) < (1, 1):
        settings["alpha"] = settings.get("r", settings.get("alpha"))
    # Early task adapters name an invertible part that only language adapters had.
    if record.get("type") == "text_task" and not any("invertible" in key for key in stored):
        settings |= {"inv_adapter": None, "invertible_adapter": None}
    return settings


def version_of(record: Mapping[str, Any]) -> tuple[int, int]:
    """Which version wrote a folder; (0, 0) for the library's predecessor, whose versions have no prefix."""
    found = re.match(r"adapters\.(\d+)\.(\d+)", str(record.get("version")))
    return (int(found[1]), int(found[2])) if found is not None else (0, 0)
