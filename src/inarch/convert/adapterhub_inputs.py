"""What the library `adapters` has at the input of a model, as ours: invertible adapters and prompts."""

import re
from collections.abc import Mapping
from typing import Any

from ..core.config import Config
from ..core.site import Site
from ..methods.invertible import Invertible, InvertibleConfig
from ..methods.prompt import Prompt, PromptConfig
from ..methods.visual_prompt import VisualPrompt, VisualPromptConfig
from .adapterhub_sites import Stacks
from .consent import consent

_INVERTIBLE = re.compile(r"(?:\w+\.)*invertible(?:_lang)?_adapters\.(.+)\.([FG])\.([02])\.(weight|bias)")
_PROMPT = re.compile(r"(?:\w+\.)*prompt_tunings\.(.+)\.prompt_embedding\.weight")
_PROMPT_FIELDS = {
    *("architecture", "prompt_length", "prompt_init", "prompt_init_text", "random_uniform_scale", "combine"),
    "init_weights_seed",
}
_STEPS = {"0": "down", "2": "up"}
_SEES_PADDING = ("deberta", "deberta-v2")


def updated_inputs(row: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an invertible part as version 1.3.0 has them; older folders keep them in a mapping."""
    given = row.get("invertible_adapter")
    if isinstance(given, Mapping) and not row.get("inv_adapter"):
        coupling, factor = given.get("block_type"), given.get("reduction_factor")
        return {**row, "inv_adapter": coupling, "inv_adapter_reduction_factor": factor}
    return dict(row)


def invertible_part(row: Mapping[str, Any]) -> list[Config]:
    """The invertible part of a bottleneck's settings, which has the activation of the bottleneck."""
    row = updated_inputs(row)
    if not row.get("inv_adapter"):
        return []
    values = {key: row[key] for key in ("inv_adapter", "inv_adapter_reduction_factor")}
    return [InvertibleConfig(**values, non_linearity=str(row["non_linearity"]).lower())]


def invertible_reasons(row: Mapping[str, Any], stacks: Stacks) -> list[tuple[str, Any, str]]:
    """Why an invertible part cannot be read exactly: field, value and what it is."""
    coupling = updated_inputs(row).get("inv_adapter")
    if not coupling:
        return []
    if coupling != "nice":
        return [("inv_adapter", coupling, "a coupling that the library itself cannot run")]
    if not first_sites(stacks)[0].stack.startswith("text"):
        return [("inv_adapter", coupling, "an invertible adapter that it applies to what an encoder of sound gives")]
    if any(stack.tower.hooks for stack in stacks):
        return [("inv_adapter", coupling, "an invertible adapter on a hook, before the model scales its embeddings")]
    return []


def prompt_part(row: Mapping[str, Any], stacks: Stacks) -> Config:
    """Prompts behind the embedding: of an image, what VPT calls shallow ones."""
    length = row.get("prompt_length", PromptConfig().prompt_length)
    if _sees_images(stacks):
        return VisualPromptConfig(prompt_length=length, dropout=0.0)
    return PromptConfig(prompt_length=length, insert="embedding")


def prompt_reasons(row: Mapping[str, Any], stacks: Stacks, *, later: bool) -> list[tuple[str, Any, str]]:
    """Why prompts cannot be read exactly: field, value and what it is."""
    combine = row.get("combine", "prefix")
    found: list[tuple[str, Any, str]] = []
    if combine != "prefix" and not _sees_images(stacks):  # among tokens of an image they have no order
        found.append(("combine", combine, "prompts behind the first token"))
    unknown = [(key, value) for key, value in row.items() if value and key not in _PROMPT_FIELDS]
    return found + [(key, value, "a field of a later version") for key, value in unknown if later]


def check_prompts(model_type: str, folder: object, other_base: str) -> str:
    """How the reference's prompts may have been trained otherwise than they act here, as a sentence; empty if not.

    Its DeBERTa extends the mask of pairs of tokens by rows of ones, so that prompts attend to padding, and what an
    adapter computes depends on how far its batch was padded. Raises `StateError` unless that is allowed.
    """
    if model_type not in _SEES_PADDING:
        return ""
    difference = (
        "prompts must have been trained where they do not attend to padding; got some of the library `adapters`, which "
        f"hides none of it from prompts on `{model_type}`, at `{folder}`"
    )
    return consent(
        difference, "Train the adapter anew", folder, other_base, where="it was trained on batches without padding"
    )


def _sees_images(stacks: Stacks) -> bool:
    return first_sites(stacks)[0].stack.startswith("image")


def first_sites(stacks: Stacks) -> list[Site]:
    """The first site of every stack."""
    return [stack.sites[0] for stack in stacks if stack.sites]


def input_key(key: str, name: str, stacks: Stacks) -> str | None:
    """Our key of a tensor at the input; None for any other tensor."""
    site = first_sites(stacks)[0].key
    found = _INVERTIBLE.fullmatch(key)
    if found is not None and found[1] == name:
        return f"{site}.{Invertible.name}.{found[2]}.{_STEPS[found[3]]}.{found[4]}"
    found = _PROMPT.fullmatch(key)
    if found is not None and found[1] == name:
        return f"{site}.{(VisualPrompt if _sees_images(stacks) else Prompt).name}.vectors"
    return None
