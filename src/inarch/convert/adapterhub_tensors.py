"""The tensors of bottlenecks, LoRA and its kin, and (IA)³ of the library `adapters`, by our keys."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bank import module_key
from ..core.config import Config
from ..core.errors import StateError
from ..core.site import Site
from ..methods import AdapterConfig, LinearMethod, Placement
from ..methods.bottleneck import Bottleneck, BottleneckConfig
from ..methods.dora import DoRA, DoRAConfig
from ..methods.ia3 import IA3, IA3Config
from ..methods.lora import LoRA, LoRAConfig
from ..methods.mtl_lora import MTLLoRA, MTLLoRAConfig
from .adapterhub_fused import thirds_of_roles, widened
from .adapterhub_inputs import input_key
from .adapterhub_names import Place
from .adapterhub_sites import Stacks, fused_with_gate

_LEAVES = {
    "adapter_down": "down",
    "adapter_up": "up",
    "adapter_norm_before": "norm_before",
    "adapter_norm_after": "norm_after",
    "gate": "gate",
    "scaling": "scale",
    "lora_A": "A",
    "lora_B": "B",
    "m": "magnitude",
    "task_specific": "task",
    "weights": "weights",
}

_PHM_LEAVES = {
    "b": "bias",
    "phm_rule": "rule",
    "phm_rule_left": "rule_left",
    "phm_rule_right": "rule_right",
}

_FIELDS = {"up": "intermediate_lora", "down": "output_lora"}
"""The fields of ours that ask for a role, other than those of attentions."""

_METHODS: dict[type[Config], type[LinearMethod]] = {
    LoRAConfig: LoRA,
    DoRAConfig: DoRA,
    MTLLoRAConfig: MTLLoRA,
    IA3Config: IA3,
}


@dataclass(frozen=True, slots=True)
class _Module:
    """What the name of a tensor says: the module it is part of, in our terms, and the part."""

    site: Site
    place: Place
    leaf: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """What is read, and what it is in our terms."""

    folder: Path
    name: str
    stacks: Stacks
    config: AdapterConfig
    asked: tuple[str, ...]
    """The thirds of fused projections that are adapted."""


def tensors_of(source: Source, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor under our key. Raises `StateError` that lists those that belong to nothing in this model."""
    found: dict[str, Tensor] = {}
    strange: list[str] = []
    for key, tensor in stored.items():
        at_input = input_key(key, source.name, source.stacks)
        if at_input is not None:
            found[at_input] = tensor
            continue
        module = _module(key, source.name, source.stacks)
        pieces = _pieces(module, tensor, source) if module is not None else {}
        for ours, piece in pieces.items():
            # The reference stores the norm before an adapter twice: as itself and as the first step of `adapter_down`.
            if not torch.equal(found.setdefault(ours, piece), piece):
                strange.append(f"`{key}` (unlike its copy)")
        if not pieces:
            strange.append(f"`{key}`")
    if strange:
        more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
        raise StateError(
            f"Every tensor of an adapter must belong to a module that its configuration makes on this model; got "
            f"{', '.join(strange[:6])}{more} at `{source.folder}`. Load it on the base model it was trained on."
        )
    return found


def _module(key: str, name: str, stacks: Stacks) -> _Module | None:
    """The module a tensor is part of; None where this model has none of that name."""
    for stack in stacks:
        layers = re.escape(stack.tower.layers).replace(r"\*", r"\d+")
        found = re.fullmatch(rf"(?:\w+\.)?({layers}\.\d+)\.(.+)\.(adapters|loras)\.{re.escape(name)}\.(.+)", key)
        if found is None:
            continue
        places = stack.tower.bottlenecks if found[3] == "adapters" else stack.tower.linears
        place = places.get(found[2])
        site = stack.site(found[1], place.kind) if place is not None else None
        return _Module(site, place, tuple(found[4].split("."))) if place is not None and site is not None else None
    return None


def _pieces(module: _Module, tensor: Tensor, source: Source) -> dict[str, Tensor]:
    """One tensor of the reference as ours: none where it has no meaning, several where a projection is fused."""
    for part in source.config.parts:
        if isinstance(part, BottleneckConfig) and not module.place.roles:
            return _of_bottleneck(module, tensor, part, source.folder)
        if (
            type(part) in _METHODS
            and module.place.roles
            and getattr(part, _FIELDS.get(module.place.roles[0], "selfattn_lora"))
        ):
            return _of_linear(module, tensor, part, source.asked)
    return {}


def _of_bottleneck(module: _Module, tensor: Tensor, config: BottleneckConfig, folder: Path) -> dict[str, Tensor]:
    if not module.site.exact:
        raise StateError(
            "A bottleneck adapter is read where the branch output can be had as the layer adds it; got "
            f"`{module.site.key}` (`{module.site.layer_path}`), whose output the layer still scales, at `{folder}`. "
            "Use a base model without that scale, or LoRA."
        )
    head, *rest = module.leaf
    ours = _LEAVES.get(head, "")
    if head == "adapter_down":  # a sequence: the norm if there is one, the projection, the activation
        step = rest.pop(0) if rest else ""
        ours = {(True, "0"): "norm_before", (True, "1"): "down", (False, "0"): "down"}.get((config.ln_before, step), "")
    if config.phm_layer and ours in ("down", "up"):
        rest = [_PHM_LEAVES.get(leaf, leaf) for leaf in rest]
    prefix = f"{module.site.key}.{module_key(Bottleneck.name, Placement(site=module.site, port='sublayer'))}"
    return {".".join([prefix, ours, *rest]): tensor} if ours else {}


def _of_linear(module: _Module, tensor: Tensor, config: Config, asked: tuple[str, ...]) -> dict[str, Tensor]:
    site, (head, *rest), roles = module.site, module.leaf, module.place.roles
    leaf, method = _LEAVES.get(head), _METHODS[type(config)].name
    if head in ("m", "task_specific"):  # modules of one tensor: (rows, 1) and (r,)
        rest, tensor = [], tensor.flatten() if head == "m" else tensor
    if isinstance(config, IA3Config):
        leaf = {"lora_B": "scale", "gate": "gate"}.get(head)
        if head == "lora_B":
            tensor = tensor.flatten()  # (rows, 1)
    if leaf is None or not tensor.shape:
        return {}
    if len(roles) > 1:
        pieces = thirds_of_roles(site, asked, head, tensor)
    elif roles == ("up",) and fused_with_gate(site):
        pieces = _of_fused_mlp(site, tensor, head)
    else:
        pieces = dict.fromkeys(roles, tensor)
    if isinstance(config, LoRAConfig):
        pieces = {role: widened(head, piece, config.r) for role, piece in pieces.items()}
    keys = {role: module_key(method, Placement(site=site, port="linear", role=role)) for role in pieces}
    return {".".join([site.key, keys[role], leaf, *rest]): piece for role, piece in pieces.items()}


def _of_fused_mlp(site: Site, tensor: Tensor, head: str) -> dict[str, Tensor]:
    """One update of a projection that is both gate and up-projection, as two updates of the same input."""
    pieces = {}
    for role in ("up", "gate"):
        rows = site.projections[role][0].rows or ()
        found = torch.cat([tensor[start:stop] for start, stop in rows]) if head in ("lora_B", "m") else tensor
        pieces[role] = found
    return pieces
