"""Whole modules that PEFT trained (`modules_to_save`): the adapter's task head."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import StateError
from .adapterhub_record import read_json
from .peft_record import RECORD, SAFE, TORCH
from .peft_source import Source, own_path
from .weights import read_weights

CLASSIFIERS = frozenset({"classifier", "score"})
"""What transformers calls the head of a classifier."""


@dataclass(frozen=True, slots=True)
class Head:
    """A whole module that was trained, by its path in the folder."""

    stored: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


def own_head_labels(folder: Path) -> tuple[str, ...]:
    """Labels for the head of a classifier in a folder, named as transformers names those that have no name.

    PEFT keeps none: the head's last map has a row for each. None where no head, or no last map, can be told.
    """
    saved = CLASSIFIERS.intersection(read_json(folder / RECORD).get("modules_to_save") or ())
    maps = {
        key: tensor
        for key, tensor in (read_weights(folder, SAFE, TORCH).items() if saved else ())
        if key.endswith(".weight") and tensor.ndim == 2 and "lora_" not in key and saved.intersection(key.split("."))
    }
    if len(maps) > 1:
        maps = {key: tensor for key, tensor in maps.items() if key.endswith(".out_proj.weight")}
    rows = [len(tensor) for tensor in maps.values()]
    return tuple(f"LABEL_{number}" for number in range(rows[0])) if len(rows) == 1 else ()


def take_heads(source: Source, stored: dict[str, Tensor]) -> dict[str, Head]:
    """The modules that `modules_to_save` names, by their path in this model; takes their tensors out of `stored`."""
    wanted = source.record.get("modules_to_save") or ()
    found: dict[str, Head] = {}
    for key in [
        key for key in stored if not any(word in key for word in ("lora_", "ia3_l", "vera_", "ln_tuning_layers"))
    ]:
        parents = [key[:place] for place, letter in enumerate(key) if letter == "."]
        path = next((path for path in parents if any(path.endswith(name) for name in wanted)), None)
        if path is not None:
            leaf = key.removeprefix(f"{path}.").removeprefix("modules_to_save.").removeprefix("default.")
            found.setdefault(path, Head(path)).tensors[leaf] = stored.pop(key)
    return {own_path(path, source.model): head for path, head in found.items()}


def head_tensors(heads: Mapping[str, Head], source: Source) -> dict[str, Tensor]:
    """The tensors of a head by our keys. Raises `StateError` for a module that the model does not have."""
    modules = dict(source.model.named_modules())
    absent = next((head.stored for path, head in heads.items() if path not in modules), None)
    if absent is not None:
        raise StateError(
            f"The task head of an adapter must exist in the model; got `{absent}` of `{source.folder}` for "
            f"{type(source.model).__name__}. Load the model with its task head, or pass `head=False`."
        )
    for path, head in heads.items():
        _check_untied(path, head, source)
    return {f"head.{path}.{leaf}": tensor for path, head in heads.items() for leaf, tensor in head.tensors.items()}


def _check_untied(path: str, head: Head, source: Source) -> None:
    """Raise `StateError` for a parameter that is one with another of the model, of which PEFT has made a copy."""
    named = dict(source.model.named_parameters(remove_duplicate=False))
    for leaf, tensor in head.tensors.items():
        own = named.get(f"{path}.{leaf}")
        others = [name for name, other in named.items() if other is own and not name.startswith(f"{path}.")]
        if own is None or not others or (tensor.shape == own.shape and torch.equal(tensor.to(own), own)):
            continue
        raise StateError(
            "A module is replaced where its parameters are its own, as in PEFT, which gives it copies; got "
            f"`{path}.{leaf}` of `{source.folder}`, which {type(source.model).__name__} ties to `{others[0]}`. Load "
            "the model with `tie_word_embeddings=False`."
        )
