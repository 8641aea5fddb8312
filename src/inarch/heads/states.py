"""What a base model gives to heads: a vector for each token of each sequence, and one for each sequence or image.

(B batch, T tokens, D width.)
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SetupError

_TEXT = ("input_ids", "inputs_embeds")
_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True, slots=True)
class States:
    """The last states of a base model on one batch, or on some rows of it."""

    tokens: Tensor
    """(B, T, D); of feature maps, the places one after the other."""
    mask: Tensor | None
    """(B, T), true where a token is no padding."""
    ids: Tensor | None
    """(B, T), where the tokens have numbers."""
    pooled: Tensor | None
    """(B, D), what the model's own pooler gives."""
    eos: int | None
    natural: str
    """The pooling that fits the model."""
    embeddings: Tensor | None = None
    """(V, E), those of the model's input tokens."""
    scale: float = 1.0
    """What the states are multiplied by before these embeddings."""
    part: tuple[Tensor | slice, int] | None = None
    """Which rows these are, of so many; none for all."""

    def rows(self, which: Tensor | slice) -> "States":
        """The states of some rows."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[which]

        return replace(
            self,
            tokens=self.tokens[which],
            mask=pick(self.mask),
            ids=pick(self.ids),
            pooled=pick(self.pooled),
            part=(which, len(self.tokens)),
        )

    def in_whole_batch(self, step: nn.Module, hidden: Tensor) -> Tensor:
        """What a step makes of hidden states of these rows, (B, T, E), where hooks on it count those of the batch."""
        if self.part is None or not step._forward_pre_hooks:
            result: Tensor = step(hidden)
            return result
        which, count = self.part
        whole = hidden.new_zeros((count, *hidden.shape[1:]))
        whole[which] = hidden
        result = step(whole)
        return result[which]

    def pool(self, how: str) -> Tensor:
        """(B, D): one vector for each sequence."""
        how = self.natural if how == "auto" else how
        if how == "pooler":
            if self.pooled is None:
                raise SetupError(
                    "A head with `pooling=pooler` stands on a model that pools; got one that gives none. "
                    "Use `first`, `last` or `mean`."
                )
            return self.pooled
        if how == "mean":
            if self.mask is None:
                return self.tokens.mean(dim=1)
            weights = self.mask.to(self.tokens.dtype).unsqueeze(-1)
            return (self.tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)
        places = self._first() if how == "first" else self._last()
        if how == "eos" and self.ids is not None and self.eos is not None:
            is_eos = self.ids == self.eos
            places = torch.where(is_eos.any(dim=1), _last_true(is_eos), places)
        return self.tokens.take_along_dim(places.view(-1, 1, 1), dim=1).squeeze(1)

    def _first(self) -> Tensor:
        if self.mask is None:
            return torch.zeros(len(self.tokens), dtype=torch.long, device=self.tokens.device)
        return self.mask.int().argmax(dim=1)

    def _last(self) -> Tensor:
        if self.mask is None:
            return torch.full((len(self.tokens),), self.tokens.shape[1] - 1, device=self.tokens.device)
        return _last_true(self.mask)


def _last_true(flags: Tensor) -> Tensor:
    """(B,), the last place of each row that is true; the last of all where none is."""
    return flags.shape[1] - 1 - flags.flip(1).int().argmax(dim=1)


def decodes(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder. (The encoder of one may have the configuration of both.)"""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    below = getattr(model, "base_model", None)
    taken = inspect.signature(type(below if isinstance(below, nn.Module) else model).forward).parameters
    return any(name in taken for name in _DECODER)


def natural_pooling(model: nn.Module, *, causal: bool) -> str:
    """Which vector of a sequence, or an image, a task is learned from.

    Where an encoder and a decoder read the sequence, it is the state at the last end-of-sequence token; in a decoder,
    the last token's, which alone has seen all; in an encoder with a token for the purpose, that token's; otherwise,
    what the model's own pooler gives, or the mean.
    """
    config = getattr(model, "config", None)
    if decodes(model):
        return "eos"
    if causal:
        return "last"
    if getattr(config, "model_type", "") == "beit" and getattr(config, "use_mean_pooling", False):
        return "pooler"  # its class token is not trained for it
    if any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in model.named_parameters()):
        return "first"
    if getattr(model, "main_input_name", "") == "input_ids":
        return "mean" if getattr(config, "classifier_pooling", None) == "mean" else "first"
    return "mean"


_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")


def read_states(output: Any, inputs: Mapping[str, Any], model: nn.Module, *, width: int, natural: str) -> States:
    """The states in what a base model gave for some inputs.

    Raises `SetupError` where they are not to be had.
    """
    config = getattr(model, "config", None)
    tokens, pooled = _last_states(output), _get(output, "pooler_output")
    if tokens is None:
        raise SetupError(
            f"A head reads the last states of its model; got {type(output).__name__} without any from "
            f"{type(model).__name__}. Give the head to the part of it that has them."
        )
    if tokens.dim() == 2:
        pooled, tokens = tokens, tokens.unsqueeze(1)
    elif tokens.dim() == 4:
        tokens = tokens.flatten(2).mT if tokens.shape[1] == width else tokens.flatten(1, 2)
    if tokens.shape[-1] != width:
        raise SetupError(
            f"The states of a model are as wide as its heads expect; got {tokens.shape[-1]} at {type(model).__name__} "
            f"for heads of {width}. Give the heads to the part of it with states of that width."
        )
    ids, mask = _named(inputs, "input_ids"), _named(inputs, "attention_mask")
    given = next((inputs[name] for name in _TEXT if inputs.get(name) is not None), None)
    own = next((inputs[name] for name in _DECODER if decodes(model) and inputs.get(name) is not None), None)
    if own is not None:
        ids, mask, given = _named(inputs, "decoder_input_ids"), _named(inputs, "decoder_attention_mask"), own
    count = tokens.shape[1]
    if given is not None and given.shape[1] != count:
        raise SetupError(
            f"A head reads a state for each token; got {count} states for {given.shape[1]} tokens from "
            f"{type(model).__name__}. Use a model that keeps every token, and adds none."
        )
    return States(
        tokens=tokens,
        mask=_flags(mask, ids, tokens, config, output_mask=_feature_mask(model, mask, tokens, given)),
        ids=ids if ids is not None and ids.shape[1] == count else None,
        pooled=pooled if isinstance(pooled, Tensor) and pooled.dim() == 2 else None,
        eos=_first_int(getattr(config, "eos_token_id", None)),
        natural=natural if natural != "mean" or not isinstance(pooled, Tensor) or given is not None else "pooler",
    )


def _flags(
    mask: Tensor | None, ids: Tensor | None, tokens: Tensor, config: Any, *, output_mask: Tensor | None
) -> Tensor | None:
    """(B, T), true for every token that is no padding; none where that is not known."""
    count = tokens.shape[1]
    if output_mask is not None:
        return output_mask.bool()
    if mask is not None and mask.dim() == 2 and mask.shape[1] >= count:
        return mask[:, mask.shape[1] - count :].bool()
    pad = getattr(config, "pad_token_id", None)
    if mask is None and ids is not None and pad is not None and ids.shape[1] == count:
        flags = ids != pad
        return torch.where(flags.any(dim=1, keepdim=True), flags, torch.ones_like(flags))
    return None


def _feature_mask(model: nn.Module, mask: Tensor | None, tokens: Tensor, given: Tensor | None) -> Tensor | None:
    """The mask of a sound's frames, from that of its samples."""
    shrink = getattr(model, "_get_feature_vector_attention_mask", None)
    if mask is None or given is not None or shrink is None:
        return None
    found: Tensor = shrink(tokens.shape[1], mask)
    return found


def _last_states(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    found = _get(output, "last_hidden_state")
    if found is None:
        layers = _get(output, "decoder_hidden_states") or _get(output, "hidden_states")
        found = layers[-1] if layers else None
    if found is None and isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        found = output[0]
    return found if isinstance(found, Tensor) and found.dim() in (2, 3, 4) else None


def _get(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _named(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    value = inputs.get(name)
    return value if isinstance(value, Tensor) else None


def _first_int(value: Any) -> int | None:
    if isinstance(value, list | tuple):
        return _first_int(value[0]) if value else None
    return value if isinstance(value, int) else None
