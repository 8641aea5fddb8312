"""The configurations of the library `adapters` as ours: exactly, or not at all.

What our methods do not compute to the last term is refused with the name of the field that asks for it.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..core.config import Config
from ..core.errors import ConfigError, StateError, join_problems
from ..core.site import Kind
from ..core.wiring import Circuit
from ..methods import AdapterConfig
from ..methods.bottleneck import BottleneckConfig
from ..methods.dora import DoRAConfig
from ..methods.ia3 import IA3Config
from ..methods.lora import LoRAConfig
from ..methods.low_rank import LowRankConfig
from ..methods.mtl_lora import MTLLoRAConfig
from ..methods.mute import MuteConfig
from ..methods.prefix import PrefixConfig
from .adapterhub_inputs import invertible_part, invertible_reasons, prompt_part, prompt_reasons
from .adapterhub_names import Place
from .adapterhub_prefix import prefix_part
from .adapterhub_sites import Stack, Stacks
from .adapterhub_stream import ARCHITECTURE, stream_part, stream_problems

_FIELD_OF_KIND: dict[Kind, str] = {
    "self_attention": "mh_adapter",
    "mlp": "output_adapter",
    "cross_attention": "cross_adapter",
}
_FIELD_OF_ROLE = {"up": "intermediate_lora", "down": "output_lora"}

_IDLE = {
    *("architecture", "composition_mode", "use_dora", "vera_d", "vera_b", "dtype"),
    *("inv_adapter", "inv_adapter_reduction_factor", "invertible_adapter"),
    *("phm_layer", "phm_dim", "phm_rank", "phm_bias", "phm_c_init", "phm_init_range", "learn_phm"),
    *("factorized_phm_W", "factorized_phm_rule", "shared_W_phm", "shared_phm_rule", "hypercomplex_nonlinearity"),
}
"""Fields that say nothing about what a bottleneck, LoRA or (IA)³ computes, or that are looked at for a refusal."""


def translate(settings: Any, stacks: Stacks, place: object, *, later: bool) -> AdapterConfig:
    """The configuration of a folder, as ours.

    Arguments: `settings` is what the folder holds under `config`, already in the terms of version 1.3.0; `later` says
    that a later one wrote it, so that a field unknown here may mean something; `place` is the file, for messages.

    Raises `StateError` that lists everything that cannot be computed exactly.
    """
    rows = [settings]
    if isinstance(settings, Mapping) and settings.get("architecture") == "union":
        rows = settings["configs"] if isinstance(settings.get("configs"), list) else [None]
    problems = [problem for row in rows for problem in _unsupported(row, stacks, place, later)]
    if problems:
        raise StateError(join_problems(problems))
    try:
        parts: list[Config] = [part for row in rows for part in _parts(row, stacks)]
        if deleted := stacks.deleted():
            sited = [part.replace(leave_out_roles=deleted) for part in parts if hasattr(part, "leave_out_roles")]
            parts = [*sited, *(part for part in parts if not hasattr(part, "leave_out_roles"))]
            parts.append(MuteConfig(roles=deleted))
        return AdapterConfig(tuple(parts))
    except (ConfigError, TypeError, ValueError) as error:  # the latter two where a value is of another type altogether
        raise StateError(f"The configuration of an adapter must be valid here too; got `{place}`: {error}") from None


def _parts(row: Mapping[str, Any], stacks: Stacks) -> list[Config]:
    if row.get("architecture") == ARCHITECTURE:
        return [stream_part(row, stacks)]
    if row.get("architecture") == "mtl_lora":
        return [_linear(row, stacks, MTLLoRAConfig())]
    if row.get("architecture") == "prefix_tuning":
        return [prefix_part(row, _layers(row, stacks))]
    if row.get("architecture") == "prompt_tuning":
        return [prompt_part(row, stacks)]
    if row.get("architecture") != "lora":
        return [_bottleneck(row, stacks), *invertible_part(row)]
    if row.get("use_dora"):
        return _of_dora(row, stacks)
    if row.get("composition_mode") != "scale":
        return [_linear(row, stacks, LoRAConfig())]
    return [_linear(row, stacks, IA3Config(after_activation=False))]


def _of_dora(row: Mapping[str, Any], stacks: Stacks) -> list[Config]:
    """DoRA; and LoRA where a projection is fused, whose magnitude the reference leaves out of its forward."""
    if not row.get("selfattn_lora", True) or not stacks.are_fused():
        return [_linear(row, stacks, DoRAConfig())]
    rest = {field: row.get(field) for field in _FIELD_OF_ROLE.values()}
    found: list[Config] = [_linear({**row, **dict.fromkeys(rest, False)}, stacks, LoRAConfig())]
    if any(rest.values()):
        found.append(_linear({**row, "selfattn_lora": False}, stacks, DoRAConfig()))
    return found


def _bottleneck(row: Mapping[str, Any], stacks: Stacks) -> BottleneckConfig:
    values = _known(row, BottleneckConfig) | dict.fromkeys(_FIELD_OF_KIND.values(), False)
    places = list(_wanted(row, stacks.bottlenecks()))
    values |= {_FIELD_OF_KIND[place.kind]: True for place in places}
    circuits: dict[str, Circuit] = {_FIELD_OF_KIND[place.kind]: place.circuit for place in places}
    if any(stack.tower.hooks for stack in stacks):
        values |= {"original_ln_after": True, "original_ln_before": _reads_sum(row, stacks)}
        for stack, place in _hooked(row, stacks):
            if stack.tower.hooks[place.kind].norm is not None and _applies_norm(row):
                circuits[_FIELD_OF_KIND[place.kind]] = "last_norm"
    values["circuits"] = {field: circuit for field, circuit in circuits.items() if circuit != "own"}
    values["leave_out"] = _layers(row, stacks)
    values["non_linearity"] = str(values["non_linearity"]).lower()
    if row.get("phm_layer"):  # how it was started means nothing for weights that are there
        values["init_weights"] = "bert"
        values.pop("hypercomplex_nonlinearity", None)
    factor = values["reduction_factor"]
    if isinstance(factor, Mapping):
        values["reduction_factor"] = {
            key if key == "default" else str(stacks.numbers[int(key)]): value
            for key, value in factor.items()
            if key == "default" or (key.isdigit() and int(key) in stacks.numbers)
        }
    return BottleneckConfig.from_dict(values)


def _linear(row: Mapping[str, Any], stacks: Stacks, default: LowRankConfig | IA3Config) -> Config:
    values = _known(row, type(default))
    if values.get("init_weights") not in ("lora", "bert") or isinstance(default, DoRAConfig):
        values.pop("init_weights", None)  # one of another method's; the weights are loaded anyway
    places = list(_wanted(default.to_dict() | dict(row), stacks.linears()))
    roles = {role for place in places for role in place.roles}
    asked = row.get("attn_matrices", default.attn_matrices)
    # The reference accepts "o" and adapts nothing for it.
    values["attn_matrices"] = [role for role in ("q", "k", "v") if role in asked and role in roles]
    values["selfattn_lora"] = bool(values["attn_matrices"])
    if values["selfattn_lora"] and stacks.thirds_are_interleaved():
        if isinstance(default, LoRAConfig):  # one update of the rank of all, see `adapterhub_fused`
            count = len(values["attn_matrices"])
            values |= {"r": count * values.get("r", default.r), "alpha": count * values.get("alpha", default.alpha)}
        values["attn_matrices"] = ["q", "k", "v"]
    values |= {field: role in roles for role, field in _FIELD_OF_ROLE.items()}
    if "up" in roles and stacks.gates_are_fused() and isinstance(default, LoRAConfig | DoRAConfig):
        values["gate_lora"] = True
    values["leave_out"] = _layers(row, stacks)
    return default.replace(**values)


def _known(row: Mapping[str, Any], config: type[Config]) -> dict[str, Any]:
    """The fields that we have too."""
    ours = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return {key: value for key, value in row.items() if key in ours}


def _wanted(row: Mapping[str, Any], places: Iterable[Place]) -> Iterable[Place]:
    return (place for place in places if row.get(place.field))


def _layers(row: Mapping[str, Any], stacks: Stacks) -> list[int]:
    """`leave_out` in our numbers; numbers of layers that do not exist leave nothing out."""
    return [stacks.numbers[number] for number in row.get("leave_out") or () if number in stacks.numbers]


def _unsupported(row: Any, stacks: Stacks, place: object, later: bool) -> list[str]:
    """Every reason why a configuration cannot be read, as sentences."""
    if not isinstance(row, Mapping):
        return [
            f"`config` must describe an adapter; got {row!r} at `{place}`. Save the adapter with the latest version."
        ]
    kind = row.get("architecture")
    if kind == "prefix_tuning":
        known = PrefixConfig().to_dict().keys() | {"architecture"}
        return [
            _refusal(key, value, "a field of a later version", place)
            for key, value in row.items()
            if later and value and key not in known
        ]
    if kind == "prompt_tuning":
        return [_refusal(*reason, place) for reason in prompt_reasons(row, stacks, later=later)]
    if kind == ARCHITECTURE:
        return stream_problems(row, place)
    if kind not in (None, "bottleneck", "lora", "mtl_lora"):
        return [_refusal("architecture", kind, "another method", place)]
    is_linear = kind in ("lora", "mtl_lora")
    reasons = _lora_reasons(row, stacks) if is_linear else _bottleneck_reasons(row, stacks)
    if later:
        ours = MTLLoRAConfig if kind == "mtl_lora" else LoRAConfig if is_linear else BottleneckConfig
        known = {field.name for field in dataclasses.fields(ours)} | _IDLE  # type: ignore[arg-type]
        reasons += [
            (key, value, "a field of a later version") for key, value in row.items() if value and key not in known
        ]
    found = [_refusal(*reason, place) for reason in reasons]
    if is_linear:
        return found
    missing = [
        f"A bottleneck adapter's `config` must hold `{key}`; got none at `{place}`. Add it."
        for key in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
        if key not in row
    ]
    return found + (missing or _hook_problems(row, stacks, place))


def _bottleneck_reasons(row: Mapping[str, Any], stacks: Stacks) -> list[tuple[str, Any, str]]:
    return invertible_reasons(row, stacks)


def _lora_reasons(row: Mapping[str, Any], stacks: Stacks) -> list[tuple[str, Any, str]]:
    reasons = []
    mode = row.get("composition_mode", "add")
    if mode not in ("add", "scale"):
        reasons.append(("composition_mode", mode, "another composition"))
    alpha = row.get("alpha", 1)
    if mode == "scale" and stacks.are_fused() and alpha != 1 and not row.get("use_gating"):
        reasons.append(("alpha", alpha, "(IA)³ that scales all of a fused projection"))
    if row.get("use_gating") and row.get("selfattn_lora", True) and stacks.thirds_are_interleaved():
        reasons.append(("use_gating", True, "a gate for each third of a projection in which heads are interleaved"))
    if mode == "scale" and row.get("intermediate_lora", True) and stacks.gates_are_fused():
        reasons.append(("intermediate_lora", True, "(IA)³ on a projection that is fused with a gate"))
    plain = row.get("vera_d") is None and row.get("architecture") == "lora"
    if row.get("selfattn_lora", True) and stacks.are_fused():
        asked = row.get("attn_matrices", ("q", "v"))
        if not plain:
            reasons.append(("selfattn_lora", True, "VeRA or MTL-LoRA on a fused projection"))
        elif row.get("use_dora") and not {"q", "k", "v"} <= set(asked):  # which that library cannot make
            reasons.append(("attn_matrices", list(asked), "DoRA on a part of a fused projection"))
    if not plain and row.get("intermediate_lora") and stacks.gates_are_fused():
        reasons.append(("intermediate_lora", True, "VeRA or MTL-LoRA on a projection that is fused with a gate"))
    if row.get("use_gating") and (row.get("use_dora") or row.get("architecture") == "mtl_lora"):
        reasons.append(("use_gating", True, "a gate of DoRA or MTL-LoRA"))
    if row.get("task_specific_matrix_type") == "linear":  # with which that library makes no adapter
        reasons.append(("task_specific_matrix_type", "linear", "MTL-LoRA with full matrices"))
    return reasons


def _refusal(field: str, value: Any, method: str, place: object) -> str:
    return (
        f"This version reads bottleneck adapters, LoRA and its kin, and (IA)³ of the library `adapters`; got {method} "
        f"(`{field}={value!r}`) at `{place}`. It is not supported yet: keep the library that wrote it, or train one of "
        "those."
    )


def _hooked(row: Mapping[str, Any], stacks: Stacks) -> Iterator[tuple[Stack, Place]]:
    """The bottlenecks asked for that hang on hooks."""
    for stack in stacks:
        places = (place for place in stack.tower.bottlenecks.values() if place.kind in stack.tower.hooks)
        yield from ((stack, place) for place in _wanted(row, places))


def _reads_sum(row: Mapping[str, Any], stacks: Stacks) -> bool:
    """Whether a bottleneck that hangs on hooks reads the sum: without a stream to read, the reference adds none."""
    has_stream = any(stack.tower.hooks[place.kind].stream for stack, place in _hooked(row, stacks))
    return bool(row.get("original_ln_before")) and has_stream


def _applies_norm(row: Mapping[str, Any]) -> bool:
    return bool(row.get("original_ln_before")) and not row.get("is_parallel")


def _hook_problems(row: Mapping[str, Any], stacks: Stacks, place: object) -> list[str]:
    """Where the reference gives a bottleneck that hangs on hooks something else than the stream of its layer."""
    if not (row.get("original_ln_before") or row.get("is_parallel")):
        return []
    found = {}
    hooked = list(_hooked(row, stacks))
    for stack, wanted in hooked:
        hooks = stack.tower.hooks[wanted.kind]
        sites = [site for site in stack.sites if site.kind == wanted.kind]
        norms = {site.pre_norm for site in sites}
        # The reference gives every layer the norm of the last one, whatever it ends.
        if hooks.norm is not None and _applies_norm(row) and {site.branch_norm for site in sites} != {hooks.norm}:
            found[wanted.field] = f"the norm `{hooks.norm}`"
        elif hooks.stream is None and (row.get("is_parallel") or len(hooked) > 1):
            found[wanted.field] = "no stream"
        elif hooks.stream is not None and norms != {hooks.stream}:
            found[wanted.field] = f"what enters `{hooks.stream}`"
    return [
        "An adapter is read if the library `adapters` gave it the stream of its layer, and the norm of its branch or "
        f"none; got `{field}=True`, to which it gave {what}, at `{place}`. Train the adapter anew."
        for field, what in found.items()
    ]
