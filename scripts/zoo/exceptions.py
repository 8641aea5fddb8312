"""Settings of single model types, where the default configuration or the rules of `shrink` are not enough.

A key is a setting of the configuration or of a part of it: `text_config.hidden_size`.
"""

from collections.abc import Mapping
from typing import Any


def _chameleon_token(code: int) -> str:
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}
_PLACEHOLDERS = {"image_token_id": 260, "video_token_id": 261}
_CODEC = {"upsample_groups": 64, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32, "num_filters": 8}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_HALF_ROTATED = _MROPE | {"mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
_MROPE_HALF = _MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SWIN = {"image_size": 64, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4], "embed_dim": 32}
_SIZES = [[16, 16], [8, 8], [4, 4]]
_HIERA = {
    "hidden_size": 16,
    "image_size": [64, 64],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "blocks_per_stage": [1, 2, 2, 1],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "num_attention_heads": 1,
    "window_size_per_stage": [8, 4, 4, 2],
    "global_attention_blocks": [4],
}
_SAM3 = {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
_PE = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [56, 56], "ref_feat_shape": [4, 4]}
_GEMMA4_TOWERS = {"vision_config": {"model_type": "gemma4_vision"}, "audio_config": {"model_type": "gemma4_audio"}}
_FOUR_AXES = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 16, "indexer_compress_ratio": 4
}  # fmt: skip

COMPLETE: Mapping[str, Mapping[str, Any]] = {
    # The default configuration lacks what the model needs, or contradicts itself; a released one has it.
    "autoformer": _SERIES | {"label_length": 2},
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "chameleon": {"vocabulary_map": {"<image>": 260} | {_chameleon_token(code): code for code in range(64)}},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "emu3": {
        "vocabulary_map": {"<image>": 260, "<|extra_200|>": 261} | {f"<|visual token {i:06}|>": i for i in range(64)}
    },
    "perception_lm": {
        "vision_config.architecture": "vit_pe_core_large_patch14_336",
        "vision_config.model_args": {"embed_dim": 1024, "depth": 23, "global_pool": "", "img_size": [448, 448]},
    },
    # Released ones rotate half of a head, which the sections add up to.
    "glm4v": {"text_config.rope_parameters": _HALF_ROTATED},
    "glm46v": {"text_config.rope_parameters": _HALF_ROTATED},
    "step3p7": {"text_config.sliding_window": 64},
    # Released ones have towers.
    "gemma4": _GEMMA4_TOWERS,
    "embedding_gemma2": _GEMMA4_TOWERS,
    "gemma4_unified": {
        "vision_config": {"model_type": "gemma4_unified_vision"},
        "audio_config": {"model_type": "gemma4_unified_audio"},
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense"] + ["sparse"] * 31, "text_config.num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 64,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 300},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 300},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "blip-2": {"image_token_id": 260},
    "instructblip": {"image_token_id": 260},
    "instructblipvideo": {"video_token_id": 260},
    "voxtral": {"audio_token_id": 24},
    "minicpm_ocr": _PLACEHOLDERS,
    "minicpmv4_6": _PLACEHOLDERS,
    "minicpmv4_7": _PLACEHOLDERS,
    "qwen2_audio": {"audio_token_index": 300},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {
        "text_config.head_dim": 128,
        "text_config.rope_parameters": _FOUR_AXES | {"mrope_section": [16] * 4},
    },
    "hunyuan_vl_text": {"head_dim": 128, "rope_parameters": _FOUR_AXES | {"mrope_section": [16] * 4}},
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
    "muse_spark_audio": {"num_hidden_layers": 4, "depths": [1, 2, 1, 1], "out_hidden_size": 64},
    "align": {"projection_dim": 640, "vision_config.hidden_dim": 640},
    "efficientnet": {"hidden_dim": 2560},
    "kimi_linear": {"num_experts_per_token": 2},
    "bailing_hybrid": {"num_experts_per_token": 2, "num_experts": 8},
    "rt_detr": {"encoder_hidden_dim": 256, "d_model": 256, "decoder_in_channels": [256] * 3},
    "rt_detr_v2": {"encoder_hidden_dim": 256, "d_model": 256, "decoder_in_channels": [256] * 3},
    "pp_doclayout_v3": {"encoder_hidden_dim": 256, "d_model": 256, "decoder_in_channels": [256] * 3},
    "pp_doclayout_v4": {"encoder_hidden_dim": 256, "d_model": 256, "decoder_in_channels": [256] * 3},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2], "num_key_value_attention_heads": 2},
    "sam2": {f"vision_config.backbone_config.{name}": value for name, value in _HIERA.items()}
    | {"vision_config.backbone_channel_list": [128, 64, 32, 16], "vision_config.backbone_feature_sizes": _SIZES},
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": {f"backbone_config.{name}": value for name, value in _HIERA.items()}
    | {"backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": _SIZES},
    "d_fine": {"encoder_hidden_dim": 256, "decoder_in_channels": [256] * 3},
    "deimv2": {"encoder_hidden_dim": 256, "decoder_in_channels": [256] * 3},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10, "hidden_size": 64, "input_size": 224},
    "lilt": {"hidden_size": 96, "num_attention_heads": 4},
    "donut-swin": _SWIN,
    "swin": _SWIN,
    "sam": {"vision_config.output_channels": 64, "vision_config.num_pos_feats": 32},
    "sam_hq": {"mask_decoder_config.vit_dim": 64, "vision_config.output_channels": 64, "vision_config.num_pos_feats": 32},
    "sam3": {f"vision_config.{name}": value for name, value in _SAM3.items()},
    "sam3_vision_model": _SAM3,
    "sam3_tracker": {f"vision_config.{name}": value for name, value in _SAM3.items()},
    "depth_pro": {
        "patch_size": 64, "image_model_config.image_size": 64, "patch_model_config.image_size": 64,
        "fov_model_config.image_size": 64, "image_model_config.patch_size": 16, "patch_model_config.patch_size": 16,
        "fov_model_config.patch_size": 16, "intermediate_hook_ids": [1, 0],
    },
    **{
        name: {"image_grid_pinpoints": [[112, 56]], "vision_config.image_size": 56}
        for name in ("llava_next", "llava_next_video", "llava_onevision")
    },
    "phi4_multimodal": {"audio_config.ext_pw_out_channel": 64, "audio_config.depthwise_separable_out_channel": 64},
    "vjepa2": {"frames_per_clip": 4, "crop_size": 64},
    "maskformer": {
        f"backbone_config.{name}": value
        for name, value in {"image_size": 64, "window_size": 4, "embed_dim": 32, "depths": [2] * 4, "num_heads": [2, 2, 4, 4]}.items()
    },
    "tvp": {"num_frames": 2, "visual_prompter_apply": "replace"},
    "clap": {"audio_config.hidden_size": 384},
    "clvp": {
        "text_config.vocab_size": 320, "decoder_config.vocab_size": 320, "speech_config.vocab_size": 320, "text_config.num_attention_heads": 2,
        "speech_config.num_attention_heads": 2, "decoder_config.num_attention_heads": 2,
    },
    "pe_video": {"video_config.vision_config.model_args": _PE},
    "pe_video_encoder": {"vision_config.model_args": _PE},
    "pe_audio_video": {"audio_video_config.video_config.vision_config.model_args": _PE},
    "pe_audio_video_encoder": {"video_config.vision_config.model_args": _PE},
    "perception_lm": {"vision_config.model_args": _PE | {"global_pool": ""}},
    "edgetam": {
        "vision_config.fpn_hidden_size": 256, "prompt_encoder_config.hidden_size": 256,
        "mask_decoder_config.hidden_size": 256, "vision_config.backbone_channel_list": [1024, 512, 256, 64],
        "vision_config.backbone_feature_sizes": _SIZES,
    },
    "mllama": {"vision_config.vision_output_dim": 128, "vision_config.intermediate_layers_indices": [0]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "unlimited_ocr": {
        "vision_config.sam_config.output_channels": 64, "vision_config.sam_config.downsample_channels": [64, 64],
        "vision_config.sam_config.num_pos_feats": 32, "vision_config.encoder_config.hidden_size": 64,
    },
    "edgetam_vision_model": {"backbone_channel_list": [1024, 512, 256, 64], "backbone_feature_sizes": _SIZES},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"], "vision_config.sam_config.output_channels": 64,
        "vision_config.sam_config.downsample_channels": [64, 64], "vision_config.sam_config.num_pos_feats": 32,
        "vision_config.encoder_config.hidden_size": 64,
    },
    "llama4": {
        "vision_config.vision_output_dim": 64, "vision_config.projector_output_dim": 64,
        "vision_config.projector_input_dim": 64, "vision_config.intermediate_size": 256,
    },
    "muse_glimmer": {"projector_hidden_size": 64, "out_hidden_size": 256},
    "vipllava": {"vision_feature_layers": [-2, -1], "projector_hidden_size": 64},
    "granite4_vision": {
        "image_grid_pinpoints": [[256, 128]], "vision_config.image_size": 128, "vision_config.patch_size": 16,
    },
    "efficientloftr": {
        "hidden_size": 256, "out_features": [64, 64, 128, 256], "num_attention_heads": 8, "num_key_value_heads": 8
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "florence2": {"vision_config.projection_dim": 64},
    "longcat_flash": {"head_dim": 8},
    "neucodec": {"quantization_dim": 128},
    "xcodec2": {"quantization_dim": 128},
    # Of equal widths its decoder lacks a projection that it calls.
    "omdet-turbo": {
        "vision_features_channels": [32] * 3, "text_projection_in_dim": 64, "text_projection_out_dim": 64,
        "d_model": 32, "encoder_hidden_dim": 32, "decoder_hidden_dim": 32,
    },
    "fast_vlm": {"vision_config.hidden_size": 3072},
    # The vocabularies of images and sounds lie at the end of the text's, and the tower of timm is as wide as it is.
    "gemma4_unified": {"vision_config.output_proj_dims": 64},
    "gemma3n": {"vision_config.hidden_size": 2048, "vision_config.vocab_offset": 64, "audio_config.vocab_offset": 192},
    "cvt": {"depth": [1, 2, 4], "embed_dim": [16, 48, 96]},
    "dots3_note": {"audio_config.adapter_in_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_spark": {"out_hidden_size": 256, "audio_config.out_hidden_size": 64, "audio_config.num_hidden_layers": 4, "audio_config.depths": [1, 2, 1, 1]},
    **{
        f"vibevoice_acoustic_tokenizer{part}": {"num_filters": 2, "hidden_size": 16}
        for part in ("", "_encoder", "_decoder")
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba": {
        "attention_hidden_size": 128, "attention_head_dim": 32, "num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1,
        "layers_block_type": None,
    },
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
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters": _FOUR_AXES | {"mrope_section": [2] * 4}},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": _FOUR_AXES | {"mrope_section": [2] * 4}},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm4v": {"text_config.rope_parameters": _MROPE},
    "glm46v": {"text_config.rope_parameters": _MROPE},
    "glmga": {"text_config.rope_parameters": _MROPE},
    "glm4v_moe_text": {"rope_parameters": _MROPE_HALF},
    "glm4v_moe": {"text_config.rope_parameters": _MROPE_HALF},
    "glm_image_text": {"rope_parameters": _MROPE},
    "glm_image": {"text_config.rope_parameters": _MROPE, "vq_config.latent_channels": 64},
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
    "reformer": {"hidden_dropout_prob": 0.0, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [4, 8]},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gradium_phonon_tts": {"flow_head_config.condition_dim": 64},
    "pocket_tts": {"flow_head_config.condition_dim": 64},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0], "image_patch_id": 261},
    "levit": {"image_size": 128},  # 64 leaves one token to the last stage, whose attention then has no choice
    "seggpt": {"image_size": [128, 64], "num_hidden_layers": 4, "merge_index": 1, "intermediate_hidden_state_indices": [2, 3]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
}  # fmt: skip

CLASSES: Mapping[str, str] = {
    # `AutoModel` has a class that does not take the type's configuration; this one does.
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
