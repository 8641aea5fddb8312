"""Prompt tuning of PEFT: one table of vectors, which it puts among the embedded token ids."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import StateError
from ..core.site import Sites
from ..methods.ports_input import text_entry
from ..methods.prompt import Prompt, PromptConfig

_TABLE = "prompt_embeddings"
_FIELDS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads"),
    *("num_layers", "modules_to_save", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    *("tokenizer_kwargs", "runtime_config"),
}


def read_prompt(
    record: Mapping[str, Any], stored: dict[str, Tensor], sites: Sites, folder: Path
) -> tuple[PromptConfig, dict[str, Tensor]]:
    """The configuration and the tensors of a folder, for a model with these sites.

    Raises `StateError` for what PEFT computes otherwise, and for tensors that are not its.
    """
    unknown = [key for key, value in record.items() if value and key not in _FIELDS]
    if unknown:
        raise StateError(
            f"This version reads prompts of PEFT by the settings that it knows; got `{unknown[0]}` at `{folder}`. "
            "Train the adapter without, or use PEFT."
        )
    table = stored.pop(_TABLE, None)
    if table is None or table.dim() != 2 or stored:
        raise StateError(
            f"A prompt of PEFT is one table `{_TABLE}`; got {', '.join(f'`{key}`' for key in stored) or 'none'} at "
            f"`{folder}`. Save it again."
        )
    site, entry = text_entry(Prompt.name, sites)
    decodes = any(other.kind == "cross_attention" for other in sites)
    if record.get("task_type") == "SEQ_CLS" and (entry.embedding is not None or decodes):
        raise StateError(
            "A prompt is read where results are those of the text's tokens; PEFT pools the first prompt; got `SEQ_CLS` "
            f"for {sites.model_class} at `{folder}`. Train it anew, or use PEFT."
        )
    # Of an encoder and decoder it saves vectors for both, and uses those of the encoder.
    count = int(record.get("num_virtual_tokens") or len(table))
    config = PromptConfig(prompt_length=count, insert="words")
    return config, {f"{site.key}.{Prompt.name}.vectors": table[:count].contiguous()}
