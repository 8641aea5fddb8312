"""The names of the configuration classes: each makes the preset of that name, with changes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..core.errors import ConfigError
from ..core.grammar import parse, write
from ..methods import AdapterConfig as OurConfig
from ..methods import ConfigLike, presets, read_config
from .refused import NAMES, not_here, refused_field

PRESETS = {
    "BnConfig": "bottleneck",
    "SeqBnConfig": "seq_bn",
    "SeqBnInvConfig": "seq_bn_inv",
    "DoubleSeqBnConfig": "double_seq_bn",
    "DoubleSeqBnInvConfig": "double_seq_bn_inv",
    "ParBnConfig": "par_bn",
    "AdapterPlusConfig": "adapter_plus",
    "CompacterConfig": "compacter",
    "CompacterPlusPlusConfig": "compacter++",
    "LoRAConfig": "lora",
    "DoRAConfig": "dora",
    "VeraConfig": "vera[r=8]",
    "IA3Config": "ia3",
    "MTLLoRAConfig": "mtl_lora",
    "PrefixTuningConfig": "prefix_tuning",
    "PromptTuningConfig": "prompt_tuning",
    "LoReftConfig": "loreft",
    "NoReftConfig": "noreft",
    "DiReftConfig": "direft",
    "StaticAdapterFusionConfig": "static_fusion",
    "DynamicAdapterFusionConfig": "dynamic_fusion",
}
"""By the name of the class in `adapters`, the preset."""

UNIONS = {
    "MAMConfig": ("mam", {"prefix_tuning": "prefix_tuning[bottleneck_size=800]", "adapter": "par_bn"}),
    "UniPELTConfig": (
        "unipelt",
        {
            "prefix_tuning": "prefix_tuning[prefix_length=10,use_gating=True]",
            "adapter": "seq_bn[use_gating=True]",
            "lora": "lora[alpha=2,use_gating=True]",
        },
    ),
}
"""By the name of the class, the preset, and the parts that may be given instead."""

RENAMED: Mapping[str, Mapping[str, str]] = {"VeraConfig": {"vera_d": "d_initial"}}
"""Fields that have another name here."""

_ONE_SCALE = "(IA)³ is one vector for each place, started at one."
_PAPER = "It is as in the paper, and not a choice."
_SUM = ("add", "Use `IA3Config` for scales.")
_DTYPE = (None, "Add it, then `model.adapter_to(name, dtype=...)`.")
_DORA = (False, "Use `DoRAConfig`.")
_NO_GATE = (False, "Use a gate with `LoRAConfig`.")
_VERA = (None, "Use `VeraConfig`.")
_LOW_RANK = {"composition_mode": _SUM, "dtype": _DTYPE, "use_dora": _DORA, "vera_d": _VERA, "vera_b": _VERA}
_REFT = {"dtype": _DTYPE, "output_reft": (True, "Interventions are behind a layer, with `layers` to choose which.")}
_FUSION = {
    "query_before_ln": (False, _PAPER),
    "residual_before": (False, _PAPER),
    "temperature": (False, _PAPER),
    "value_before_softmax": (True, _PAPER),
    "dropout_prob": (None, "Use `dropout`."),
}
FIXED: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "LoRAConfig": _LOW_RANK,
    "DoRAConfig": {
        **_LOW_RANK,
        "use_dora": (True, "Use `LoRAConfig`."),
        "init_weights": ("lora", "Use `LoRAConfig` for another start."),
        "use_gating": _NO_GATE,
    },
    "VeraConfig": {
        **{key: value for key, value in _LOW_RANK.items() if key != "vera_d"},
        "vera_b": (0.0, _PAPER),
        "alpha": (8, "VeRA has no scale but its vectors: use `d_initial`."),
        "init_weights": ("vera", _PAPER),
        "use_gating": _NO_GATE,
    },
    "MTLLoRAConfig": {**_LOW_RANK, "use_gating": _NO_GATE},
    "IA3Config": {
        **_LOW_RANK,
        "composition_mode": ("scale", "Use `LoRAConfig` for sums."),
        "r": (1, _ONE_SCALE),
        "dropout": (0.0, _ONE_SCALE),
        "init_weights": ("ia3", _ONE_SCALE),
        "init_weights_seed": (None, _ONE_SCALE),
    },
    "LoReftConfig": _REFT,
    "NoReftConfig": _REFT,
    "DiReftConfig": _REFT,
    "PromptTuningConfig": {
        "prompt_init_text": (None, 'Use `prompt_init="from_tokens", prompt_init_ids=tokenizer(text)["input_ids"]`.'),
        "combine": ("prefix", "Vectors stand in front of all tokens."),
    },
    "StaticAdapterFusionConfig": {**_FUSION, "value_initialized": (False, _PAPER)},
    "DynamicAdapterFusionConfig": {**_FUSION, "value_initialized": (True, _PAPER)},
}
"""By class, fields that have one value here, and what to write for another."""
_ARCHITECTURES = {
    "prefix_tuning": "PrefixTuningConfig",
    "prompt_tuning": "PromptTuningConfig",
    "mtl_lora": "MTLLoRAConfig",
    None: "BnConfig",
}


def _made(name: str, /, **changes: Any) -> OurConfig:
    (preset,) = parse(PRESETS[name])
    chosen = dict(preset.values)
    for field, value in changes.items():
        fixed = FIXED.get(name, {}).get(field)
        if field == "architecture" or (fixed is not None and _same(value, fixed[0])):
            continue
        if fixed is not None:
            raise refused_field(name, field, value, fixed[1])
        chosen[RENAMED.get(name, {}).get(field, field)] = _value(field, value)
    # What asks for an invertible part is no field of a bottleneck without one.
    without = chosen.get("inv_adapter", "") is None and not hasattr(presets().get(preset.name), "inv_adapter")
    if without:
        chosen = {field: value for field, value in chosen.items() if not field.startswith("inv_adapter")}
    return read_config(write(preset.name, chosen))


def _same(given: Any, fixed: Any) -> bool:
    return given is fixed or (given == fixed and isinstance(given, bool) == isinstance(fixed, bool))


def _value(field: str, value: Any) -> Any:
    """The flag of a penalty is its factor here."""
    return {True: 0.01, False: 0.0}[value] if field == "regularization" and isinstance(value, bool) else value


def _union(name: str, /, **parts: ConfigLike | None) -> OurConfig:
    preset, known = UNIONS[name]
    strange = [part for part in parts if part not in known]
    if strange:
        raise ConfigError(f"`{name}` has the parts {', '.join(known)}; got `{strange[0]}`. Change one of the parts.")
    if not any(part is not None for part in parts.values()):
        return read_config(preset)
    return ConfigUnion(*(parts.get(part) or default for part, default in known.items()))


CONFIGS: dict[str, Callable[..., OurConfig]] = {
    **{name: partial(_made, name) for name in PRESETS},
    **{name: partial(_union, name) for name in UNIONS},
}


def ConfigUnion(*configs: ConfigLike) -> OurConfig:
    """Several methods as one adapter."""
    return OurConfig(tuple(part for config in configs for part in as_config(config).parts))


def as_config(config: Any) -> OurConfig:
    """A configuration as it may be written there: a preset, an object, a file, or the fields of one class."""
    if not isinstance(config, Mapping) or "methods" in config:
        return read_config(config)
    values = dict(config)
    kind = values.pop("architecture", None)
    if kind == "union":
        return ConfigUnion(*values.get("configs", ()))
    if kind == "lora":
        flags = {"DoRAConfig": values.get("use_dora"), "IA3Config": values.get("composition_mode") == "scale"}
        name = next((name for name, flag in flags.items() if flag), "LoRAConfig")
        if values.get("vera_d") is not None:
            name = "VeraConfig"
    elif kind == "reft" and values.get("orthogonality"):
        name = "LoReftConfig"
    elif kind in _ARCHITECTURES:
        name = _ARCHITECTURES[kind]
    else:
        raise ConfigError(
            f"The fields of a configuration say what it is; got the architecture {kind!r} (that of `NoReftConfig` and "
            "`DiReftConfig` is the same). Use the class of the method."
        )
    return _made(name, **values)


class AdapterConfig:
    """`inarch.methods.read_config(config)`"""

    @staticmethod
    def load(config: Any, download_kwargs: Any = None, **changes: Any) -> OurConfig:
        """A configuration from whatever describes one, with changes."""
        if download_kwargs is not None:
            raise ConfigError(
                f"A configuration is text, a mapping or a file here; got `download_kwargs={download_kwargs!r}`. Fetch "
                "the file first."
            )
        found = as_config(config)
        return found.replace(**changes) if changes else found

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> OurConfig:
        """A configuration from its fields."""
        return as_config(config)


DEFAULT_ADAPTER_CONFIG = "seq_bn"
DEFAULT_ADAPTERFUSION_CONFIG = "dynamic"
FUSIONS = {"static": "static_fusion", "dynamic": "dynamic_fusion"}
ADAPTERFUSION_CONFIG_MAP = {name: read_config(preset) for name, preset in FUSIONS.items()}
"""By the name that they have there, the configurations of fusion layers."""
ADAPTER_CONFIG_MAP = {
    name: read_config(name)
    for name in (
        *("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "seq_bn_inv", "double_seq_bn_inv", "compacter"),
        *("compacter++", "prefix_tuning", "prefix_tuning_flat", "prompt_tuning", "lora", "dora", "vera", "ia3"),
        *("mtl_lora", "loreft", "noreft", "direft", "mam", "unipelt"),
    )
}
"""The presets by name."""

globals().update(CONFIGS)


def __getattr__(name: str) -> Any:
    if name in NAMES:
        raise not_here(name, NAMES[name])
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
