"""What the library `adapters` has at the input of a model, as ours: invertible adapters."""

import re
from collections.abc import Mapping
from typing import Any

from ..core.config import Config
from ..core.site import Site
from ..methods.invertible import Invertible, InvertibleConfig
from .adapterhub_sites import Stacks

_INVERTIBLE = re.compile(r"(?:\w+\.)*invertible(?:_lang)?_adapters\.(.+)\.([FG])\.([02])\.(weight|bias)")
_STEPS = {"0": "down", "2": "up"}


def updated_inputs(row: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an invertible part as version 1.3.0 has them; older folders keep them in a mapping."""
    given = row.get("invertible_adapter")
    if isinstance(given, Mapping) and not row.get("inv_adapter"):
        coupling, factor = given.get("block_type"), given.get("reduction_factor")
        return {**row, "inv_adapter": coupling, "inv_adapter_reduction_factor": factor}
    return dict(row)


def invertible_part(row: Mapping[str, Any]) -> list[Config]:
    """The invertible part of a bottleneck's settings, which has the activation of the bottleneck."""
    row = updated_inputs(row)
    if not row.get("inv_adapter"):
        return []
    values = {key: row[key] for key in ("inv_adapter", "inv_adapter_reduction_factor")}
    return [InvertibleConfig(**values, non_linearity=str(row["non_linearity"]).lower())]


def invertible_reasons(row: Mapping[str, Any], stacks: Stacks) -> list[tuple[str, Any, str]]:
    """Why an invertible part cannot be read exactly: field, value and what it is."""
    coupling = updated_inputs(row).get("inv_adapter")
    if not coupling:
        return []
    if coupling != "nice":
        return [("inv_adapter", coupling, "a coupling that the library itself cannot run")]
    if not first_sites(stacks)[0].stack.startswith("text"):
        return [("inv_adapter", coupling, "an invertible adapter that it applies to what an encoder of sound gives")]
    if any(stack.tower.hooks for stack in stacks):
        return [("inv_adapter", coupling, "an invertible adapter on a hook, before the model scales its embeddings")]
    return []


def first_sites(stacks: Stacks) -> list[Site]:
    """The first site of every stack."""
    return [stack.sites[0] for stack in stacks if stack.sites]


def input_key(key: str, name: str, stacks: Stacks) -> str | None:
    """Our key of a tensor at the input; None for any other tensor."""
    found = _INVERTIBLE.fullmatch(key)
    if found is None or found[1] != name:
        return None
    return f"{first_sites(stacks)[0].key}.{Invertible.name}.{found[2]}.{_STEPS[found[3]]}.{found[4]}"
