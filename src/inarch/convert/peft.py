"""Reads adapter folders of PEFT: LoRA, DoRA, VeRA, (IA)³, prefix tuning and prompt tuning.

    adapter_config.json                               the method, its settings, the base model's id
    adapter_model.safetensors | adapter_model.bin     tensors, by the names of the model's modules

The tensors say what is adapted: every `...lora_A.weight` is a projection with its rank, and what `target_modules`,
`layers_to_transform` and `exclude_modules` chose, whatever their form, is read off the result. The settings give the
scales. Whole modules that were trained (`modules_to_save`) are the adapter's task head.

PEFT keeps nothing of its base but an id, so nothing shows that a model of the same shapes is the base.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..core.site import Sites
from ..methods import AdapterConfig, OutOfRange
from .peft_family import check_family
from .peft_head import CLASSIFIERS, Head, head_tensors, take_heads
from .peft_ia3 import read_ia3
from .peft_lora import read_lora
from .peft_names import Names
from .peft_norms import read_norms
from .peft_prefix import read_prefix
from .peft_prompt import read_prompt
from .peft_record import RECORD, SAFE, TORCH, check_method
from .peft_source import Source, check_rest, own_path
from .peft_vera import read_vera
from .weights import read_weights

logger = logging.getLogger(__name__)


_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """An adapter of PEFT in our terms, for one model."""

    config: AdapterConfig
    tensors: dict[str, Tensor]
    """By the keys of an adapter file, those of a head among them."""
    head: tuple[str, ...]
    base: str
    """The base model's id, or the path it had."""
    difference: str
    """How the base differs from the model, where that is told."""
    idle: tuple[str, ...]
    """Entries of `target_modules` and `modules_to_save` that the folder has no tensors of."""
    out_of_range: tuple[OutOfRange, ...]
    """Numbers of the folder with which no adapter can be here, where that is told."""


def read(
    folder: Path,
    model: nn.Module,
    sites: Sites,
    *,
    own_heads: Iterable[str] = (),
    head: bool = True,
    other_base: Literal["refuse", "allow", "tell"] = "refuse",
) -> Converted:
    """The adapter of a folder, for a model with these sites.

    Arguments: `own_heads` are the modules of the model's task head; `head=False` leaves out whole modules that were
    trained; `other_base="allow"` takes an adapter made for a
    model of another class, where the modules still correspond, and `tell` does so without a word but in
    `Converted.difference`, and takes numbers out of range too, for `Converted.out_of_range`.

    Raises `StateError` for anything missing, damaged, made for another model, or that cannot be computed exactly.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    check_method(record, folder)
    stored = {key.removeprefix(_PREFIX): tensor for key, tensor in read_weights(folder, SAFE, TORCH).items()}
    source = Source(folder, record, model, Names(sites), other_base)
    heads = take_heads(source, stored)
    if record["peft_type"] == "LORA":
        part, tensors, adapted = read_lora(source, stored, heads)
    elif record["peft_type"] == "VERA":
        part, tensors, adapted = read_vera(source, stored)
    elif record["peft_type"] == "LN_TUNING":
        norms = read_norms(stored, model, sites, folder)
        check_rest(source, stored)
        part, tensors, adapted = norms.config, norms.tensors, norms.paths
        heads |= {own_path(path, model): Head(path, found) for path, found in norms.outside.items()}
    elif record["peft_type"] == "PREFIX_TUNING":
        (part, tensors), adapted = read_prefix(record, stored, model, sites, folder), []
    elif record["peft_type"] == "PROMPT_TUNING":
        (part, tensors), adapted = read_prompt(record, stored, sites, folder), []
    else:
        part, tensors, adapted = read_ia3(source, stored)
    of_base = [path for path in heads if head and not any(f"{path}.".startswith(f"{own}.") for own in own_heads)]
    if of_base and other_base != "tell":
        logger.warning(
            "%s replaces modules of the base, which stay replaced when the adapter is not active: %s.",
            folder,
            ", ".join(of_base),
        )
    return Converted(
        config=AdapterConfig((part,)),
        tensors=tensors | (head_tensors(heads, source) if head else {}),
        head=tuple(heads) if head else (),
        base=str(record.get("base_model_name_or_path") or ""),
        difference=check_family(source, adapted),
        idle=_idle(record, adapted, heads),
        out_of_range=tuple(source.out_of_range),
    )


_CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS")
"""For these tasks PEFT writes both names into `modules_to_save` by itself, of which a model has one."""


def _idle(record: Mapping[str, Any], adapted: list[str], heads: Mapping[str, Head]) -> tuple[str, ...]:
    """Entries of `target_modules` and `modules_to_save` that nothing was made for."""
    targets, saved = record.get("target_modules"), record.get("modules_to_save") or ()
    idle = []
    if isinstance(targets, list):
        idle += [
            f"target_modules: {name}"
            for name in targets
            if not any(path == name or path.endswith(f".{name}") for path in adapted)
        ]
    held = [name for name in saved if any(head.stored.endswith(name) for head in heads.values())]
    own = CLASSIFIERS if record.get("task_type") in _CLASSIFYING and not CLASSIFIERS.isdisjoint(held) else frozenset()
    idle += [f"modules_to_save: {name}" for name in saved if name not in held and name not in own]
    return tuple(idle)
