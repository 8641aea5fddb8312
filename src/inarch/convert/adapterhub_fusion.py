"""Reads folders of the library `adapters` that hold fusion layers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..core.config import Config
from ..core.errors import ConfigError, StateError
from ..core.site import Kind, Site, Sites
from ..methods import AdapterConfig, layer_number
from ..methods.fusion import Fusion, FusionConfig
from .adapterhub import Converted
from .adapterhub_record import (
    FUSION_RECORD,
    FUSION_SAFE,
    FUSION_TORCH,
    RECORD,
    base_towers,
    check_base,
    read_json,
)
from .adapterhub_sites import Stacks, match_stacks
from .weights import read_weights

_FIELDS: dict[Kind, str] = {
    "self_attention": "mh_adapter",
    "mlp": "output_adapter",
    "cross_attention": "cross_adapter",
}
_NOT_OFFERED = ("query_before_ln", "residual_before", "temperature")


def is_fusion(folder: Path) -> bool:
    """Whether a folder holds fusion layers and no adapter."""
    return (folder / FUSION_RECORD).is_file() and not (folder / RECORD).is_file()


def read_fusion(folder: Path, sites: Sites, *, other_base: Literal["refuse", "allow", "tell"] = "refuse") -> Converted:
    """The fusion layers of a folder, for a model with these sites, under the name that `Fuse` gives them.

    Raises `StateError` for anything missing, damaged, made for another model type, or that cannot be computed exactly.
    """
    record = read_json(folder / FUSION_RECORD)
    name, model_type = record.get("name"), record.get("model_type")
    if not isinstance(name, str) or not isinstance(model_type, str) or not isinstance(record.get("config"), dict):
        raise StateError(
            f"`{FUSION_RECORD}` must hold `name`, `model_type` and `config`; got {sorted(record)} at `{folder}`. Save "
            "the fusion again with the library that wrote it."
        )
    difference = check_base(record, sites, folder, other_base)
    stacks = match_stacks(base_towers(model_type, folder), sites, folder)
    tensors: dict[str, Tensor] = {}
    found: list[Site] = []
    for key, tensor in read_weights(folder, FUSION_SAFE, FUSION_TORCH).items():
        site, leaf = _place(key, name, stacks)
        if site is None or not site.exact:
            raise StateError(
                "Fusion layers are read where a branch output can be had as the layer adds it; got "
                f"`{key}`, which is at no such site of {sites.model_class}, at `{folder}`. Load them on the base model "
                "they were trained on."
            )
        found.append(site)
        tensors[f"{site.key}.{Fusion.name}.{leaf}"] = tensor
    return Converted(
        name="+".join(name.split(",")),
        config=AdapterConfig((_config(record["config"], found, sites, folder),)),
        tensors=tensors,
        model_type=model_type,
        base=str(record.get("model_name") or ""),
        head=None,
        difference=difference,
    )


def _place(key: str, name: str, stacks: Stacks) -> tuple[Site | None, str]:
    """The site and the part of the layer that a tensor belongs to."""
    for stack in stacks:
        layers = re.escape(stack.tower.layers).replace(r"\*", r"\d+")
        layer = re.escape(name)
        found = re.fullmatch(
            rf"(?:\w+\.)?({layers}\.\d+)\.(.+)\.adapter_fusion_layer\.{layer}\.((?:query|key|value)\.(?:weight|bias))",
            key,
        )
        place = stack.tower.bottlenecks.get(found[2]) if found is not None else None
        if found is not None and place is not None:
            return stack.site(found[1], place.kind), found[3]
    return None, ""


def _config(settings: Mapping[str, Any], found: list[Site], sites: Sites, folder: Path) -> Config:
    wrong = [field for field in _NOT_OFFERED if settings.get(field)]
    if wrong:
        raise StateError(
            f"Fusion layers are read that compute what they do here; got {', '.join(f'`{field}`' for field in wrong)} "
            f"at `{folder}`, which this version does not offer. Train them with the presets `dynamic` or `static`."
        )
    kinds = {site.kind for site in found}
    roles = {site.role for site in found}
    adapted = {layer_number(site, sites) for site in found}
    try:
        return FusionConfig.from_dict(
            {
                **{field: kind in kinds for kind, field in _FIELDS.items()},
                **{field: bool(settings.get(field)) for field in ("query", "key", "value")},
                "regularization": 0.01 if settings.get("regularization") else 0.0,
                "dropout": float(settings.get("dropout_prob") or 0.0),
                "leave_out": sorted({layer_number(site, sites) for site in sites} - adapted),
                "leave_out_roles": sorted({site.role for site in sites if site.kind in kinds} - roles),
            }
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise StateError(
            f"The configuration of fusion layers must be valid here too; got `{folder}`: {error}"
        ) from None
