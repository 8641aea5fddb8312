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
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bank import module_key
from ..core.config import Config
from ..core.errors import ConfigError, StateError
from ..core.site import Projection, Sites
from ..methods import AdapterConfig, Placement, layer_number, placements
from ..methods.dora import DoRA
from ..methods.ia3 import IA3, IA3Config
from ..methods.lora import LoRA
from ..methods.vera import VeRA, VeRAConfig
from .consent import consent
from .peft_names import Names
from .peft_norms import read_norms
from .peft_prefix import read_prefix
from .peft_prompt import read_prompt
from .weights import read_weights

logger = logging.getLogger(__name__)

RECORD, SAFE, TORCH = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
WEIGHTS = {RECORD: (SAFE, TORCH)}
"""The files beside the record: of the pair one is there; the first is preferred."""
_PREFIX = "base_model.model."

_OTHER_METHODS = {
    "ADALORA": "AdaLoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "P_TUNING": "P-tuning",
}
"""What else `peft_type` may say, by its usual name."""

_OTHER_FIELDS = {
    "use_qalora": "QA-LoRA",
    "layer_replication": "LoRA on layers that it repeats",
    "target_parameters": "LoRA on parameters that no linear module applies",
    "trainable_token_indices": "trained rows of the embeddings",
    "alora_invocation_tokens": "activated LoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
}
"""Fields that make another method of LoRA."""

_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is."""

_KNOWN_FIELDS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *(
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
    ),
    *("alpha_pattern", "lora_bias", "feedforward_modules", "init_ia3_weights", "use_dora"),
    *("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("velora_config", "qalora_group_size", "runtime_config", "ensure_weight_tying", "enable_lora"),
    *_OTHER_FIELDS,
}

_ATTENTION_ROLES = ("q", "k", "v", "o")
_MLP_FIELDS = {"up": "intermediate_lora", "gate": "gate_lora", "down": "output_lora"}
_COMMON_WORDS = {
    *("model", "transformer", "encoder", "decoder", "layer", "layers", "block", "blocks", "h", "backbone"),
    *("base_model", "text_model", "vision_model", "language_model", "vision_tower"),
}
"""First words of module paths that name no model type."""


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


def is_peft(folder: Path) -> bool:
    """Whether a folder is in this format."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "peft_type" in record


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
    `Converted.difference`.

    Raises `StateError` for anything missing, damaged, made for another model, or that cannot be computed exactly.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    _check_method(record, folder)
    stored = {key.removeprefix(_PREFIX): tensor for key, tensor in read_weights(folder, SAFE, TORCH).items()}
    if record["peft_type"] == "PREFIX_TUNING":
        prefix, tensors = read_prefix(record, stored, model, sites, folder)
        base = str(record.get("base_model_name_or_path") or "")
        config = AdapterConfig((prefix,))
        return Converted(config=config, tensors=tensors, head=(), base=base, difference="", idle=())
    source = _Source(folder, record, model, Names(sites), other_base)
    heads = _heads(source, stored)
    if record["peft_type"] == "LORA":
        part, tensors, adapted = _lora(source, stored, heads)
    elif record["peft_type"] == "VERA":
        part, tensors, adapted = _vera(source, stored)
    elif record["peft_type"] == "LN_TUNING":
        norms = read_norms(stored, model, sites, folder)
        _check_rest(source, stored)
        part, tensors, adapted = norms.config, norms.tensors, norms.paths
        heads |= {_own_path(path, model): Head(path, found) for path, found in norms.outside.items()}
    elif record["peft_type"] == "PROMPT_TUNING":
        (part, tensors), adapted = read_prompt(record, stored, sites, folder), []
    else:
        part, tensors, adapted = _ia3(source, stored)
    of_base = [path for path in heads if head and not any(f"{path}.".startswith(f"{own}.") for own in own_heads)]
    if of_base and other_base != "tell":
        logger.warning(
            "%s replaces modules of the base, which stay replaced when the adapter is not active: %s.",
            folder,
            ", ".join(of_base),
        )
    return Converted(
        config=AdapterConfig((part,)),
        tensors=tensors | (_head_tensors(heads, source) if head else {}),
        head=tuple(heads) if head else (),
        base=str(record.get("base_model_name_or_path") or ""),
        difference=_check_family(source, adapted),
        idle=_idle(record, adapted, heads),
    )


@dataclass(frozen=True, slots=True)
class Head:
    """A whole module that was trained, by its path in the folder."""

    stored: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Source:
    """What is read, and what it is read into."""

    folder: Path
    record: Mapping[str, Any]
    model: nn.Module
    names: Names
    other_base: str

    def find(self, paths: Iterable[str]) -> dict[str, list[Placement]]:
        """The projections of every module path. Raises `StateError` that lists those that mean none here."""
        found = {path: self.names.find(path) for path in paths}
        strange = [path for path, meant in found.items() if not meant]
        if strange:
            more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
            raise StateError(
                "Adapters are read at the projections inside the layers' branches; got modules that are none in "
                f"{type(self.model).__name__}: {', '.join(f'`{path}`' for path in strange[:6])}{more}, at "
                f"`{self.folder}`. Load it on the base model it was trained on, or train it anew without these."
            )
        twice = Counter(meant.projection_key for meanings in found.values() for meant in meanings)
        clash = next((key for key, count in twice.items() if count > 1), "")
        if clash:
            raise StateError(
                f"One update belongs to a projection; got several for `{clash}` at `{self.folder}`. "
                "Load it on the base model it was trained on."
            )
        return found


# What is refused


def _check_method(record: Mapping[str, Any], folder: Path) -> None:
    method = record.get("peft_type")
    if method not in ("LORA", "VERA", "IA3", "LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING"):
        name = _OTHER_METHODS.get(str(method), f"the method `{method}`")
        raise StateError(
            "This version reads LoRA, DoRA, VeRA, (IA)³, trained norms, prefixes and prompts of PEFT; got "
            f"{name} at `{folder}`. "
            "Train one of those, or use PEFT."
        )
    if method in ("PROMPT_TUNING", "PREFIX_TUNING"):
        return
    other = next((name for key, name in _OTHER_FIELDS.items() if record.get(key)), None)
    unknown = [key for key, value in record.items() if key not in _KNOWN_FIELDS and value]
    if other is None and unknown:
        other = f"the setting `{unknown[0]}`, which it does not know,"
    if other is not None:
        raise StateError(
            f"This version reads plain LoRA, DoRA, VeRA and (IA)³ of PEFT; got {other} at `{folder}`. Train the "
            "adapter without, or use PEFT."
        )
    start = record.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        raise StateError(
            "An adapter is read where its base is the pre-trained one; got `init_lora_weights` "
            f"{start!r}, which changes the base, at `{folder}`. Save it in PEFT with "
            "`path_initial_model_for_weight_conversion`, which makes plain LoRA of it."
        )


def _check_family(source: _Source, adapted: Iterable[str]) -> str:
    """How an adapter was made for another model type, as far as anything says so; empty for none.

    Raises `StateError` where that is to be refused.
    """
    record, model, folder = source.record, source.model, source.folder
    own = type(model).__name__
    made_for = str((record.get("auto_mapping") or {}).get("base_model_class") or "")
    families = [re.sub(r"(For[A-Z]\w*|Model|LMHeadModel)$", "", name) for name in (made_for, own)]
    words = {part for name, _ in model.named_modules() for part in name.split(".")} | _COMMON_WORDS
    known = {str(getattr(model, "base_model_prefix", "")), *words}
    renamed = [path for path in adapted if path not in source.names.paths]
    foreign = next((path for path in renamed if path.split(".")[0] not in known), "")
    if made_for and not (families[0].startswith(families[1]) or families[1].startswith(families[0])):
        difference = f"`{made_for}`"
    elif foreign:
        difference = f"modules such as `{foreign}`"
    else:
        return ""
    text = f"the model that an adapter was made for must be of the same type; got {difference} at `{folder}` and {own}"
    remedy = f"Load the base model `{record.get('base_model_name_or_path')}`"
    return consent(text, remedy, folder, source.other_base)


# LoRA


_LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.(?P<leaf>weight|bias)")
_MAGNITUDE_KEY = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")


def _lora(
    source: _Source, stored: dict[str, Tensor], heads: dict[str, Head]
) -> tuple[Config, dict[str, Tensor], list[str]]:
    """The configuration, the tensors by our keys, and the paths of the adapted modules.

    `heads` is given the modules outside of the layers that were adapted.
    """
    maps: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in list(stored):
        if (found := _LORA_KEY.fullmatch(key)) is not None:
            maps[_plain(found["path"])][found["side"] if found["leaf"] == "weight" else "bias"] = stored.pop(key)
        elif (found := _MAGNITUDE_KEY.fullmatch(key)) is not None:
            maps[_plain(found["path"])]["magnitude"] = stored.pop(key).flatten()
    outside = _merge_outside(source, maps, heads)
    inside = {path: parts for path, parts in maps.items() if path not in outside}
    places = source.find(inside)
    record, biases = source.record, _biases(source, stored, set(inside))
    _check_rest(source, stored)
    method: type[LoRA | DoRA] = LoRA
    if any("magnitude" in parts for parts in inside.values()):
        method = DoRA
    with_bias = bool(biases) or any("bias" in tensors for tensors in inside.values())
    values: list[tuple[Placement, int, float]] = []
    tensors: dict[str, Tensor] = {}
    for path, parts in inside.items():
        rank, alpha = _rank_and_alpha(source, path, parts)
        learned = biases.get(path, torch.zeros(len(parts["B"]), dtype=parts["B"].dtype))
        if "bias" in parts:
            learned = learned + parts["bias"] * _scale(source, rank, alpha)
        for placement in places[path]:
            values.append((placement, rank, alpha))
            key = f"{placement.site.key}.{module_key(method.name, placement)}"
            tensors[f"{key}.A"] = parts["A"].clone()
            tensors[f"{key}.B"] = _rows(placement, parts["B"])
            if with_bias:
                tensors[f"{key}.bias"] = _rows(placement, learned)
            if "magnitude" in parts:
                tensors[f"{key}.magnitude"] = _rows(placement, parts["magnitude"])
        _check_whole(source, places[path], path, len(parts["B"]))
    dropout = float(record.get("lora_dropout") or 0.0)
    config = _lora_config(source, method.config_class, values, with_bias=with_bias, dropout=dropout)
    return config, tensors, list(maps)


def _merge_outside(source: _Source, maps: Mapping[str, Mapping[str, Tensor]], heads: dict[str, Head]) -> set[str]:
    """Linear modules outside of all layers, such as a pooler or the task head, whole: with their update in the weight.

    Returns their paths in the folder.
    """
    modules = dict(source.model.named_modules())
    owners = Counter(id(p) for _, p in source.model.named_parameters(remove_duplicate=False))
    layers = tuple(f"{site.layer_path}." for site in source.names.sites)
    found = set()
    for path, parts in maps.items():
        own = _own_path(path, source.model)
        module = modules.get(own)
        weight = getattr(module, "weight", None)
        if source.names.find(path) or not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
            continue
        if f"{own}.".startswith(layers) or owners[id(weight)] > 1 or "A" not in parts or "B" not in parts:
            continue
        if weight.shape != (len(parts["B"]), parts["A"].shape[-1]) or "magnitude" in parts:
            continue
        rank, alpha = _rank_and_alpha(source, path, parts)
        tensors = {leaf: tensor.detach().clone() for leaf, tensor in module.state_dict().items()}
        scale = _scale(source, rank, alpha)
        tensors["weight"] += (parts["B"] @ parts["A"] * scale).to(weight)
        if "bias" in parts:
            tensors["bias"] += (parts["bias"] * scale).to(weight)
        heads[own] = Head(path, tensors)
        found.add(path)
    return found


def _plain(path: str) -> str:
    """A module path without the names of PEFT's wrappers."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _rank_and_alpha(source: _Source, path: str, parts: Mapping[str, Tensor]) -> tuple[int, float]:
    """The rank of one update, and its alpha."""
    missing = next((side for side in ("A", "B") if side not in parts), None)
    if missing is not None or parts["A"].dim() != 2 or parts["B"].dim() != 2:
        got = f"no `lora_{missing}`" if missing is not None else f"tensors of {parts['A'].dim()} dimensions"
        raise StateError(
            f"An update of a projection has two matrices; got {got} for `{path}` at `{source.folder}`. Copy or "
            "download it again, or train it on linear maps."
        )
    record, rank = source.record, len(parts["A"])
    alpha = float(_by_pattern(record.get("alpha_pattern"), path, record.get("lora_alpha", 8)))
    return rank, alpha


def _scale(source: _Source, rank: int, alpha: float) -> float:
    """What an update is multiplied by."""
    return alpha / (math.sqrt(rank) if source.record.get("use_rslora") else rank)


def _by_pattern(patterns: Any, path: str, default: Any) -> Any:
    """The value of the first pattern that matches a module path as PEFT matches them: its end, as an expression."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _rows(placement: Placement, tensor: Tensor) -> Tensor:
    """What a tensor of the output features of a module has for one of the roles that it plays."""
    projection = placement.projection
    if projection.rows is None or len(tensor) != projection.out_features:
        return tensor.clone()
    return torch.cat([tensor[start:stop] for start, stop in projection.rows])


def _check_whole(source: _Source, places: list[Placement], path: str, count: int) -> None:
    """Raise `StateError` where some output features of a fused module play no role that is known."""
    projections = [place.site.projections[place.role][place.part] for place in places]
    known = sum(projection.num_rows for projection in projections)
    if known < count and projections[0].out_features == count:
        raise StateError(
            f"An update is read where every output of its projection has a known role; got `{path}` with {count} "
            f"outputs, {known} of them known, at `{source.folder}`. Train it on other projections."
        )


def _lora_config(
    source: _Source,
    kind: type[Config],
    values: Sequence[tuple[Placement, int, float]],
    *,
    with_bias: bool,
    dropout: float,
) -> Config:
    """The configuration that asks for exactly these updates."""
    r = Counter(rank for _, rank, _ in values).most_common(1)[0][0]
    alpha = Counter(value for _, _, value in values).most_common(1)[0][0]
    return _made(
        source,
        kind,
        **_wishes([place for place, _, _ in values]),
        r=r,
        alpha=alpha,
        use_rslora=bool(source.record.get("use_rslora")),
        rank_pattern=_patterns([(place.projection_key, rank) for place, rank, _ in values], r),
        alpha_pattern=_patterns([(place.projection_key, value) for place, _, value in values], alpha),
        bias=with_bias,
        dropout=dropout,
        **_left_out(source.names.sites, [place for place, _, _ in values]),
    )


def _wishes(places: Sequence[Placement]) -> dict[str, Any]:
    """The fields that ask for the roles of these projections."""
    roles = {place.role for place in places}
    attention = [role for role in _ATTENTION_ROLES if role in roles]
    flags = {name: role in roles for role, name in _MLP_FIELDS.items()}
    return {"selfattn_lora": bool(attention), "attn_matrices": attention or ["q", "v"], **flags}


def _made(source: _Source, kind: type[Config], **values: Any) -> Config:
    try:
        return kind.from_dict(values)
    except ConfigError as error:
        raise StateError(
            f"The configuration of an adapter must be valid here too; got `{source.folder / RECORD}`: {error}"
        ) from None


def _patterns(values: Iterable[tuple[str, Any]], default: Any) -> dict[str, Any]:
    """What differs from the default, by pattern: one for a role that has one value in all layers, else one for each."""
    tails: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in values:
        tails[f"*.{key.split('.', 2)[2]}"][key] = value
    found: dict[str, Any] = {}
    for tail, by_key in tails.items():
        shared = set(by_key.values())
        if len(shared) == 1:
            found |= {} if shared == {default} else {tail: shared.pop()}
        else:
            found |= {key: value for key, value in by_key.items() if value != default}
    return found


def _left_out(sites: Sites, present: Sequence[Placement]) -> dict[str, Any]:
    """The layers, and the projections of others, that play one of the adapted roles and are not adapted."""
    roles = {place.role for place in present}
    every = [
        Placement(site=site, port="linear", role=role, part=part)
        for site in sites
        for role, projections in site.projections.items()
        if role in roles and (site.kind == "mlp") == (role in _MLP_FIELDS)
        for part in range(len(projections))
    ]
    keys = {place.projection_key for place in present}
    reached = {layer_number(place.site, sites) for place in present}
    layers = sorted({layer_number(place.site, sites) for place in every} - reached)
    absent = [
        (place.projection_key, place.projection_key not in keys)
        for place in every
        if layer_number(place.site, sites) in reached
    ]
    return {"leave_out": layers, "leave_out_projections": list(_patterns(absent, False))}


# VeRA

_VERA_KEY = re.compile(r"(?P<path>.+)\.vera_lambda_(?P<side>[bd])(?:\.default)?")
_VERA_MATRIX = re.compile(r"base_model\.vera_(?P<side>[AB])(?:\.default)?")


def _vera(source: _Source, stored: dict[str, Tensor]) -> tuple[Config, dict[str, Tensor], list[str]]:
    """The configuration, the tensors by our keys, and the paths of the adapted modules.

    PEFT has one A and one B, as large as the largest projection needs, and takes their first columns and rows.
    """
    vectors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    matrices: dict[str, Tensor] = {}
    for key in list(stored):
        if (found := _VERA_MATRIX.fullmatch(key)) is not None:
            matrices[found["side"]] = stored.pop(key)
        elif (found := _VERA_KEY.fullmatch(key)) is not None:
            vectors[_plain(found["path"])][found["side"]] = stored.pop(key)
    if len(matrices) < 2 or not vectors or any(len(pair) < 2 for pair in vectors.values()):
        raise StateError(
            f"VeRA is read with its random matrices and two vectors for each projection; got a folder without, "
            f"`{source.folder}`. Save it in PEFT with `save_projection=True`."
        )
    places = source.find(vectors)
    _check_rest(source, stored)
    fused = next((path for path, meant in places.items() if len(meant) > 1 or _projection(meant[0]).rows), "")
    if fused:
        raise StateError(
            f"VeRA is read where each role has a projection of its own; got the fused `{fused}`, whose roles take "
            f"other rows of the random matrix, at `{source.folder}`. Use PEFT, or train LoRA."
        )
    present = [meant[0] for meant in places.values()]
    config = _made(
        source,
        VeRAConfig,
        **_wishes(present),
        r=len(matrices["A"]),
        dropout=float(source.record.get("vera_dropout") or 0.0),
        **_left_out(source.names.sites, present),
    )
    tensors = {
        f"{meant[0].site.key}.{module_key(VeRA.name, meant[0])}.{side}": vector
        for path, meant in places.items()
        for side, vector in vectors[path].items()
    }
    seen = set()
    for placement in placements(config, source.names.sites):
        projection, key = _projection(placement), f"{placement.site.key}.{module_key(VeRA.name, placement)}"
        sizes = {"A": projection.in_features, "B": projection.num_rows}
        for side, size in sizes.items():
            if (placement.site.stack, side, size) not in seen:  # kept by the first that has it
                seen.add((placement.site.stack, side, size))
                whole = matrices[side]
                tensors[f"{key}.{side}"] = (whole[:, :size] if side == "A" else whole[:size]).clone()
    return config, tensors, list(vectors)


def _projection(placement: Placement) -> Projection:
    return placement.site.projections[placement.role][placement.part]


# (IA)³

_IA3_KEY = re.compile(r"(?P<path>.+)\.ia3_l(?:\.default)?")


def _ia3(source: _Source, stored: dict[str, Tensor]) -> tuple[Config, dict[str, Tensor], list[str]]:
    """The configuration, the tensors by our keys, and the paths of the adapted modules.

    PEFT scales the input of what `feedforward_modules` names, and the output of the rest: the tensor is a row, or a
    column.
    """
    scales: dict[str, Tensor] = {}
    for key in list(stored):
        if (found := _IA3_KEY.fullmatch(key)) is not None:
            scales[_plain(found["path"])] = stored.pop(key)
    places = source.find(scales)
    _check_rest(source, stored)
    tensors: dict[str, Tensor] = {}
    at_input: dict[str, set[bool]] = defaultdict(set)
    for path, scale in scales.items():
        inner = len(scale) == 1 and scale.shape[-1] != 1
        for place in places[path]:
            at_input[place.role].add(inner)
            key = f"{place.site.key}.{module_key(IA3.name, place)}"
            if inner:
                tensors[f"{key}.input_scale"] = scale.flatten()
            else:
                tensors[f"{key}.scale"] = _rows(place, scale.flatten())
    mixed = [role for role, sides in at_input.items() if len(sides) > 1 or (role == "gate")]
    if mixed:
        raise StateError(
            "The projections of one role are all scaled at their input, or all at their output, and no gate is; got "
            f"`{mixed[0]}` otherwise, at `{source.folder}`. Use PEFT."
        )
    inside = {role for role, sides in at_input.items() if True in sides}
    present = [place for meanings in places.values() for place in meanings]
    attention = [role for role in _ATTENTION_ROLES if role in at_input]
    if "up" in at_input and "down" in inside:
        raise StateError(
            "(IA)³ scales an MLP between its projections at one place; got the output of the up-projection and the "
            f"input of the down-projection, at `{source.folder}`. Use PEFT."
        )
    config = _made(
        source,
        IA3Config,
        selfattn_lora=bool(attention),
        attn_matrices=attention or ["k", "v"],
        intermediate_lora="up" in at_input or "down" in inside,
        after_activation="up" not in at_input,
        output_lora="down" in at_input and "down" not in inside,
        input_matrices=[role for role in (*_ATTENTION_ROLES, "up") if role in inside],
        **_left_out(source.names.sites, present),
    )
    return config, tensors, list(scales)


# What lies beside the updates


def _heads(source: _Source, stored: dict[str, Tensor]) -> dict[str, Head]:
    """The modules that `modules_to_save` names, by their path in this model; takes their tensors out of `stored`."""
    wanted = source.record.get("modules_to_save") or ()
    found: dict[str, Head] = {}
    for key in [
        key for key in stored if not any(word in key for word in ("lora_", "ia3_l", "vera_", "ln_tuning_layers"))
    ]:
        parents = [key[:place] for place, letter in enumerate(key) if letter == "."]
        path = next((path for path in parents if any(path.endswith(name) for name in wanted)), None)
        if path is not None:
            leaf = key.removeprefix(f"{path}.").removeprefix("modules_to_save.").removeprefix("default.")
            found.setdefault(path, Head(path)).tensors[leaf] = stored.pop(key)
    return {_own_path(path, source.model): head for path, head in found.items()}


def _own_path(path: str, model: nn.Module) -> str:
    """The path in this model of a module that was a part of another model around the same base, or of its base."""
    modules = dict(model.named_modules())
    prefix = str(getattr(model, "base_model_prefix", ""))
    choices = (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}."))
    return next((choice for choice in choices if choice in modules), path)


def _head_tensors(heads: Mapping[str, Head], source: _Source) -> dict[str, Tensor]:
    """The tensors of a head by our keys. Raises `StateError` for a module that the model does not have."""
    modules = dict(source.model.named_modules())
    absent = next((head.stored for path, head in heads.items() if path not in modules), None)
    if absent is not None:
        raise StateError(
            f"The task head of an adapter must exist in the model; got `{absent}` of `{source.folder}` for "
            f"{type(source.model).__name__}. Load the model with its task head, or pass `head=False`."
        )
    return {f"head.{path}.{leaf}": tensor for path, head in heads.items() for leaf, tensor in head.tensors.items()}


def _biases(source: _Source, stored: dict[str, Tensor], adapted: set[str]) -> dict[str, Tensor]:
    """What was added to the biases of the adapted modules, by module path; taken out of `stored`."""
    found = {}
    for key in [key for key in stored if key.endswith(".bias") and _plain(key).removesuffix(".bias") in adapted]:
        path = _plain(key).removesuffix(".bias")
        projection_place = source.names.find(path)[0]
        site = projection_place.site
        projection = site.projections[projection_place.role][projection_place.part]
        module = source.model.get_submodule(site.absolute(projection.path))
        base = getattr(module, "bias", None)
        if projection.weight or not isinstance(base, Tensor) or base.shape != stored[key].shape:
            continue  # `_check_rest` names it
        value = stored.pop(key)
        found[path] = value - base.detach().to(value)
    return found


def _check_rest(source: _Source, stored: Mapping[str, Tensor]) -> None:
    """Raise `StateError` for tensors that have no meaning here and say something else than the model."""
    own = dict(source.model.state_dict())
    strange = []
    for key, tensor in stored.items():
        base = own.get(_plain(key))
        if base is None or base.is_meta or base.shape != tensor.shape or not torch.equal(base.to(tensor), tensor):
            strange.append(f"`{key}`")
    if strange:
        what = " (trained biases outside of the adapted projections)" if source.record.get("bias") == "all" else ""
        more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
        raise StateError(
            f"Every tensor of an adapter must belong to a projection of a branch, or to what `modules_to_save` names; "
            f"got {', '.join(strange[:6])}{more}{what} at `{source.folder}`. Use PEFT, or train it without these."
        )


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
    idle += [
        f"modules_to_save: {name}" for name in saved if not any(head.stored.endswith(name) for head in heads.values())
    ]
    return tuple(idle)
