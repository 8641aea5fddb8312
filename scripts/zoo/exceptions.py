"""Settings of single model types, where the default configuration or the rules of `shrink` are not enough.

A key is a setting of the configuration or of a part of it: `text_config.hidden_size`.
"""

from collections.abc import Mapping
from typing import Any

_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}
_CODEC = {"upsample_groups": 64, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32, "num_filters": 8}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MROPE_HALF = _MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 16, "indexer_compress_ratio": 4
}  # fmt: skip

COMPLETE: Mapping[str, Mapping[str, Any]] = {
    # The default configuration lacks what the model needs, or contradicts itself; a released one has it.
    "autoformer": _SERIES | {"label_length": 2},
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "chameleon": {"vocabulary_map": {"<image>": 260, "<racm3:break>": 261, "<eoss>": 262, "IMGIMGAZ": 263, "IMGIMGBZ": 264}},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "emu3": {"vocabulary_map": {"<image>": 260, "<|extra_200|>": 261} | {f"<|visual token {i:06}|>": i for i in range(64)}},
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense"] + ["sparse"] * 31, "text_config.num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 64
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config.head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {f"text_config.{name}": value for name, value in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "granite4_vision": {"deepstack_layer_map": [[-2, 0], [-1, 1]], "downsample_rate": "4/8"},
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    # Tiny, where the rules by name do not see how settings hang together.
    "bamba": _MAMBA_HEADS,
    "granitemoehybrid": _MAMBA_HEADS,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "bit": {"num_groups": 4, "embedding_size": 16},
    "qwen4_exp": {"text_config.indexer_head_dim": 64},
    "qwen4_exp_text": {"indexer_head_dim": 64},
    "cvt": {"depth": [1, 2, 4], "embed_dim": [16, 48, 96]},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "depth_pro": {
        "patch_size": 64, "image_model_config.image_size": 64, "patch_model_config.image_size": 64,
        "fov_model_config.image_size": 64, "image_model_config.patch_size": 16, "patch_model_config.patch_size": 16,
        "fov_model_config.patch_size": 16,
    },
    "dots3_note": {"audio_config.adapter_in_dim": 64},
    "efficientloftr": {"hidden_size": 256, "out_features": [64, 64, 128, 256]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_spark": {"audio_config.out_hidden_size": 64},
    **{
        f"vibevoice_acoustic_tokenizer{part}": {"num_filters": 2, "hidden_size": 16}
        for part in ("", "_encoder", "_decoder")
    },
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": None},
    "csm": {f"codec_config.{name}": value for name, value in _CODEC.items()},
    "mimi": _CODEC,
    "mimi_decoder": _CODEC,
    "mimi_encoder": _CODEC,
    "pocket_tts_audio_tokenizer": _CODEC,
    "pocket_tts_audio_tokenizer_decoder": _CODEC,
    "pocket_tts_audio_tokenizer_encoder": _CODEC,
    "kyutai_speech_to_text": {f"codec_config.{name}": value for name, value in _CODEC.items()},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm4v": {"text_config.rope_parameters": _MROPE},
    "glm46v": {"text_config.rope_parameters": _MROPE},
    "glmga": {"text_config.rope_parameters": _MROPE},
    "glm4v_moe_text": {"rope_parameters": _MROPE_HALF},
    "glm4v_moe": {"text_config.rope_parameters": _MROPE_HALF},
    "glm_image_text": {"rope_parameters": _MROPE},
    "glm_image": {"text_config.rope_parameters": _MROPE},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "glm_ocr": {"text_config.rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": _MROPE},
    "paddleocr_vl": {"text_config.rope_parameters": _MROPE},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _MROPE | {"mrope_section": [3, 3, 2]}},
    "glm5_next": {"text_config.index_topk": 32},
    "glm5_next_text": {"index_topk": 32},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32},
    "mobilevit": {"hidden_sizes": [16, 32, 48], "num_attention_heads": 4},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [4, 8]},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gradium_phonon_tts": {"flow_head_config.condition_dim": 64},
    "pocket_tts": {"flow_head_config.condition_dim": 64},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "seggpt": {"num_hidden_layers": 4, "merge_index": 1, "intermediate_hidden_state_indices": [2, 3]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
}  # fmt: skip

CLASSES: Mapping[str, str] = {
    # `AutoModel` has a class that does not take the type's configuration; this one does.
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
