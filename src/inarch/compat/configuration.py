"""The names of the configuration classes: each makes the preset of that name, with changes."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..core.grammar import write
from ..methods import AdapterConfig, ConfigLike, read_config

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
    "VeraConfig": "vera",
    "IA3Config": "ia3",
    "MTLLoRAConfig": "mtl_lora",
    "PrefixTuningConfig": "prefix_tuning",
    "PromptTuningConfig": "prompt_tuning",
    "LoReftConfig": "loreft",
    "NoReftConfig": "noreft",
    "DiReftConfig": "direft",
    "MAMConfig": "mam",
    "UniPELTConfig": "unipelt",
    "StaticAdapterFusionConfig": "static_fusion",
    "DynamicAdapterFusionConfig": "dynamic_fusion",
}
"""By the name of the class in `adapters`, the preset."""


def _made(preset: str, /, **changes: Any) -> AdapterConfig:
    return read_config(write(preset, changes))


CONFIGS: dict[str, Callable[..., AdapterConfig]] = {name: partial(_made, preset) for name, preset in PRESETS.items()}


def ConfigUnion(*configs: ConfigLike) -> AdapterConfig:
    """Several methods as one adapter."""
    return AdapterConfig(tuple(part for config in configs for part in read_config(config).parts))
