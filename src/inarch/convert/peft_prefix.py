"""Prefix tuning of PEFT: a table of keys and values for a cache, as the prefix of each attention.

    prompt_embeddings   (P, L · 2 · K): P positions, L layers, keys and values of K features

PEFT hands it to the model as its cache. So the tokens stand P positions further on, while the keys of the prefix are
turned by no rotary embedding. Here the tokens stand where they stand without: a query q at position i + P meets a key k
there as it meets R(-P) k here at position i, for R(i + P) q · k = R(i) q · R(-P) k. So the keys are turned back by P
positions, and compute the same; a model that knows positions in another way than by turning both is refused.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StateError
from ..core.site import Site, Sites
from ..methods.prefix import Prefix, PrefixConfig
from ..prefixes import attention_of, names_in

_EXCEPTIONS = ("use_rope", "no_rope", "is_nope_layer", "sliding_window", "partial_rotary_factor", "rotary_ndims")
"""Names in the forward of an attention that does not turn all its queries and keys in every layer, or looks no further
back than a window."""


def read_prefix(
    record: Mapping[str, Any], stored: Mapping[str, Tensor], model: nn.Module, sites: Sites, folder: object
) -> tuple[PrefixConfig, dict[str, Tensor]]:
    """The configuration and the tensors of a folder, by our keys. Raises `StateError` for what is not the same here."""
    table = stored.get("prompt_embeddings")
    attentions = [site for site in sites if site.kind in ("self_attention", "cross_attention")]
    features = {
        site.projections[role][0].num_rows for site in attentions for role in ("k", "v") if role in site.projections
    }
    shape = () if table is None else tuple(table.shape)
    width = 2 * len(attentions) * next(iter(features), 0)
    if table is None or len(stored) != 1 or len(features) != 1 or len(shape) != 2 or shape[1] != width:
        others = [f"`{key}`" for key in stored if key != "prompt_embeddings"]
        raise StateError(
            "Prefixes of PEFT are one table `prompt_embeddings` for the attentions of one stack, and nothing else; got "
            f"{', '.join([f'a table of shape {shape}', *others])} for {len(attentions)} attentions of "
            f"{sites.model_class}, at `{folder}`. Load it on the base model it was trained on, or use PEFT."
        )
    heads = int(record.get("num_attention_heads") or 1)
    whole = table.view(shape[0], len(attentions), 2, -1)
    found = {}
    for number, site in enumerate(attentions):
        keys = whole[:, number, 0].unflatten(-1, (heads, -1)).transpose(0, 1)[None]  # type: ignore[no-untyped-call]
        turned = _turned_back(keys, model, site, folder)[0].transpose(0, 1).flatten(1)
        found[f"{site.key}.{Prefix.name}.keys"] = turned.contiguous()
        found[f"{site.key}.{Prefix.name}.values"] = whole[:, number, 1].contiguous()
    return PrefixConfig(flat=True, prefix_length=shape[0]), found


def _turned_back(keys: Tensor, model: nn.Module, site: Site, folder: object) -> Tensor:
    """Keys (1, N, P, H) as the model would turn them by -P positions."""
    attention = model.get_submodule(attention_of(model, site).path)
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    tables = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    names = set(names_in(type(attention)))
    if turn is None or len(tables) != 1 or "apply_rotary_pos_emb" not in names or _is_exception(names, attention):
        raise _unknown(site, folder, type(attention).__name__)
    length = keys.shape[-2]
    with torch.no_grad():
        try:
            cos, sin = tables[0](keys.float(), torch.full((1, 1), length))
            turned: Tensor = turn(keys.float(), keys.float(), cos, -sin)[1]
            back: Tensor = turn(turned, turned, cos, sin)[0]
        except (TypeError, RuntimeError, ValueError, IndexError):
            raise _unknown(site, folder, type(attention).__name__) from None
    if not torch.allclose(back, keys.float(), atol=1e-4):
        raise _unknown(site, folder, type(attention).__name__)
    return turned.to(keys.dtype)


def _is_exception(names: set[str], attention: Any) -> bool:
    """Whether some queries and keys of a model are not turned, or see but a window."""
    windows = getattr(getattr(attention, "config", None), "sliding_window", None)
    return any(name in names and (name != "sliding_window" or windows) for name in _EXCEPTIONS)


def _unknown(site: Site, folder: object, attention: str) -> StateError:
    return StateError(
        "Prefixes of PEFT stand at positions, so they are read into models that turn all queries and keys by their "
        f"positions and know these in no other way; got `{attention}` at site `{site.key}`, for `{folder}`. Use PEFT, "
        "or train the prefix anew."
    )
