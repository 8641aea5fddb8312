"""The record of a PEFT folder: which method it is, and what else its settings say that is refused.

adapter_config.json                               the method, its settings, the base model's id
adapter_model.safetensors | adapter_model.bin     tensors, by the names of the model's modules
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import StateError
from .peft_start import FROM_BASE

RECORD, SAFE, TORCH = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

WEIGHTS = {RECORD: (SAFE, TORCH)}
"""The files beside the record: of the pair one is there; the first is preferred."""

OTHER_METHODS = {
    "ADALORA": "AdaLoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "P_TUNING": "P-tuning",
}
"""What else `peft_type` may say, by its usual name."""

OTHER_FIELDS = {
    "use_qalora": "QA-LoRA",
    "layer_replication": "LoRA on layers that it repeats",
    "trainable_token_indices": "trained rows of the embeddings",
    "alora_invocation_tokens": "activated LoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
}
"""Fields that make another method of LoRA."""

_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", *FROM_BASE)
"""Values of `init_lora_weights` that leave the base as it is, or take out of it what can be told again."""

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
    "target_parameters",
    *OTHER_FIELDS,
}


def is_peft(folder: Path) -> bool:
    """Whether a folder is in this format."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "peft_type" in record


def check_method(record: Mapping[str, Any], folder: Path) -> None:
    """Raise `StateError` for a method, or a setting of one, that is not read."""
    method = record.get("peft_type")
    if method not in ("LORA", "VERA", "IA3", "LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING"):
        name = OTHER_METHODS.get(str(method), f"the method `{method}`")
        raise StateError(
            "This version reads LoRA, DoRA, VeRA, (IA)³, trained norms, prefixes and prompts of PEFT; got "
            f"{name} at `{folder}`. "
            "Train one of those, or use PEFT."
        )
    if method in ("PROMPT_TUNING", "PREFIX_TUNING"):
        return
    other = next((name for key, name in OTHER_FIELDS.items() if record.get(key)), None)
    unknown = [key for key, value in record.items() if key not in _KNOWN_FIELDS and value]
    if other is None and unknown:
        other = f"the setting `{unknown[0]}`, which it does not know,"
    if other is not None:
        raise StateError(
            f"This version reads plain LoRA, DoRA, VeRA and (IA)³ of PEFT; got {other} at `{folder}`. Train the "
            "adapter without, or use PEFT."
        )
    start = record.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in _STARTS:
        raise StateError(
            "An adapter is read where its base is the pre-trained one, or can be told from it; got `init_lora_weights` "
            f"{start!r}, which changes the base by numbers that are not kept, at `{folder}`. Save it in PEFT with "
            "`path_initial_model_for_weight_conversion`, which makes plain LoRA of it."
        )
