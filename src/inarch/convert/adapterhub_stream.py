"""ReFT of the library `adapters`: its configuration and its tensors in our terms.

The reference keeps R as the parameters of torch's orthogonal parametrization; R itself is computed here as torch does
it there. That has signs on the diagonal of what is trained, cut to whole numbers: weight decay makes zeros of them, and
R loses those rows for good. Such a folder is read as what is left of it, without the promise of orthonormal rows.

A folder does not tell NoReFT from DiReFT, which differ by `subtract_projection`. So it is refused where R is free,
unless somebody has written that field into the record.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bank import module_key
from ..core.config import Config
from ..core.errors import StateError
from ..core.site import Site
from ..methods import AdapterConfig, Placement
from ..methods.reft import Reft, ReftConfig
from .adapterhub_sites import Stacks

logger = logging.getLogger(__name__)

ARCHITECTURE = "reft"
_SUBTRACTS = "subtract_projection"
_FREE = "projection.weight"
_TRAINED, _BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"
_LEAVES = {"learned_source.weight": "W", "learned_source.bias": "b"}
_ROUNDING = 1e-2


def stream_problems(row: Mapping[str, Any], place: object) -> list[str]:
    """Why a configuration of ReFT cannot be read, as sentences."""
    found = []
    if not row.get("orthogonality", True) and not isinstance(row.get(_SUBTRACTS), bool):
        found.append(
            "A folder of ReFT without orthogonal rows must say whether the projection is subtracted, which the library "
            f'`adapters` forgets; got no `{_SUBTRACTS}` at `{place}`. Write `"{_SUBTRACTS}": true` for NoReFT, or '
            "`false` for DiReFT, into its `config`."
        )
    if not row.get("output_reft", True):
        found.append(
            f"ReFT acts on the output of layers; got `output_reft=False` at `{place}`. Save the adapter again with "
            "version 1.3.0."
        )
    return found


def stream_part(row: Mapping[str, Any], stacks: Stacks) -> ReftConfig:
    """The configuration of ReFT, with our numbers of the layers."""
    known = set(ReftConfig().to_dict())
    values = {key: value for key, value in row.items() if key in known}
    if isinstance(values.get("non_linearity"), str):
        values["non_linearity"] = values["non_linearity"].lower()
    asked = row.get("layers", "all")
    if asked != "all":
        values["layers"] = [stacks.numbers[number] for number in asked if number in stacks.numbers]
    return ReftConfig.from_dict(values)


def take_streams(
    stored: dict[str, Tensor], name: str, stacks: Stacks, config: AdapterConfig, folder: object
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The tensors of ReFT under our keys, which are taken out of those of a folder, and the configuration for them."""
    part = next((part for part in config.parts if isinstance(part, ReftConfig)), None)
    if part is None:
        return config, {}
    units: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key in list(stored):
        found = re.fullmatch(rf"(.+\.\d+)\.reft_layer\.refts\.{re.escape(name)}\.units\.([01])\.(.+)", key)
        if found is not None:
            units.setdefault((found[1], found[2]), {})[found[3]] = stored.pop(key)
    tensors: dict[str, Tensor] = {}
    is_whole = True
    for (path, number), leaves in units.items():
        end = _end(part, number)
        site = _last_site(path, stacks)
        if end is None:
            continue  # the reference makes both ends, whichever is used
        if site is None:
            raise StateError(
                f"Every intervention of an adapter must belong to a layer of the model; got `{path}` at `{folder}`. "
                "Load it on the base model it was trained on."
            )
        prefix = f"{site.key}.{module_key(Reft.name, Placement(site=site, port='stream'))}.{end}"
        own = {ours: leaves.get(theirs) for theirs, ours in _LEAVES.items()} | {"R": _rows(leaves)}
        tensors |= {f"{prefix}.{leaf}": tensor for leaf, tensor in own.items() if tensor is not None}
        is_whole = is_whole and _is_orthonormal(own["R"])
    if part.orthogonality and not is_whole:
        logger.warning(
            "The adapter at %s has lost orthonormal rows to weight decay in the library that trained it. It is read as "
            "what is left, with `orthogonality=False`.",
            folder,
        )
        changed: tuple[Config, ...] = tuple(
            one.replace(orthogonality=False) if one is part else one for one in config.parts
        )
        config = replace(config, parts=changed)
    return config, tensors


def _end(config: ReftConfig, number: str) -> str | None:
    if config.tied_weights:
        return "both" if number == "0" else None
    end, count = {"0": ("prefix", config.prefix_positions), "1": ("suffix", config.suffix_positions)}[number]
    return end if count else None


def _bare(path: str, layers: str) -> str:
    """A layer's path without the name of the base model before it."""
    return re.sub(rf"^\w+\.(?={layers}\.\d+$)", "", path)


def _last_site(path: str, stacks: Stacks) -> Site | None:
    """The site that holds what acts after a layer of the reference."""
    for stack in stacks:
        layers = re.escape(stack.tower.layers).replace(r"\*", r"\d+")
        if not re.fullmatch(rf"(?:\w+\.)?{layers}\.\d+", path):
            continue
        if "*" in stack.tower.layers:
            found = [site for site in stack.sites if f".{site.layer_path}".endswith(f".{_bare(path, layers)}")]
        else:
            found = [site for site in stack.sites if site.layer == int(path.rpartition(".")[2])]
        if found:
            return found[-1]
    return None


def _rows(leaves: Mapping[str, Tensor]) -> Tensor | None:
    """R, as torch's parametrization gives it."""
    if _TRAINED not in leaves:
        return leaves.get(_FREE)
    trained = leaves[_TRAINED].float()
    linear: Any = nn.utils.parametrizations.orthogonal(nn.Linear(trained.shape[1], trained.shape[0], bias=False))
    state = {"parametrizations.weight.original": trained}
    if _BASE in leaves:
        state["parametrizations.weight.0.base"] = leaves[_BASE].float()
    try:
        with torch.no_grad():
            linear.load_state_dict(state)
            rows: Tensor = linear.weight
    except RuntimeError:  # shapes that do not belong together: the check of all tensors says which is missing
        return None
    return rows.clone()


def _is_orthonormal(rows: Tensor | None) -> bool:
    return rows is None or bool((rows @ rows.T - torch.eye(len(rows))).abs().max() < _ROUNDING)
