"""Reads adapter folders of the library `adapters` (adapter-hub), up to its version 1.3.0.

    adapter_config.json                        the configuration, the base model's type and id, the adapter's name
    pytorch_adapter.bin | adapter.safetensors  tensors, by the names of that library's modules
    adapter_interface.json                     names of the model's modules, for models adapted through hooks
    head_config.json, pytorch_model_head.bin | model_head.safetensors
                                               the prediction head, if it was saved along

An adapter is read so that it computes what that library (here: the reference) computes, or it is refused. Older folders
are brought up to date as the reference does it: renamed modules, `gelu` of folders without a version (which means
`gelu_new`), and LoRA of versions before 1.1.0, which was trained without its factor alpha / r.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..core.site import Sites
from ..methods import AdapterConfig
from ..methods.prefix import PrefixConfig
from ..methods.prompt import PromptConfig
from .adapterhub_config import translate
from .adapterhub_fused import asked_thirds
from .adapterhub_inputs import check_prompts
from .adapterhub_low_rank import drop_idle_weights, of_dora, shared_tensors, take_shared, vera_as_lora
from .adapterhub_prefix import check_prefixes, take_prefixes
from .adapterhub_record import (
    HEAD_RECORD,
    HEAD_SAFE,
    HEAD_TORCH,
    LATEST,
    RECORD,
    SAFE,
    TORCH,
    base_towers,
    check_base,
    read_json,
    read_record,
    updated,
    version_of,
)
from .adapterhub_sites import match_stacks
from .adapterhub_stream import take_streams
from .adapterhub_tensors import Source, tensors_of
from .weights import read_weights

_OLD_MODULES = re.compile(r"\b(?:attention|layer)_text_(?:task|lang)_adapters\b")


@dataclass(frozen=True, slots=True)
class StoredHead:
    """A prediction head as it lies in the folder, by the names of the reference's modules."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Converted:
    """An adapter of the library `adapters` in our terms, for one model."""

    name: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    """By the keys that `Adapters.__getitem__` has."""
    model_type: str
    base: str
    """The base model's id, or the path it had."""
    head: StoredHead | None
    difference: str = ""
    """How the base differs from the model, where that is told."""


def read(
    folder: Path,
    model: nn.Module,
    sites: Sites,
    *,
    head: bool = True,
    other_base: Literal["refuse", "allow", "tell"] = "refuse",
) -> Converted:
    """The adapter of a folder, for a model with these sites.

    Arguments: `head=False` does not open the prediction head; `other_base="allow"` takes an adapter made for another
    model type, where the modules still correspond, and `tell` does so without a word but in `Converted.difference`.

    Raises `StateError` for anything missing, damaged, made for another model type, or that cannot be computed exactly.
    """
    record = read_record(folder)
    name, model_type = record["name"], record["model_type"]
    difference = check_base(record, sites, folder, other_base)
    stacks = match_stacks(base_towers(model_type, folder), sites, folder)
    stored = {_OLD_MODULES.sub("adapters", key): value for key, value in read_weights(folder, SAFE, TORCH).items()}
    settings = updated(record, stored)
    shared = take_shared(stored, name)
    vera_as_lora(stored, shared, name, folder)
    drop_idle_weights(stored, name, stacks)
    config = translate(settings, stacks, folder / RECORD, later=version_of(record) > LATEST)
    config, streams = take_streams(stored, name, stacks, config, folder)
    common = shared_tensors(config, sites, shared, folder)
    stored |= {f"shared_parameters.{name}.{key}": tensor for key, tensor in shared.items()}  # which nothing asks for
    prefixes: dict[str, Tensor] = {}
    for part in config.parts:
        if isinstance(part, PrefixConfig):
            difference = check_prefixes(part, model_type, folder, other_base) or difference
            prefixes = take_prefixes(name, stored, config=part, stacks=stacks, sites=sites, folder=folder)
        elif isinstance(part, PromptConfig):
            difference = check_prompts(model_type, folder, other_base) or difference
    tensors = prefixes | streams | tensors_of(Source(folder, name, stacks, config, asked_thirds(settings)), stored)
    config, tensors = of_dora(config, tensors | common, model, sites)
    return Converted(
        name=name,
        config=config,
        tensors=tensors,
        model_type=model_type,
        base=str(record.get("model_name") or ""),
        head=read_head(folder) if head else None,
        difference=difference,
    )


def read_head(folder: Path) -> StoredHead | None:
    """The prediction head in a folder, if there is one."""
    if not any((folder / file).is_file() for file in (HEAD_SAFE, HEAD_TORCH)):
        return None
    config = read_json(folder / HEAD_RECORD) if (folder / HEAD_RECORD).is_file() else {}
    return StoredHead(config, read_weights(folder, HEAD_SAFE, HEAD_TORCH))
