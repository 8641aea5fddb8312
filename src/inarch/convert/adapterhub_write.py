"""Writes a bottleneck or LoRA as a folder of the library `adapters`, version 1.3.0, which computes the same with it.

What is written is read again by our own reader of that format, and must be the same adapter to the last number; so what
the reader knows of that library's habits holds here too. What comes out otherwise is refused.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bank import module_key
from ..core.config import Config
from ..core.errors import StateError
from ..core.site import Sites
from ..methods import AdapterConfig, Placement, method_of, placements
from ..methods.bottleneck import BottleneckConfig
from ..methods.lora import LoRAConfig
from .adapterhub_config import translate
from .adapterhub_fused import THIRDS, are_stacked, asked_thirds
from .adapterhub_names import TOWERS, Place
from .adapterhub_record import RECORD
from .adapterhub_sites import Stack, Stacks, known_towers, match_stacks
from .adapterhub_tensors import Source, tensors_of

VERSION = "adapters.1.3.0"
_OURS = {
    *("leave_out_roles", "leave_out_projections", "circuits", "rank_pattern", "alpha_pattern", "bias", "gate_lora"),
    *("use_rslora", "experts_lora"),
}
"""Fields that the library does not have."""
_LEAVES = {"up": "adapter_up", "norm_after": "adapter_norm_after", "gate": "gate", "scale": "scaling"}


def write_adapterhub(
    name: str, config: AdapterConfig, tensors: Mapping[str, Tensor], *, model: nn.Module, sites: Sites
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of that library's folder for an adapter. `tensors` are by the keys of an adapter file.

    Raises `StateError` for what it does not have.
    """
    part = config.parts[0]
    if len(config.parts) > 1 or not isinstance(part, BottleneckConfig | LoRAConfig):
        raise _refusal(name, f"the methods `{'`, `'.join(method_of(one).name for one in config.parts)}`")
    if isinstance(part, LoRAConfig) and part.init_weights == "pissa":
        raise _refusal(name, "`init_weights='pissa'`, whose frozen factors have no place there,")
    if isinstance(part, BottleneckConfig) and part.phm_layer:
        raise _refusal(name, "`phm_layer=True`, whose parameters have other names there,")
    if sites.model_type not in TOWERS:
        raise _refusal(name, f"the model type `{sites.model_type}`, whose modules have no names there,")
    stacks = match_stacks(known_towers(sites.model_type, name), sites, name)
    settings = _settings(part, stacks)
    pieces: dict[str, list[Tensor]] = defaultdict(list)
    for placement in sorted(placements(part, sites), key=_third):
        for key, tensor in _written(name, part, placement, stacks, tensors).items():
            pieces[key].append(tensor)
    written = {key: torch.cat(found) if len(found) > 1 else found[0] for key, found in pieces.items()}
    again = translate(settings, stacks, RECORD, later=False)
    if _computing(again.parts[0]) != _computing(part):
        different = [key for key, value in _computing(part).items() if _computing(again.parts[0]).get(key) != value]
        raise _refusal(name, f"{', '.join(f'`{key}`' for key in different)}, which mean something else there,")
    back = tensors_of(Source(Path(RECORD), name, stacks, again, asked_thirds(settings)), written)
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith("head.")}
    if back.keys() != own.keys() or any(not torch.equal(back[key], own[key].detach()) for key in own):
        raise _refusal(name, "weights that have another place there")
    record = {
        "config": settings,
        "hidden_size": next(iter(sites)).width,
        "model_class": type(model).__name__,
        "model_name": str(getattr(getattr(model, "config", None), "_name_or_path", "") or "") or None,
        "model_type": sites.model_type,
        "name": name,
        "version": VERSION,
    }
    return written, record


def _third(placement: Placement) -> int:
    """The order in which updates of a fused projection lie one below the other."""
    return THIRDS.index(placement.role) if placement.role in THIRDS else 0


def _refusal(name: str, got: str) -> StateError:
    return StateError(
        "An adapter is written for the library `adapters` where that computes the same, bottlenecks and LoRA; got "
        f"{got} in `{name}`. Save it as it is."
    )


def _computing(part: Config) -> dict[str, Any]:
    """The fields that decide what is computed, which the order of projections does not."""
    values = part.to_dict()
    values |= {"attn_matrices": sorted(values["attn_matrices"])} if "attn_matrices" in values else {}
    return {key: value for key, value in values.items() if not key.startswith("init_weights")}


def _settings(part: BottleneckConfig | LoRAConfig, stacks: Stacks) -> dict[str, Any]:
    values = {key: value for key, value in part.to_dict().items() if key not in _OURS}
    numbers = {ours: theirs for theirs, ours in stacks.numbers.items()}
    values["leave_out"] = [numbers[layer] for layer in values["leave_out"] if layer in numbers]
    if isinstance(part, LoRAConfig):
        roles = part.roles()
        fields = {place.field: place.roles[0] for place in stacks.linears() if place.kind == "mlp"}
        values |= {field: role in roles for field, role in fields.items()}
        return values | {"architecture": "lora", "composition_mode": "add"}
    if isinstance(values["reduction_factor"], dict):
        values["reduction_factor"] = {
            key if key == "default" else str(numbers[int(key)]): value
            for key, value in values["reduction_factor"].items()
        }
    if not isinstance(values["scaling"], str):
        values["scaling"] = float(values["scaling"])
    return values


def _written(
    name: str, part: BottleneckConfig | LoRAConfig, placement: Placement, stacks: Stacks, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one module by their keys there."""
    site = placement.site
    stack = next((stack for stack in stacks if any(other.key == site.key for other in stack.sites)), None)
    path = _path(stack, placement) if stack is not None and "*" not in stack.tower.layers else None
    if stack is None or path is None or site.role != site.kind:
        raise _refusal(name, f"`{site.key}` of {site.layer_class}, which has no such place there,")
    kind = "loras" if isinstance(part, LoRAConfig) else "adapters"
    theirs = f"{stack.tower.layers}.{site.layer}.{path}.{kind}.{name}"
    ours = f"{site.key}.{module_key(method_of(part).name, placement)}."
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(ours):
            head, _, rest = key.removeprefix(ours).partition(".")
            for leaf in _leaves(part, head):
                found[".".join(word for word in (theirs, leaf, rest) if word)] = tensor.detach()
    return found


def _leaves(part: BottleneckConfig | LoRAConfig, head: str) -> tuple[str, ...]:
    if isinstance(part, LoRAConfig):
        return (f"lora_{head}" if head in ("A", "B") else head,)
    if head == "norm_before":  # which the library stores twice
        return ("adapter_norm_before", "adapter_down.0")
    if head == "down":
        return (f"adapter_down.{int(part.ln_before)}",)
    return (_LEAVES[head],)


def _path(stack: Stack, placement: Placement) -> str | None:
    """The path of a module in its layer there, or of the fused one that it is a third of; None where it has none."""
    tower, role = stack.tower, placement.role
    places: Mapping[str, Place] = tower.linears if role else tower.bottlenecks
    roles = (role,) if role else ()
    paths = [path for path, place in places.items() if place.kind == placement.site.kind and place.roles == roles]
    if not paths and role in THIRDS and are_stacked(placement.site):
        paths = [path for path, place in places.items() if place.kind == placement.site.kind and role in place.roles]
    if len(paths) > 1:  # one for each form that an MLP may have: the gated one is the last
        paths = paths[-1:] if "gate" in placement.site.projections else paths[:1]
    return paths[0] if paths else None
