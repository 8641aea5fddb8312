"""Prefix tuning of the library `adapters`: one pool of prefixes for all layers, as the prefix of each attention.

A pool has a group for the attentions of each kind: `self_prefix` (`self` for DistilBERT), `encoder_prefix` for those of
an encoder that a decoder looks at, `cross_prefix`; before the names of CLIP's stands its tower. The last map of a group
makes the keys and values of all its attentions, in the order of their layers. On disk the pool lies at the base model
and once more below every attention.

Two habits of the reference are none of prefix tuning. Where its models attend by `sdpa`, which is their default, a
causal attention hides prefixes behind padding and, without padding, sees but the first of them from the first tokens;
DistilBERT adds one to their scores where there is padding. By `eager` it does neither. T5 counts a prefix as positions
of keys, not of queries, so all its relative biases are those of other distances.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import StateError
from ..core.site import Kind, Site, Sites
from ..methods import placements
from ..methods.prefix import Prefix, PrefixConfig
from .adapterhub_sites import Stack, Stacks
from .consent import consent

_MISPLACED = {"bart", "distilbert", "gpt2", "llama", "mbart", "mistral", "plbart", "whisper"}
_SHIFTED = {"t5", "mt5"}

_CROSS = ("crossattention", "encoder_attn", "EncDecAttention")
"""What the paths of cross-attentions have in them."""


def prefix_part(row: Mapping[str, Any], layers: list[int]) -> PrefixConfig:
    """The configuration of prefixes, as ours; `layers` are those left out, in our numbers."""
    ours = PrefixConfig().to_dict()
    known = {key: value for key, value in row.items() if key in ours}
    return PrefixConfig.from_dict(known | {"leave_out": layers, "non_linearity": str(known["non_linearity"]).lower()})


def check_prefixes(config: PrefixConfig, model_type: str, folder: object, other_base: str) -> str:
    """How the reference's prefixes differ from those of the paper, as a sentence, where nobody knows which it trained.

    Raises `StateError` unless that is allowed, and where they differ in any case.
    """
    if model_type in _SHIFTED:
        raise StateError(
            "A prefix is read where it has no position; got one of the library `adapters`, which moves the relative "
            f"positions of `{model_type}` by its {config.prefix_length} keys, at `{folder}`. Train the adapter anew."
        )
    if model_type not in _MISPLACED:
        return ""
    difference = (
        "prefixes must have been trained where every query sees them as they are; got some of the library `adapters`, "
        f"which does not see to that on `{model_type}` unless it attends by `eager`, at `{folder}`"
    )
    where = 'it was trained with `attn_implementation="eager"`'
    return consent(difference, "Train the adapter anew", folder, other_base, where=where)


def take_prefixes(
    name: str, stored: dict[str, Tensor], *, config: PrefixConfig, stacks: Stacks, sites: Sites, folder: object
) -> dict[str, Tensor]:
    """The tensors of prefixes by our keys, taken out of what is stored.

    Raises `StateError` where those of a group are not those of the attentions that the configuration asks for.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for key in list(stored):
        pool = re.fullmatch(rf"(?:.+\.)?prefix_tuning\.(?:pool\.)?prefix_tunings\.{re.escape(name)}\.(\w+)\.(.+)", key)
        gate = re.fullmatch(rf"(.+)\.prefix_tuning\.prefix_gates\.{re.escape(name)}\.(weight|bias)", key)
        if pool is not None:
            tensor = stored.pop(key)
            if not torch.equal(groups.setdefault(pool[1], {}).setdefault(pool[2], tensor), tensor):
                raise _odd(f"`{key}`, unlike its copy", folder)
        elif gate is not None:
            site = _site_of(gate[1], stacks)
            if site is not None:
                found[f"{site.key}.{Prefix.name}.gate.{gate[2]}"] = stored.pop(key)
    attentions: dict[tuple[str, str], list[Site]] = {}
    for placement in placements(config, sites):
        attentions.setdefault((placement.site.stack, placement.site.role), []).append(placement.site)
    for group, tensors in groups.items():
        place = _place_of(group, stacks)
        try:
            found |= _of_group(tensors, attentions.pop(place), config)
        except (KeyError, RuntimeError, ValueError) as error:
            raise _odd(f"`{group}`, which is of no such attentions ({error})", folder) from None
    if attentions:
        raise _odd(f"none for `{next(iter(attentions.values()))[0].key}`", folder)
    return found


def _of_group(tensors: Mapping[str, Tensor], sites: list[Site], config: PrefixConfig) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    first = f"{sites[0].key}.{Prefix.name}.source"
    if config.flat:
        whole = tensors["control_trans"].view(config.prefix_length, len(sites), 2, -1)
        for number, site in enumerate(sites):
            for part, leaf in enumerate(("keys", "values")):
                found[f"{site.key}.{Prefix.name}.{leaf}"] = whole[:, number, part].contiguous()
        return found
    found[f"{first}.embedding"] = tensors["wte.weight"]
    for leaf in ("weight", "bias"):
        found[f"{first}.hidden.{leaf}"] = tensors[f"control_trans.0.{leaf}"]
        parts = tensors[f"control_trans.2.{leaf}"].unflatten(0, (len(sites), -1))  # type: ignore[no-untyped-call]
        found |= {
            f"{site.key}.{Prefix.name}.out.{leaf}": part.contiguous() for site, part in zip(sites, parts, strict=True)
        }
    return found


def _site_of(path: str, stacks: Stacks) -> Site | None:
    """The site of an attention by its path in the reference."""
    kind: Kind = "cross_attention" if any(word in path for word in _CROSS) else "self_attention"
    for stack in stacks:
        layers = re.escape(stack.tower.layers).replace(r"\*", r"\d+")
        found = re.match(rf"(?:\w+\.)?({layers}\.\d+)\.", path)
        if found is not None:
            return stack.site(found[1], kind)
    return None


def _place_of(group: str, stacks: Stacks) -> tuple[str, str]:
    """The stack and the role of the attentions of a group."""
    whole: list[Stack] = [stack for stack in stacks if stack.sites]
    tower = re.match(r"clip_(text|vision)_", group)
    if tower is not None:
        modality = {"text": "text", "vision": "image"}[tower[1]]
        whole = [stack for stack in whole if stack.sites[0].stack.startswith(modality)]
    if not whole:
        return "", ""
    stack = whole[0] if group.endswith("encoder_prefix") else whole[-1]
    return stack.sites[0].stack, "cross_attention" if group.endswith("cross_prefix") else "self_attention"


def _odd(what: str, folder: object) -> StateError:
    return StateError(
        f"The prefixes of an adapter must be those of the attentions of this model; got {what}, at `{folder}`. Load it "
        "on the base model it was trained on."
    )
