"""Writes an adapter, with the task head trained with it, as a folder of inarch, PEFT or the library `adapters`."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import convert, state
from .core.errors import StateError
from .core.site import Sites
from .fingerprint import describe_sites, fingerprint
from .heads import HeadConfig, head_data, id2label, model_class, name_at, write_foreign
from .methods import AdapterConfig
from .tensors import whole
from .version import __version__

logger = logging.getLogger(__name__)

Format = Literal["inarch", "peft", "adapterhub"]
FORMATS = get_args(Format)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What is written of one adapter."""

    name: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    """Its parameters, by their key in an adapter file."""
    head: tuple[str, ...]
    """The modules of the task head to be written with it."""
    head_tensors: Mapping[str, Tensor]
    flexible: Mapping[str, HeadConfig]
    """By path, those of the modules that are flexible heads."""


def write(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    model: nn.Module,
    sites: Sites,
    heads: Sequence[str],
    *,
    processor: Any,
    format_: str,
) -> None:
    """Write an adapter. `heads` are all modules of the model that belong to a task.

    Raises `StateError` for a folder that cannot be written, and for what the format does not have.
    """
    if format_ not in FORMATS:
        raise StateError(
            f"An adapter is written in the format {' or '.join(f'`{known}`' for known in FORMATS)}; got {format_!r} "
            f"for `{adapter.name}`. Choose one of them."
        )
    both = adapter.tensors | dict(adapter.head_tensors)
    if format_ == "peft":
        written, settings = convert.write_peft(
            adapter.name, adapter.config, both, head=adapter.head, model=model, sites=sites
        )
        state.write(folder, written, settings, state.Files(convert.peft_record.SAFE, convert.peft_record.RECORD))
    elif format_ == "adapterhub":
        written, settings = convert.write_adapterhub(
            adapter.name, adapter.config, adapter.tensors, model=model, sites=sites
        )
        names = convert.adapterhub_record
        files = state.Files(names.SAFE, names.RECORD, (names.HEAD_SAFE, names.HEAD_RECORD))
        beside = _adapterhub_head(adapter, model, settings) if adapter.head else {}
        state.write(folder, written, settings, files, beside=beside)
    else:
        state.write(folder, both, _record(adapter, model, sites, heads, processor))


def _adapterhub_head(adapter: Adapter, model: nn.Module, record: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a head in the format of the library `adapters`. What it does not have is told of and left out.

    That library has one flexible head in a folder, under the class of its own that has some, or the modules of the
    model's own head, under the model's class.
    """
    named = {path: config for path, config in adapter.flexible.items() if path in adapter.head}
    if named and (len(named) > 1 or len(adapter.head) > 1):
        heads = ", ".join(f"`{path}`" for path in adapter.head)
        logger.warning("Of `%s` the adapter alone is written, without %s: there one head fits.", adapter.name, heads)
        return {}
    base = {key: record[key] for key in ("hidden_size", "model_name", "model_type", "version")}
    tensors = {key.removeprefix("head."): tensor for key, tensor in adapter.head_tensors.items()}
    if not named:
        labels = {label: number for number, label in id2label(model).items()}
        own = {"config": None, "name": None, "model_class": record["model_class"]}
        return _packed(tensors, base | own | {"label2id": labels, "num_labels": len(labels)})
    ((path, config),) = named.items()
    name = name_at(path)
    own = {key.removeprefix(f"{path}."): tensor for key, tensor in tensors.items()}
    try:
        written, settings = write_foreign(name, config, own, model)
    except StateError as error:
        logger.warning("Of `%s` only the adapter is written. %s", adapter.name, error)
        return {}
    kind = model_class(model).removesuffix("Model").removesuffix("Encoder")
    return _packed(written, base | {"config": settings, "name": name, "model_class": f"{kind}AdapterModel"})


def _packed(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, bytes]:
    from safetensors.torch import save

    names = convert.adapterhub_record
    plain = {key: whole(tensor.detach()).cpu().contiguous().clone() for key, tensor in tensors.items()}
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    return {names.HEAD_SAFE: save(plain), names.HEAD_RECORD: text.encode()}


def _record(adapter: Adapter, model: nn.Module, sites: Sites, heads: Sequence[str], processor: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {
        "name": adapter.name,
        "config": adapter.config.to_dict(),
        "base": {
            "id": getattr(config, "_name_or_path", "") or "",
            "revision": getattr(config, "_commit_hash", None),
            "model_type": sites.model_type,
            "model_class": sites.model_class,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "fingerprint": fingerprint(model, sites, heads),
        },
        "sites": describe_sites(sites),
        "head": {
            "modules": list(adapter.head),
            "labels": [label for _, label in sorted(id2label(model).items())],
            "problem_type": getattr(config, "problem_type", None),
            "flexible": {path: head_data(head) for path, head in adapter.flexible.items()},
        }
        if adapter.head
        else None,
        "preprocessing": None if processor is None else _settings(processor, adapter.name),
        "versions": {"inarch": __version__, "torch": torch.__version__, "transformers": version("transformers")},
    }


def _settings(processor: Any, name: str) -> dict[str, Any]:
    """What a processor says of itself. Raises `StateError` where that is nothing that JSON can hold."""
    if not callable(getattr(processor, "to_dict", None)):
        raise StateError(
            "`processor` is an image processor, or anything with a `to_dict`; got "
            f"{type(processor).__name__} to be kept beside `{name}`. Save a tokenizer with its own `save_pretrained`."
        )
    settings = processor.to_dict()
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as error:
        raise StateError(
            f"The settings of a `processor` are kept as JSON; got {type(processor).__name__} beside `{name}`, whose "
            f"`to_dict` gives something else: {error}. Leave it out, and save it by itself."
        ) from None
    return dict(settings)
