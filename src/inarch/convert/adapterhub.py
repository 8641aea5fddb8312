"""Reads adapter folders of the library `adapters` (adapter-hub), up to its version 1.3.0.

    adapter_config.json                        the configuration, the base model's type and id, the adapter's name
    pytorch_adapter.bin | adapter.safetensors  tensors, by the names of that library's modules
    adapter_interface.json                     names of the model's modules, for models adapted through hooks
    head_config.json, pytorch_model_head.bin | model_head.safetensors
                                               the prediction head, if it was saved along

An adapter is read so that it computes what that library (here: the reference) computes, or it is refused. Older folders
are brought up to date as the reference does it: renamed modules, `gelu` of folders without a version (which means
`gelu_new`), and LoRA of versions before 1.1.0, which was trained without its factor alpha / r.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bank import module_key
from ..core.config import Config
from ..core.errors import StateError
from ..core.site import Site, Sites
from ..methods import AdapterConfig, LinearMethod, Placement
from ..methods.bottleneck import Bottleneck, BottleneckConfig
from ..methods.dora import DoRA, DoRAConfig
from ..methods.ia3 import IA3, IA3Config
from ..methods.lora import LoRA, LoRAConfig
from ..methods.mtl_lora import MTLLoRA, MTLLoRAConfig
from ..methods.prefix import PrefixConfig
from ..methods.prompt import PromptConfig
from .adapterhub_config import translate
from .adapterhub_fused import asked_thirds, thirds_of_roles, widened
from .adapterhub_inputs import check_prompts, input_key
from .adapterhub_low_rank import drop_idle_weights, of_dora, shared_tensors, take_shared, vera_as_lora
from .adapterhub_names import RANDOM_BASES, Place, Tower, interface_towers
from .adapterhub_prefix import check_prefixes, take_prefixes
from .adapterhub_sites import Stacks, fused_with_gate, known_towers, match_stacks
from .adapterhub_stream import take_streams
from .consent import consent
from .weights import read_weights

INTERFACE = "adapter_interface.json"
RECORD, SAFE, TORCH = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD_RECORD, HEAD_SAFE, HEAD_TORCH = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"
FUSION_RECORD = "adapter_fusion_config.json"
FUSION_SAFE, FUSION_TORCH = "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"
OTHER_RECORDS = {FUSION_RECORD: "an AdapterFusion", "adapter_setup.json": "a setup of several adapters"}
RECORDS = (RECORD, HEAD_RECORD, *OTHER_RECORDS)
WEIGHTS = {RECORD: (SAFE, TORCH), HEAD_RECORD: (HEAD_SAFE, HEAD_TORCH), FUSION_RECORD: (FUSION_SAFE, FUSION_TORCH)}
"""The files beside a record: of each pair one is there; the first is preferred."""
LATEST = (1, 3)
"""The latest version whose configurations are known."""

_OLD_MODULES = re.compile(r"\b(?:attention|layer)_text_(?:task|lang)_adapters\b")
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
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
_METHODS: dict[type[Config], type[LinearMethod]] = {
    LoRAConfig: LoRA,
    DoRAConfig: DoRA,
    MTLLoRAConfig: MTLLoRA,
    IA3Config: IA3,
}


@dataclass(frozen=True, slots=True)
class StoredHead:
    """A prediction head as it lies in the folder, by the names of the reference's modules."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Converted:
    """An adapter of the library `adapters` in our terms, for one model."""

    name: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    """By the keys that `Adapters.__getitem__` has."""
    model_type: str
    base: str
    """The base model's id, or the path it had."""
    head: StoredHead | None
    difference: str = ""
    """How the base differs from the model, where that is told."""


def is_adapterhub(folder: Path) -> bool:
    """Whether a folder is in this format. (PEFT's, too, holds an `adapter_config.json`.)"""
    if not (folder / RECORD).is_file():
        return any((folder / record).is_file() for record in OTHER_RECORDS)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return (folder / SAFE).is_file() or (folder / TORCH).is_file()
    return not (isinstance(record, dict) and "peft_type" in record)


def read(
    folder: Path,
    model: nn.Module,
    sites: Sites,
    *,
    head: bool = True,
    other_base: Literal["refuse", "allow", "tell"] = "refuse",
) -> Converted:
    """The adapter of a folder, for a model with these sites.

    Arguments: `head=False` does not open the prediction head; `other_base="allow"` takes an adapter made for another
    model type, where the modules still correspond, and `tell` does so without a word but in `Converted.difference`.

    Raises `StateError` for anything missing, damaged, made for another model type, or that cannot be computed exactly.
    """
    record = _read_record(folder)
    name, model_type = record["name"], record["model_type"]
    difference = check_base(record, sites, folder, other_base)
    stacks = match_stacks(base_towers(model_type, folder), sites, folder)
    stored = {_OLD_MODULES.sub("adapters", key): value for key, value in read_weights(folder, SAFE, TORCH).items()}
    settings = _updated(record, stored)
    shared = take_shared(stored, name)
    vera_as_lora(stored, shared, name, folder)
    drop_idle_weights(stored, name)
    config = translate(settings, stacks, folder / RECORD, later=_version(record) > LATEST)
    config, streams = take_streams(stored, name, stacks, config, folder)
    common = shared_tensors(config, sites, shared, folder)
    stored |= {f"shared_parameters.{name}.{key}": tensor for key, tensor in shared.items()}  # which nothing asks for
    prefixes: dict[str, Tensor] = {}
    for part in config.parts:
        if isinstance(part, PrefixConfig):
            difference = check_prefixes(part, model_type, folder, other_base) or difference
            prefixes = take_prefixes(name, stored, config=part, stacks=stacks, sites=sites, folder=folder)
        elif isinstance(part, PromptConfig):
            difference = check_prompts(model_type, folder, other_base) or difference
    tensors = prefixes | streams | _convert(_Source(folder, name, stacks, config, asked_thirds(settings)), stored)
    config, tensors = of_dora(config, tensors | common, model, sites)
    return Converted(
        name=name,
        config=config,
        tensors=tensors,
        model_type=model_type,
        base=str(record.get("model_name") or ""),
        head=_read_head(folder) if head else None,
        difference=difference,
    )


# The record


def _read_record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD).is_file():
        found = next((what for file, what in OTHER_RECORDS.items() if (folder / file).is_file()), "nothing known")
        raise StateError(
            f"This version reads single adapters of the library `adapters`, folders with `{RECORD}`; got {found} at "
            f"`{folder}`. Load the adapters one by one."
        )
    record = read_json(folder / RECORD)
    missing = [key for key in ("name", "model_type") if not isinstance(record.get(key), str)]
    if missing or "config" not in record:
        raise StateError(
            f"`{RECORD}` must hold `name`, `model_type` and `config`; got none of `{(missing or ['config'])[0]}` at "
            f"`{folder}`. Save the adapter again with the library that wrote it."
        )
    return record


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises `StateError` for anything else."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(
            f"`{file.name}` must be readable JSON; got `{file}`: {error}. Copy or download it again."
        ) from None
    if not isinstance(record, dict):
        raise StateError(f"`{file.name}` must hold a mapping; got {record!r} at `{file}`. Save the adapter again.")
    return record


def base_towers(model_type: str, folder: Path) -> tuple[Tower, ...]:
    """The towers of the model a folder was made for: by its interface, or by the model type."""
    return _interface(folder) or known_towers(model_type, folder)


def _interface(folder: Path) -> tuple[Tower, ...]:
    """The towers of a folder with an interface; none for one without."""
    if not (folder / INTERFACE).is_file():
        return ()
    interface = read_json(folder / INTERFACE).get("interface")
    try:
        return interface_towers(interface)  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(
            f"`{INTERFACE}` must name the modules of a model under `interface`; got none for {error} at `{folder}`. "
            "Save the adapter again with the library that wrote it."
        ) from None


def check_base(record: Mapping[str, Any], sites: Sites, folder: Path, other_base: str) -> str:
    """How the base of a folder differs from the model, as a sentence. Raises `StateError` unless that is allowed."""
    if record["model_type"] != sites.model_type:
        difference = (
            f"the model types of an adapter's base and of the model must agree; got `{record['model_type']}` at "
            f"`{folder}` and `{sites.model_type}` for {sites.model_class}"
        )
        remedy = f"Load the base model `{record.get('model_name')}`"
    elif record["model_type"] in RANDOM_BASES and _version(record) > (0, 0):
        difference = (
            "an adapter must have been trained on the base it names; got one of the library `adapters`, which adds a "
            f"random bias to {sites.model_class} and does not save it, at `{folder}`"
        )
        remedy = "Train the adapter anew"
    else:
        return ""
    return consent(difference, remedy, folder, other_base)


def _updated(record: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Any:
    """The settings of a folder in the terms of the latest version."""
    settings = record["config"]
    if not isinstance(settings, Mapping):
        return settings
    settings = dict(settings)
    if record.get("version") is None and settings.get("non_linearity") in _OLD_ACTIVATIONS:
        settings["non_linearity"] = _OLD_ACTIVATIONS[settings["non_linearity"]]
    if settings.get("architecture") == "lora" and (0, 0) < _version(record) < (1, 1):
        settings["alpha"] = settings.get("r", settings.get("alpha"))
    # Early task adapters name an invertible part that only language adapters had.
    if record.get("type") == "text_task" and not any("invertible" in key for key in stored):
        settings |= {"inv_adapter": None, "invertible_adapter": None}
    return settings


def _version(record: Mapping[str, Any]) -> tuple[int, int]:
    """Which version wrote a folder; (0, 0) for the library's predecessor, whose versions have no prefix."""
    found = re.match(r"adapters\.(\d+)\.(\d+)", str(record.get("version")))
    return (int(found[1]), int(found[2])) if found is not None else (0, 0)


def _read_head(folder: Path) -> StoredHead | None:
    if not any((folder / file).is_file() for file in (HEAD_SAFE, HEAD_TORCH)):
        return None
    config = read_json(folder / HEAD_RECORD) if (folder / HEAD_RECORD).is_file() else {}
    return StoredHead(config, read_weights(folder, HEAD_SAFE, HEAD_TORCH))


# The tensors


@dataclass(frozen=True, slots=True)
class _Module:
    """What the name of a tensor says: the module it is part of, in our terms, and the part."""

    site: Site
    place: Place
    leaf: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """What is read, and what it is in our terms."""

    folder: Path
    name: str
    stacks: Stacks
    config: AdapterConfig
    asked: tuple[str, ...]
    """The thirds of fused projections that are adapted."""


def tensors_of(
    folder: Path, name: str, stored: Mapping[str, Tensor], *, stacks: Stacks, config: AdapterConfig, settings: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter by our keys, for what is about to be written. Raises `StateError` as `read` does."""
    return _convert(_Source(folder, name, stacks, config, asked_thirds(settings)), stored)


def _convert(source: _Source, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def _pieces(module: _Module, tensor: Tensor, source: _Source) -> dict[str, Tensor]:
    """One tensor of the reference as ours: none where it has no meaning, several where a projection is fused."""
    for part in source.config.parts:
        if isinstance(part, BottleneckConfig) and not module.place.roles:
            return _of_bottleneck(module, tensor, part, source.folder)
        if type(part) in _METHODS and module.place.roles:
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
        found = torch.cat([tensor[start:stop] for start, stop in rows]) if head == "lora_B" else tensor
        pieces[role] = found
    return pieces
