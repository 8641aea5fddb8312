"""Prediction heads of the library `adapters`, in our terms.

head_config.json    `config` with `head_type` and its settings, and the head's `name`; of a model with a task head
                    of its own there is no `config`, and the tensors have the names of that model's modules
heads.<name>.<n>    a sequence of dropouts, linear layers, activations and norms, of which those with weights count
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, StateError
from .flexible import embeddings_of
from .kinds import KINDS, HeadConfig, LanguageModelHead, PooledHead

_IGNORED = ("head_type", "label2id", "id2label", "use_pooler", "vocab_size", "embedding_size", "num_labels")
_PLACEHOLDER = re.compile(r"LABEL_\d+")


@dataclass(frozen=True, slots=True)
class Foreign:
    """A head of the library `adapters`: a flexible one, or tensors of the model's own."""

    name: str
    config: HeadConfig | None
    tensors: dict[str, Tensor]
    """By the names of our head's parameters, or of the model's."""


def read_foreign(record: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> Foreign:
    """A head as it lies in a folder. Raises `StateError` for one that is none of ours."""
    name, settings = str(record.get("name") or ""), record.get("config")
    if not isinstance(settings, Mapping) or "head_type" not in settings:
        return Foreign(name, None, dict(tensors))
    start = f"heads.{name}."
    strange = [key for key in tensors if not key.startswith(start)]
    kind = KINDS.get("multilabel_classification" if _is_old_multilabel(settings) else str(settings["head_type"]))
    if kind is None or strange or not tensors:
        what = f"of type `{settings['head_type']}`" if kind is None else f"with `{(strange or ['nothing'])[0]}`"
        raise StateError(
            f"A prediction head is of one of the types {', '.join(f'`{known}`' for known in KINDS)}, with tensors "
            f"under its name; got `{name}` {what}. Load the adapter alone, with `head=False`."
        )
    own = {key[len(start) :]: tensor for key, tensor in tensors.items()}
    if kind.kind == "dependency_parsing":
        named = {"biaffine_arcs.weight": "arcs", "biaffine_rels.weight": "rels"}
        return Foreign(name, _config(kind, settings, {}), {named.get(key, key): value for key, value in own.items()})
    layers = _layers(own)
    if issubclass(kind, LanguageModelHead):
        return _language_model(name, kind, settings, layers, model)
    places = [*(f"dense.{number}" for number in range(len(layers) - 1)), "out"]
    return Foreign(
        name,
        _config(kind, settings, {}),
        {
            f"{place}.{leaf}": tensor
            for place, layer in zip(places, layers, strict=True)
            for leaf, tensor in layer.items()
        },
    )


def read_foreign_settings(settings: Mapping[str, Any]) -> HeadConfig:
    """The configuration of a head, from what that library has in `config`. Raises `StateError` for none of ours."""
    kind = KINDS.get("multilabel_classification" if _is_old_multilabel(settings) else str(settings.get("head_type")))
    if kind is None:
        raise StateError(
            f"A prediction head is of one of the types {', '.join(f'`{known}`' for known in KINDS)}; got "
            f"`{settings.get('head_type')}`. Add one of them."
        )
    return _config(kind, settings, {})


def _is_old_multilabel(settings: Mapping[str, Any]) -> bool:
    return settings.get("head_type") == "classification" and bool(settings.get("multilabel"))


def _layers(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The modules with weights of a sequence, in its order."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, leaf = key.partition(".")
        if not number.isdecimal() or leaf not in ("weight", "bias"):
            raise StateError(
                f"The tensors of a prediction head are `<number>.weight` and `<number>.bias`; got `{key}`. Load the "
                "adapter alone, with `head=False`."
            )
        found.setdefault(int(number), {})[leaf] = tensor
    return [found[number] for number in sorted(found)]


def _config(kind: type[HeadConfig], settings: Mapping[str, Any], more: Mapping[str, Any]) -> HeadConfig:
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]  # a dataclass
    values = {key: value for key, value in settings.items() if key in fields}
    strange = [key for key in settings if key not in fields and key not in (*_IGNORED, "multilabel")]
    if strange:
        raise StateError(
            f"Every setting of a prediction head has a meaning; got `{strange[0]}={settings[strange[0]]!r}` for "
            f"`{kind.kind}`. Load the adapter alone, with `head=False`."
        )
    if issubclass(kind, PooledHead) and settings.get("use_pooler"):
        values["pooling"] = "pooler"
    labels = settings.get("label2id")
    if isinstance(labels, Mapping) and "labels" in fields:
        names = [str(label) for label, _ in sorted(labels.items(), key=lambda item: int(item[1]))]
        if not all(_PLACEHOLDER.fullmatch(label) for label in names):
            values["labels"] = names
    try:
        return kind.from_dict({**values, **more})
    except ConfigError as error:
        raise StateError(f"{error} It stands in a stored head; load the adapter alone, with `head=False`.") from None


def _language_model(
    name: str, kind: type[HeadConfig], settings: Mapping[str, Any], layers: list[dict[str, Tensor]], model: nn.Module
) -> Foreign:
    """Its last layer is the embeddings, which are the model's where their values are."""
    *inner, last = layers
    table = embeddings_of(model)
    is_tied = (
        table is not None
        and table.shape == last["weight"].shape
        and torch.equal(table.detach().cpu(), last["weight"].to(table.dtype))
    )
    dense = [layer for layer in inner if layer["weight"].dim() == 2]
    norms = [layer for layer in inner if layer["weight"].dim() == 1]
    found = {f"dense.{n}.{leaf}": tensor for n, layer in enumerate(dense) for leaf, tensor in layer.items()}
    found |= {f"norms.{n}.{leaf}": tensor for n, layer in enumerate(norms) for leaf, tensor in layer.items()}
    found |= {"bias": last["bias"]} if "bias" in last else {}
    found |= {} if is_tied else {"embeddings": last["weight"]}
    return Foreign(name, _config(kind, settings, {"tied": is_tied}), found)
