"""Tiny configurations, made from the default ones by rules on the names of their settings.

Equal settings stay equal across the parts of a configuration (a projection fits the tower it projects to), lists keep
their ratios, lists by layer keep one layer of every kind, and token ids move below the small vocabulary.
"""

import re
from collections.abc import Mapping
from typing import Any

WIDTH = 64
HEADS = 4
VOCABULARY = 320
FIRST_MOVED_TOKEN = 256
MOST_LAYERS = 8

_LAYERS = re.compile(
    r"(num_hidden_layers|n_layers?|depth|layers|num_layers|num_\w*_layers|\w+_num_layers|\w*encoder_layers"
    r"|\w*decoder_layers|\w+_depth|num_blocks|num_decoder_blocks|num_encoder_blocks_per_stage|\w+_num_hidden_layers"
    r"|num_\w+_blocks|num_block|vision_layers|text_layers|\w+_n_layers|n_\w+_layers)"
)
_NOT_LAYERS = re.compile(
    r"num_feat_extract_layers|num_lstm_layers|num_residual_layers|num_encoder_blocks|num_conv_layers|\w*window_layers|num_conv_pos\w*|num_kv_shared_layers|num_query_pool\w*|num_adapter_layers|num_cond_layers|num_expert\w*"
)
_STAGES = re.compile(
    r"\w*depths?|blocks_per_stage|num_blocks|layers|num_block_repeats|stage_num_blocks|encoder_depths|decoder_depths"
)
_STAGE_WIDTHS = re.compile(
    r"\w*hidden_sizes|embed_dim_per_stage|embed_dims|embed_dim|dim_embed|encoder_embed_dims|\w*_dims"
)
_WIDTH = re.compile(
    r"hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|embedding_dim|\w*hidden_size|\w*embed_dim|\w*hidden_dim|out_dim"
    r"|\w*projection_dim|\w*embedding_dim|d_embed|embedding_size|decoder_output_dim|\w*proj_dim|text_dim|vision_dim"
    r"|\w*_width|encoder_dim|decoder_dim|cross_dim|latent_size|\w*embedding_size|hid_dim|output_dim|model_dim|input_dim"
    r"|adapter_(in|out)_dim|adapter_input_size|projector_output_size|d_latents|\w*_hidden_channels|hidden_channels|output_size|width|input_size"
)
_INNER = re.compile(
    r"\w*intermediate_size|\w*ffn_dim|d_ff|n_inner|\w*ffn_hidden_size|\w*feedforward_dim|\w*mlp_dim|hidden_dim_ff"
    r"|inner_hidden_size|\w*intermediate_dim|dim_feedforward|\w*ffn_size|\w*feed_forward_size|\w*feed_forward_dim|\w*mlp_size"
)
_HEADS = re.compile(
    r"(\w+_)?num_attention_heads|n_heads?|num_heads|\w+_attention_heads|attention_heads|\w+_num_heads|num_\w+_attention_heads"
    r"|\w*num_attn_heads|\w+_n_heads|num_qo_heads|linear_num_value_heads|linear_num_heads|num_\w*heads|mamba_n_heads"
)
_KV_HEADS = re.compile(
    r"\w*num_key_value_heads|num_kv_heads|\w*_kv_heads|linear_num_key_heads|multi_query_group_num|\w*key_value_heads"
)
_HEAD_DIM = re.compile(
    r"\w*head_dim|d_kv|head_size|attention_head_size|\w*qk_nope_head_dim|\w*v_head_dim|kv_channels|d_head|\w+_head_size|attention_head_dim|attention_key_dim|attention_value_dim"
)
_EXPERTS = re.compile(
    r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts|ffn_num_experts|\w*n_routed_experts|num_moe_experts"
)
_TOKEN = re.compile(r"\w*token_id|\w*token_index|\w*token_ids|\w*_token|\w*token_idx|\w*_index")
_EXACT: Mapping[str, int] = {
    "n_group": 2, "num_expert_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "num_queries": 10, "index_topk": 16, "index_n_heads": 4, "index_head_dim": 16, "num_latents": 8,
    "max_source_positions": 32, "num_codevectors_per_group": 8, "codevector_dim": 16, "proj_codevector_dim": 16,
    "mamba_d_state": 8, "state_size": 8, "mamba_head_dim": 16, "mamba_d_head": 16, "o_lora_rank": 32,
    "num_denoising": 4, "mm_tokens_per_image": 4, "global_head_dim": 16, "swa_head_dim": 16, "num_zero_experts": 2, "zero_expert_num": 2,
}  # fmt: skip
_MOST: Mapping[str, int] = {
    "num_experts_per_token": 2, "moe_k": 2, "n_groups": 2, "num_experts_per_tok": 2, "moe_topk": 2, "moe_top_k": 2, "top_k_experts": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": 1024, "sliding_window": 64, "max_target_positions": 64, "n_positions": 512,
    "max_2d_position_embeddings": 1024, "num_kv_shared_layers": 0, "bucket_size": 100, "codebook_size": 64,
    "num_embeddings": 64, "max_speech_positions": 256, "max_text_positions": 64, "num_codevector_groups": 2,
    "classifier_proj_size": 32, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "vocab_size_per_layer_input": VOCABULARY, "max_window_layers": 1, "base_channels": 32,
    "latent_channels": 32, "num_filters": 8, "encoder_hash_byte_group_vocab": 100, "hidden_size_global": WIDTH,
}  # fmt: skip


def tiny_overrides(config: Any) -> dict[str, Any]:
    """Arguments for the class of a default configuration that make a tiny one of the same structure."""
    return _Shrink().overrides(config)


def tiny_config(config: Any) -> Any:
    """A tiny configuration of the class and structure of a default one."""
    return type(config)(**tiny_overrides(config))


class _Shrink:
    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}

    def overrides(self, config: Any, *, keep_widths: bool = False) -> dict[str, Any]:
        settings = {k: v for k, v in vars(config).items() if not k.startswith("_") or k == "_out_indices"}
        changed: dict[str, Any] = {}
        usual = vars(type(config)())
        layers = _by_layer(config, settings)
        staged = any(
            isinstance(settings.get(name), (list, tuple)) for name in ("depths", "num_heads", "encoder_depths")
        )
        for name, value in settings.items():
            if _is_config(value):
                # Necks and heads name the widths of their backbone one by one.
                kept = keep_widths or (name == "backbone_config" and bool(_stage_lists(value)))
                changed[name] = type(value)(**self.overrides(value, keep_widths=kept))
            elif name in _derived(settings):
                continue
            elif isinstance(value, bool) or (keep_widths and not _is_count(name)):
                if name in usual and value != usual[name]:
                    changed[name] = value
            elif isinstance(value, int):
                new = self._number(name, value, settings, staged, layers)
                if new != usual.get(name):
                    changed[name] = new
            elif isinstance(value, (list, tuple)):
                new = self._list(name, value, layers)
                if new != value or new != usual.get(name):
                    changed[name] = new
            elif isinstance(value, dict) and "mrope_section" in value:
                changed[name] = value | {"mrope_section": _sections(settings)}
            elif name not in usual or value != usual[name]:
                changed[name] = value
        if "depths" in settings and vars(config).get("_out_features") != usual.get("_out_features"):
            changed["out_features"] = list(config.out_features)
        return changed

    def _number(self, name: str, value: int, settings: Mapping[str, Any], staged: bool, layers: "_Layers") -> int:
        if name == "vocab_size" or (name.endswith("vocab_size") and value > VOCABULARY):
            return min(value, VOCABULARY)
        if _TOKEN.fullmatch(name):
            return self._token(value)
        if name in _EXACT:
            return min(value, _EXACT[name])
        factor = _stage_factor(settings)
        if factor and _WIDTH.fullmatch(name) and value in _stage_widths(settings):
            return value // factor
        if name in _MOST:
            return min(value, _MOST[name])
        if _LAYERS.fullmatch(name) and not _NOT_LAYERS.fullmatch(name):
            return value if value == _stages(settings) else min(value, layers.number)
        if _EXPERTS.fullmatch(name):
            return min(value, 4)
        if _KV_HEADS.fullmatch(name):
            heads = settings.get("num_attention_heads") or settings.get("num_heads") or 0
            return HEADS if value == heads and value >= HEADS else min(value, 2)
        if _HEAD_DIM.fullmatch(name):
            return min(value, WIDTH // HEADS)
        if _HEADS.fullmatch(name) and not staged:
            return min(value, HEADS)
        if _INNER.fullmatch(name):
            return min(value, WIDTH)
        if _WIDTH.fullmatch(name):
            return min(value, 48 if staged else WIDTH)
        if name == "image_size":
            return _image_size(value, settings)
        return value

    def _token(self, value: int) -> int:
        if value < FIRST_MOVED_TOKEN:
            return value
        return self._tokens.setdefault(value, FIRST_MOVED_TOKEN + len(self._tokens))

    def _list(self, name: str, value: Any, layers: "_Layers") -> Any:
        if not value:
            return value
        kind = type(value)
        if _TOKEN.fullmatch(name) and all(type(item) is int for item in value):
            return kind(self._token(item) for item in value)
        if name in layers.lists:
            return kind(value[place] for place in layers.places)
        if all(type(item) is int for item in value):
            if _STAGES.fullmatch(name):
                return kind(min(item, 2) for item in value)
            if _STAGE_WIDTHS.fullmatch(name):
                factor = max(1, value[0] // 16)
                return kind(max(1, item // factor) for item in value)
            if re.search(r"index(es)?|indices|_layers$|_blocks$", name) and layers.total:
                return kind(dict.fromkeys(min(item, layers.number - 1) if item >= 0 else item for item in value))
            if name == "conv_dim":
                return kind(min(item, 32) for item in value)
            if name == "image_size":
                return kind(_image_size(item, {}) for item in value)
        return value


def _stage_lists(config: Any) -> list[str]:
    return [
        name for name, value in vars(config).items() if _STAGES.fullmatch(name) and isinstance(value, (list, tuple))
    ]


def _sections(settings: Mapping[str, Any]) -> list[int]:
    """Rotary frequencies for time, height and width: together half of a head."""
    half = min(settings.get("head_dim") or WIDTH // HEADS, WIDTH // HEADS) // 2
    third = half // 3
    return [half - 2 * third, third, third]


def _is_count(name: str) -> bool:
    return bool(_LAYERS.fullmatch(name) or _STAGES.fullmatch(name)) and not _NOT_LAYERS.fullmatch(name)


def _derived(settings: Mapping[str, Any]) -> set[str]:
    """Settings that a configuration computes from others."""
    found = {"qk_head_dim"}
    if "qk_rope_head_dim" in settings:
        found.add("head_dim")
    if isinstance(settings.get("embed_dim"), int) and isinstance(settings.get("depths"), (list, tuple)):
        found.add("hidden_size")
    return found


def _stage_widths(settings: Mapping[str, Any]) -> Any:
    for name, value in settings.items():
        is_list = isinstance(value, (list, tuple)) and bool(value) and all(type(item) is int for item in value)
        if is_list and _STAGE_WIDTHS.fullmatch(name):
            return value
    return ()


def _stages(settings: Mapping[str, Any]) -> int:
    """How many stages a pyramid of patches has, each with its width and its depth; 0 if it is none."""
    lists = (settings.get("patch_sizes"), settings.get("depths"), _stage_widths(settings))
    lengths = {len(value) if isinstance(value, (list, tuple)) else 0 for value in lists}
    return lengths.pop() if len(lengths) == 1 else 0


def _stage_factor(settings: Mapping[str, Any]) -> int:
    widths = _stage_widths(settings)
    return max(1, widths[0] // 16) if widths else 0


class _Layers:
    """Which layers of a configuration stay: the shortest beginning that has every kind, else one of each kind."""

    def __init__(self, total: int, lists: dict[str, Any], derived: list[Any]) -> None:
        self.total, self.lists = total, lists
        self.number, self.places = min(2, total or 2), list(range(min(2, total or 2)))
        rows = [tuple(map(str, row)) for row in zip(*lists.values(), *derived, strict=True)]
        if not rows:
            return
        kinds = list(dict.fromkeys(rows))
        last = max(rows.index(kind) for kind in kinds) + 1
        if last <= MOST_LAYERS or not lists:
            self.number = max(2, min(last, MOST_LAYERS))
            self.places = list(range(self.number))
        else:
            self.places = sorted(rows.index(kind) for kind in kinds)[:MOST_LAYERS]
            self.number = len(self.places)
            if self.number < 2:
                self.places, self.number = [0, 1], 2


def _by_layer(config: Any, settings: Mapping[str, Any]) -> _Layers:
    names = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers")
    total = next((v for v in (settings.get(name) for name in names) if isinstance(v, int)), 0)
    if total < 3 or total == _stages(settings):
        return _Layers(total, {}, [])
    lists = {
        name: value
        for name, value in settings.items()
        if isinstance(value, (list, tuple))
        and len(value) == total
        and not (_TOKEN.fullmatch(name) or _STAGE_WIDTHS.fullmatch(name) or name == "patch_sizes")
    }
    derived = [
        value
        for name in ("layer_types", "layers_block_type", "layers_num_experts")
        if name not in settings and isinstance(value := getattr(config, name, None), list) and len(value) == total
    ]
    return _Layers(total, lists, derived)


def _image_size(value: int, settings: Mapping[str, Any]) -> int:
    patch = settings.get("patch_size")
    side = 4 * patch if isinstance(patch, int) and patch > 8 else 64
    return min(value, side)


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")
