"""Writes LoRA and DoRA as a folder of PEFT, which computes the same with it.

PEFT adapts modules, not roles. Where one module plays several (fused queries, keys and values), the updates of the
roles become one: its rank is the sum of theirs, A holds theirs one below the other, and B has each in the rows of its
role. Where the roles share their A, as in a folder that PEFT made, they become the one update that they were. Rows of a
DoRA that no role adapts have the magnitude of the base.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bank import module_key
from ..core.errors import StateError
from ..core.site import Sites
from ..frozen import Base
from ..methods import AdapterConfig, Placement, method_of, placements
from ..methods.dora import DoRA, DoRAConfig
from ..methods.lora import LoRAConfig
from .peft_config import EXPERTS
from .peft_experts import Experts
from .peft_experts import written as experts_written
from .peft_names import module_path


@dataclass(frozen=True, slots=True)
class _Update:
    """The update of one role: B A times its scale, and what is added to the bias."""

    placement: Placement
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class _Map:
    """The update of one module, as PEFT has it: alpha / rank, or alpha / sqrt(rank), is its scale."""

    a: Tensor
    b: Tensor
    alpha: float
    bias: Tensor | None

    @property
    def rank(self) -> int:
        return len(self.a)


def write_peft(
    name: str,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    *,
    head: Sequence[str],
    model: nn.Module,
    sites: Sites,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings of PEFT's folder for an adapter.

    Arguments: `tensors` are the adapter's, and those of the task head with it, by the keys of an adapter file; `head`
    are the head's modules.

    Raises `StateError` for what PEFT does not have.
    """
    part = _only_lora(name, config)
    is_dora = isinstance(part, DoRAConfig)
    power = 0.5 if part.use_rslora else 1.0
    updates = _updates(name, part, tensors, sites)
    maps = {path: _joined(several, power) for path, several in updates.items()}
    experts = _experts(part, tensors, sites)
    ranks = {path: found.rank for path, found in maps.items()}
    alphas = {path: found.alpha for path, found in maps.items()}
    for update in experts:
        rank = update.a.shape[1]
        ranks[update.parameter], alphas[update.parameter] = rank, part.scale(update.placement) * rank**power
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    written: dict[str, Tensor] = experts_written(experts, model)
    for path, found in maps.items():
        key = f"base_model.model.{path}"
        written |= {f"{key}.lora_A.weight": found.a, f"{key}.lora_B.weight": found.b}
        if found.bias is not None and is_dora:  # PEFT has the learned bias of a DoRA in the base's alone
            raise StateError(
                f"An adapter is written for PEFT where PEFT has its method; got DoRA with `bias=True` of `{name}`. "
                "Save it as it is: `save(name, folder)`, or `--to inarch`."
            )
        if found.bias is not None:
            written[f"{key}.lora_B.bias"] = found.bias
        if is_dora:
            written[f"{key}.lora_magnitude_vector"] = _magnitudes(path, updates[path], model, tensors)
    for key, tensor in tensors.items():
        if key.startswith("head."):
            written[f"base_model.model.{key.removeprefix('head.')}"] = tensor.detach()
    transposed = [getattr(model.get_submodule(path), "nf", None) is not None for path in maps]  # transformers' Conv1D
    record = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        },
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(path): value for path, value in alphas.items() if value != alpha},
        "lora_dropout": part.dropout,
        "lora_bias": part.bias,
        "bias": "none",
        "use_rslora": part.use_rslora,
        "use_dora": is_dora,
        "fan_in_fan_out": bool(transposed) and all(transposed),
        "target_modules": _targets(list(maps), model),
        "target_parameters": [update.parameter for update in experts] or None,
        "modules_to_save": list(head) or None,
    }
    return written, record


def _only_lora(name: str, config: AdapterConfig) -> LoRAConfig | DoRAConfig:
    part = config.parts[0]
    other = next((method_of(one).name for one in config.parts if not isinstance(one, LoRAConfig | DoRAConfig)), "")
    if isinstance(part, LoRAConfig | DoRAConfig) and not other and not getattr(part, "use_gating", False):
        return part
    got = f"the method `{other}`" if other else "`use_gating=True`"
    raise StateError(
        f"An adapter is written for PEFT where PEFT has its method, plain LoRA or DoRA; got {got} of `{name}`. "
        "Save it as it is: `save(name, folder)`, or `--to inarch`."
    )


def _updates(
    name: str, part: LoRAConfig | DoRAConfig, tensors: Mapping[str, Tensor], sites: Sites
) -> dict[str, list[_Update]]:
    """By module, the updates of the roles that it plays."""
    found: dict[str, list[_Update]] = defaultdict(list)
    for placement in placements(part, sites):
        if placement.role in EXPERTS and placement.projection.experts:
            continue
        if placement.port != "linear":
            raise StateError(
                "An adapter is written for PEFT where its projections are modules; got "
                f"`{placement.projection_key}` of `{name}`, a weight that `{placement.site.layer_class}` applies "
                "itself. Save it as it is."
            )
        site = placement.site
        projection = site.projections[placement.role][placement.part]
        key = f"{site.key}.{module_key(method_of(part).name, placement)}"
        bias = tensors.get(f"{key}.bias")
        found[module_path(site, projection)].append(
            _Update(
                placement,
                *_factors(key, tensors),
                part.scale(placement),
                None if bias is None else bias.detach(),
            )
        )
    return found


def _experts(part: LoRAConfig | DoRAConfig, tensors: Mapping[str, Tensor], sites: Sites) -> list[Experts]:
    """The updates of experts that a module holds in one parameter."""
    found = []
    for place in placements(part, sites):
        if place.role in EXPERTS and place.projection.experts:
            parameter = f"{module_path(place.site, place.projection)}.{place.projection.weight}"
            key = f"{place.site.key}.{module_key(method_of(part).name, place)}"
            found.append(Experts(place, parameter, *_factors(key, tensors)))
    return found


def _magnitudes(path: str, updates: Sequence[_Update], model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """The magnitudes of all rows of a module."""
    site, place = updates[0].placement.site, updates[0].placement
    projection = site.projections[place.role][place.part]
    whole = Base(model.get_submodule(site.absolute(projection.path)), replace(projection, rows=None), path).read()
    found = torch.linalg.vector_norm(whole.weight, dim=1, dtype=torch.promote_types(whole.weight.dtype, torch.float32))
    for update in updates:
        place = update.placement
        own = site.projections[place.role][place.part]
        magnitude = tensors[f"{site.key}.{module_key(DoRA.name, place)}.magnitude"].detach()
        row = 0
        for start, stop in own.rows or ((0, own.out_features),):
            found[start:stop] = magnitude[row : row + stop - start]
            row += stop - start
    result: Tensor = found.to(updates[0].a.dtype)
    return result


def _factors(key: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B; those of PiSSA as an update of twice the rank, beside the base as it is."""
    a, b = tensors[f"{key}.A"].detach(), tensors[f"{key}.B"].detach()
    if f"{key}.A0" not in tensors:
        return a, b
    return torch.cat([a, tensors[f"{key}.A0"]], dim=-2), torch.cat([b, -tensors[f"{key}.B0"]], dim=-1)


def _joined(updates: Sequence[_Update], power: float) -> _Map:
    """One update of a module out of those of its roles; the scale is alpha / rank to that power."""
    first = updates[0]
    scale = first.scale
    same = all(other.scale == scale and torch.equal(other.a, first.a) for other in updates)
    rank = len(first.a) if same else sum(len(update.a) for update in updates)
    projection = first.placement.site.projections[first.placement.role][first.placement.part]
    b = first.b.new_zeros(projection.out_features, rank)
    bias = None if first.bias is None else first.bias.new_zeros(projection.out_features)
    column = 0
    for update in updates:
        own = update.placement.site.projections[update.placement.role][update.placement.part]
        row = 0
        for start, stop in own.rows or ((0, own.out_features),):
            piece = slice(row, row + stop - start)
            b[start:stop, column : column + len(update.a)] = update.b[piece] * (update.scale / scale)
            if bias is not None and update.bias is not None:
                bias[start:stop] = update.bias[piece] / scale  # PEFT scales the bias with the update
            row += stop - start
        column += 0 if same else len(update.a)
    a = first.a if same else torch.cat([update.a for update in updates])
    return _Map(a, b, scale * rank**power, bias)


def _targets(paths: list[str], model: nn.Module) -> list[str]:
    """The last names of the adapted modules, where these name no other module; else their paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    meant = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names]
    return names if sorted(meant) == sorted(paths) else sorted(paths)
