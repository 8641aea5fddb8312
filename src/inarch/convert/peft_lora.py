"""Reads LoRA and DoRA of PEFT: every `...lora_A.weight` is a projection with its rank, the settings give the scales."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bank import module_key
from ..core.config import Config
from ..core.errors import StateError
from ..methods import Placement
from ..methods.dora import DoRA
from ..methods.lora import LoRA
from .peft_config import left_out, made, patterns_of, wishes
from .peft_experts import take_experts
from .peft_head import Head
from .peft_source import LORA_KEY, Source, check_rest, own_path, plain, rows_of
from .peft_start import factors, kind_of, start_of

_MAGNITUDE_KEY = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")


def read_lora(
    source: Source, stored: dict[str, Tensor], heads: dict[str, Head]
) -> tuple[Config, dict[str, Tensor], list[str]]:
    """The configuration, the tensors by our keys, and the paths of the adapted modules.

    `heads` is given the modules outside of the layers that were adapted.
    """
    experts = take_experts(source, stored)
    maps: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in list(stored):
        if (found := LORA_KEY.fullmatch(key)) is not None:
            maps[plain(found["path"])][found["side"] if found["leaf"] == "weight" else "bias"] = stored.pop(key)
        elif (found := _MAGNITUDE_KEY.fullmatch(key)) is not None:
            maps[plain(found["path"])]["magnitude"] = stored.pop(key).flatten()
    outside = _merge_outside(source, maps, heads)
    inside = {path: parts for path, parts in maps.items() if path not in outside}
    places = source.find(inside)
    _check_targets(source, places)
    record, biases = source.record, _biases(source, stored, set(inside))
    check_rest(source, stored)
    method: type[LoRA | DoRA] = LoRA
    if any("magnitude" in parts for parts in inside.values()):
        method = DoRA
    if method is DoRA and kind_of(record):
        raise StateError(
            f"DoRA is read where it starts beside its base; got `init_lora_weights` {kind_of(record)!r} at "
            f"`{source.folder}`. Use PEFT, or train LoRA."
        )
    with_bias = bool(biases) or any("bias" in tensors for tensors in inside.values())
    values: list[tuple[Placement, int, float]] = []
    tensors: dict[str, Tensor] = {}
    for path, parts in inside.items():
        rank, alpha = rank_and_alpha(source, path, parts)
        learned = biases.get(path, torch.zeros(len(parts["B"]), dtype=parts["B"].dtype))
        if "bias" in parts:
            learned = learned + parts["bias"] * scale_of(source, rank, alpha)
        for placement in places[path]:
            values.append((placement, rank, alpha))
            key = f"{placement.site.key}.{module_key(method.name, placement)}"
            tensors[f"{key}.A"] = parts["A"].clone()
            tensors[f"{key}.B"] = rows_of(placement, parts["B"])
            if with_bias:
                tensors[f"{key}.bias"] = rows_of(placement, learned)
            if "magnitude" in parts:
                tensors[f"{key}.magnitude"] = rows_of(placement, parts["magnitude"])
            if kind_of(record):
                a, b = start_of(source, placement, rank, scale_of(source, rank, alpha))
                tensors |= {f"{key}.A0": a, f"{key}.B0": rows_of(placement, b)}
        _check_whole(source, places[path], path, len(parts["B"]))
    for update in experts:
        key = f"{update.placement.site.key}.{module_key(LoRA.name, update.placement)}"
        tensors |= {f"{key}.A": update.a, f"{key}.B": update.b}
        values.append((update.placement, update.a.shape[1], alpha_of(source, update.parameter)))
    dropout = float(record.get("lora_dropout") or 0.0)
    config = _lora_config(source, method.name, values, with_bias=with_bias, dropout=dropout)
    return config, tensors, [*maps, *(update.parameter for update in experts)]


def _merge_outside(source: Source, maps: Mapping[str, Mapping[str, Tensor]], heads: dict[str, Head]) -> set[str]:
    """Linear modules outside of all layers, such as a pooler or the task head, whole: with their update in the weight.

    Returns their paths in the folder.
    """
    modules = dict(source.model.named_modules())
    owners = Counter(id(p) for _, p in source.model.named_parameters(remove_duplicate=False))
    layers = tuple(f"{site.layer_path}." for site in source.names.sites)
    found = set()
    for path, parts in maps.items():
        own = own_path(path, source.model)
        module = modules.get(own)
        weight = getattr(module, "weight", None)
        if source.names.find(path) or not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
            continue
        if f"{own}.".startswith(layers) or owners[id(weight)] > 1 or "A" not in parts or "B" not in parts:
            continue
        if weight.shape != (len(parts["B"]), parts["A"].shape[-1]) or "magnitude" in parts:
            continue
        rank, alpha = rank_and_alpha(source, path, parts)
        tensors = {leaf: tensor.detach().clone() for leaf, tensor in module.state_dict().items()}
        scale = scale_of(source, rank, alpha)
        tensors["weight"] += (parts["B"] @ parts["A"] * scale).to(weight)
        if kind_of(source.record):
            a, b = factors(source.record, weight.detach(), rank, scale)
            tensors["weight"] -= (b @ a * scale).to(weight)
        if "bias" in parts:
            tensors["bias"] += (parts["bias"] * scale).to(weight)
        heads[own] = Head(path, tensors)
        found.add(path)
    return found


def rank_and_alpha(source: Source, path: str, parts: Mapping[str, Tensor]) -> tuple[int, float]:
    """The rank of one update, and its alpha."""
    missing = next((side for side in ("A", "B") if side not in parts), None)
    if missing is not None or parts["A"].dim() != 2 or parts["B"].dim() != 2:
        got = f"no `lora_{missing}`" if missing is not None else f"tensors of {parts['A'].dim()} dimensions"
        raise StateError(
            f"An update of a projection has two matrices; got {got} for `{path}` at `{source.folder}`. Copy or "
            "download it again, or train it on linear maps."
        )
    return len(parts["A"]), alpha_of(source, path)


def alpha_of(source: Source, path: str) -> float:
    """The alpha of what is adapted at a path."""
    return float(_by_pattern(source.record.get("alpha_pattern"), path, source.record.get("lora_alpha", 8)))


def scale_of(source: Source, rank: int, alpha: float) -> float:
    """What an update is multiplied by."""
    return alpha / (math.sqrt(rank) if source.record.get("use_rslora") else rank)


def _by_pattern(patterns: Any, path: str, default: Any) -> Any:
    """The value of the first pattern that matches a module path as PEFT matches them: its end, as an expression."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _check_targets(source: Source, places: Mapping[str, Sequence[Placement]]) -> None:
    """Raise `StateError` for matrices that were chosen as parameters (`target_parameters`), not as modules.

    PEFT takes their rows for outputs, however they are stored, and knows their ranks and scales by other names.
    """
    for path, meant in places.items():
        weight = f"{path}.{meant[0].projection.weight.rpartition('.')[2] or 'weight'}"
        if any(f".{weight}".endswith(f".{name}") for name in source.record.get("target_parameters") or ()):
            raise StateError(
                f"LoRA on parameters is read for experts that a module holds in one; got `{weight}` among "
                f"`target_parameters` at `{source.folder}`. Train it anew with `target_modules`."
            )


def _check_whole(source: Source, places: list[Placement], path: str, count: int) -> None:
    """Raise `StateError` where some output features of a fused module play no role that is known."""
    projections = [place.site.projections[place.role][place.part] for place in places]
    known = sum(projection.num_rows for projection in projections)
    if known < count and projections[0].out_features == count:
        raise StateError(
            f"An update is read where every output of its projection has a known role; got `{path}` with {count} "
            f"outputs, {known} of them known, at `{source.folder}`. Train it on other projections."
        )


def _biases(source: Source, stored: dict[str, Tensor], adapted: set[str]) -> dict[str, Tensor]:
    """What was added to the biases of the adapted modules, by module path; taken out of `stored`."""
    found = {}
    for key in [key for key in stored if key.endswith(".bias") and plain(key).removesuffix(".bias") in adapted]:
        path = plain(key).removesuffix(".bias")
        projection_place = source.names.find(path)[0]
        site = projection_place.site
        projection = site.projections[projection_place.role][projection_place.part]
        module = source.model.get_submodule(site.absolute(projection.path))
        base = getattr(module, "bias", None)
        if projection.weight or not isinstance(base, Tensor) or base.shape != stored[key].shape:
            continue  # `check_rest` names it
        value = stored.pop(key)
        found[path] = value - base.detach().to(value)
    return found


def _lora_config(
    source: Source,
    method: str,
    values: Sequence[tuple[Placement, int, float]],
    *,
    with_bias: bool,
    dropout: float,
) -> Config:
    """The configuration that asks for exactly these updates."""
    r = Counter(rank for _, rank, _ in values).most_common(1)[0][0]
    alpha = Counter(value for _, _, value in values).most_common(1)[0][0]
    return made(
        source,
        method,
        **wishes([place for place, _, _ in values]),
        r=r,
        alpha=alpha,
        use_rslora=bool(source.record.get("use_rslora")),
        rank_pattern=patterns_of([(place.projection_key, rank) for place, rank, _ in values], r),
        alpha_pattern=patterns_of([(place.projection_key, value) for place, _, value in values], alpha),
        bias=with_bias,
        dropout=dropout,
        **({"init_weights": "pissa"} if kind_of(source.record) else {}),
        **left_out(source.names.sites, [place for place, _, _ in values]),
    )
