"""What the library `adapters` makes of LoRA, and of parameters that all modules of an adapter share, in our terms.

    VeRA     dense matrices in the place of the vectors: (alpha / r) · V_B B V_D A, which is LoRA with B' = V_B B V_D
    DoRA     m / ||W + B A|| · (W x + b + s B A x): its norm lacks s = alpha / r, and it scales the bias. With the W and
             b of the base, the magnitude m' = f ||W + s B A|| and a learned bias c = (f - 1) b, f = m / ||W + B A||,
             make ours the same function
             of a fused q k v the library leaves the magnitude out of its forward, so it is LoRA there
    MTL      the weight of a single B, which means nothing, is left out
    PHM      a rule, and second factors, of one parameter for the whole model; ours belong to a stack

Of a model without a head the library saves no shared parameters, so its folders are not whole.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attach import base_of
from ..bank import module_key
from ..core.errors import ConfigError, StateError
from ..core.site import Sites
from ..methods import AdapterConfig, Placement, placements
from ..methods.bottleneck import Bottleneck, BottleneckConfig
from ..methods.dora import DoRA, DoRAConfig
from .adapterhub_sites import Stacks

_RULES = {"phm_rule": "rule", "phm_rule_left": "rule_left", "phm_rule_right": "rule_right"}
_FACTORS = {"": "W", "_left": "W_left", "_right": "W_right"}


def take_shared(stored: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The parameters that all modules share, by their name there, taken out of `stored`."""
    found = {}
    for key in list(stored):
        match = re.fullmatch(rf"(?:.+\.)?shared_parameters\.{re.escape(name)}\.(\w+)", key)
        if match is not None:
            found[match[1]] = stored.pop(key)
    return found


def vera_as_lora(stored: dict[str, Tensor], shared: dict[str, Tensor], name: str, folder: Path) -> None:
    """Put LoRA's matrices in the place of VeRA's."""
    end = f".loras.{name}.vera_D"
    paths = [key.removesuffix(end) for key in stored if key.endswith(end)]
    if not paths:
        return
    a, b = (_needed(shared, key, folder) for key in ("lora_A", "lora_B"))
    for path in paths:
        inner, outer = (stored.pop(f"{path}.loras.{name}.vera_{side}") for side in "DB")
        stored[f"{path}.loras.{name}.lora_A"] = a
        stored[f"{path}.loras.{name}.lora_B"] = outer @ b @ inner
    del shared["lora_A"], shared["lora_B"]


def drop_idle_weights(stored: dict[str, Tensor], name: str, stacks: Stacks) -> None:
    """Leave out the weights of MTL-LoRA that choose between one matrix, and the magnitudes of fused projections."""
    fused = tuple(f"{path}.loras.{name}.m.weight" for path in stacks.fused_paths())
    for key, tensor in list(stored.items()):
        if key.endswith(fused) or (key.endswith(f".loras.{name}.weights") and len(tensor) == 1):
            del stored[key]


def shared_tensors(config: AdapterConfig, sites: Sites, shared: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Shared parameters of bottlenecks, taken out of `shared`, by our keys: at the first module of each stack."""
    part = next((part for part in config.parts if isinstance(part, BottleneckConfig)), None)
    found: dict[str, Tensor] = {}
    if part is None or not part.phm_layer:
        return found
    rules = [key for key in _RULES if (key == "phm_rule") != part.factorized_phm_rule] if part.shared_phm_rule else []
    ends = [end for end in _FACTORS if (end == "") != part.factorized_phm_W] if part.shared_W_phm else []
    wanted = {f"down.{_RULES[key]}": key for key in rules}
    wanted |= {f"{side}.{_FACTORS[end]}": f"W_{side}{end}" for side in ("down", "up") for end in ends}
    first: dict[str, Placement] = {}
    try:
        for placement in placements(part, sites):
            first.setdefault(placement.site.stack, placement)
    except ConfigError as error:
        raise StateError(f"The configuration of an adapter must be valid here too; got `{folder}`: {error}") from None
    for placement in first.values():
        place = f"{placement.site.key}.{module_key(Bottleneck.name, placement)}"
        for ours, theirs in wanted.items():
            found[f"{place}.{ours}"] = _needed(shared, theirs, folder)
    for theirs in wanted.values():
        del shared[theirs]
    return found


def _needed(shared: Mapping[str, Tensor], key: str, folder: Path) -> Tensor:
    if key not in shared:
        raise StateError(
            f"An adapter is read where its folder holds all of it; got none of the parameter `{key}` that its modules "
            f"share, at `{folder}`. The library `adapters` does not save it where the model has no head: save the "
            "adapter there again, from a model with one."
        )
    return shared[key]


def of_dora(
    config: AdapterConfig, tensors: dict[str, Tensor], model: nn.Module, sites: Sites
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Configuration and tensors with magnitudes and biases that make our DoRA what theirs is on this base."""
    part = next((part for part in config.parts if isinstance(part, DoRAConfig)), None)
    if part is None:
        return config, tensors
    found, biases = dict(tensors), {}
    for placement in placements(part, sites):
        key = f"{placement.site.key}.{module_key(DoRA.name, placement)}"
        if not {f"{key}.{leaf}" for leaf in ("A", "B", "magnitude")} <= found.keys():
            continue  # what is missing is told where the tensors are checked
        base = base_of(model, placement.site, placement.site.projections[placement.role][placement.part]).read()
        weight, update = (
            base.weight.double(),
            (found[f"{key}.B"].double() @ found[f"{key}.A"].double()).to(base.weight.device),
        )
        factor = found[f"{key}.magnitude"].to(weight) / (weight + update).norm(dim=1)
        magnitude = factor * (weight + part.scale(placement) * update).norm(dim=1)
        found[f"{key}.magnitude"] = magnitude.to(tensors[f"{key}.magnitude"])
        bias = torch.zeros_like(factor) if base.bias is None else (factor - 1) * base.bias.to(factor)
        biases[f"{key}.bias"] = bias.to(tensors[f"{key}.magnitude"])
    if not any(bias.any() for bias in biases.values()):
        return config, found
    parts = tuple(one.replace(bias=True) if one is part else one for one in config.parts)
    return replace(config, parts=parts), found | biases
