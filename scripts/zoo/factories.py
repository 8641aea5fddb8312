"""Inputs of single model types, where no generic input serves.

Each factory takes the tiny model and returns what its forward is called with. Tensors are ramps and counts, the same in
every run.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inarch.sites import Inputs
from inarch.sites.arguments import made_arguments, ramp, setting
from inarch.sites.placeholders import count_features, put_placeholders

Factory = Callable[[nn.Module], Inputs]


def _ids(*shape: int, start: int = 3) -> Tensor:
    size = torch.Size(shape).numel()
    return (torch.arange(size) % 20 + start).reshape(shape)


def _kwargs(**kwargs: Any) -> Inputs:
    return Inputs((), kwargs)


def _series(model: nn.Module) -> Inputs:
    """A time series with its past and its future, and no features."""
    config = model.config
    past = config.context_length + max(config.lags_sequence)
    return _kwargs(
        past_values=ramp(1, past) + 2,
        past_time_features=ramp(1, past, config.num_time_features),
        past_observed_mask=torch.ones(1, past),
        future_values=ramp(1, config.prediction_length),
        future_time_features=ramp(1, config.prediction_length, config.num_time_features),
        use_cache=False,
    )


def _sound(**more: Any) -> Factory:
    """A short waveform, one channel."""
    return lambda model: _kwargs(input_values=ramp(1, 1, 3200), **more)


def _latents(channels: str) -> Factory:
    return lambda model: _kwargs(latents=ramp(1, getattr(model.config, channels), 6))


def _more(**made: Callable[[Any], Any]) -> Factory:
    """What inarch makes, with arguments that it does not know."""

    def make(model: nn.Module) -> Inputs:
        wanted = inspect.signature(model.forward).parameters
        known = made_arguments(model.config, wanted)
        known |= {name: maker(model.config) for name, maker in made.items()}
        if "use_cache" in wanted:
            known["use_cache"] = False
        return Inputs((), {name: value for name, value in known.items() if value is not None})

    return make


def _with_tower(kind: str, **data: Callable[[Any], Any]) -> Factory:
    """A text with placeholders for what one tower makes of the data."""
    return _with_towers(**{kind: data})


def _with_towers(**kinds: Mapping[str, Callable[[Any], Any]]) -> Factory:
    """A text with placeholders for what each tower makes of its data."""

    def make(model: nn.Module) -> Inputs:
        made: dict[str, Any] = {}
        counts: dict[str, int] = {}
        for kind, data in kinds.items():
            known = {name: maker(model.config) for name, maker in data.items()}
            own = {name: value for name, value in known.items() if value is not None}
            count = count_features(model, kind, own)
            if not count:
                getattr(model, f"get_{kind}_features")(**own)  # says what is wrong with the data
            counts[kind] = count or 0
            made |= own
        ids = made_arguments(model.config, {"input_ids": None})["input_ids"]
        texts = put_placeholders(model.config, ids, counts)
        wanted = inspect.signature(model.forward).parameters
        return _kwargs(**{name: value for name, value in (made | texts).items() if name in wanted or name in made})

    return make


def _image_size(config: Any) -> int:
    size = setting(config, "image_size")
    return size[0] if isinstance(size, (list, tuple)) else size


def _image(config: Any, *front: int) -> Tensor:
    size = _image_size(config)
    return ramp(*(front or (1,)), 3, size, size)


FACTORIES: Mapping[str, Factory] = {
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "timesfm": lambda m: _kwargs(
        past_values=ramp(1, 64), past_values_padding=torch.zeros(1, 64, dtype=torch.long), freq=torch.zeros(1, 1, dtype=torch.long)
    ),
    "timesfm2_5": lambda m: _kwargs(past_values=ramp(1, 64), past_values_padding=torch.zeros(1, 64, dtype=torch.long)),
    "blip_2_qformer": lambda m: _kwargs(
        query_embeds=ramp(1, 6, m.config.hidden_size), encoder_hidden_states=ramp(1, 5, m.config.encoder_hidden_size)
    ),
    "blip-2": lambda m: _kwargs(
        pixel_values=_image(m.config), input_ids=torch.cat([torch.full((1, m.config.num_query_tokens), m.config.image_token_id), _ids(1, 6)], 1),
        decoder_input_ids=_ids(1, 4),
    ),
    "instructblip": lambda m: _kwargs(
        pixel_values=_image(m.config), qformer_input_ids=_ids(1, 5),
        input_ids=torch.cat([torch.full((1, m.config.num_query_tokens), m.config.image_token_id), _ids(1, 6)], 1),
        decoder_input_ids=_ids(1, 4),
    ),
    "instructblipvideo": lambda m: _kwargs(
        pixel_values=_image(m.config, 1, 2), qformer_input_ids=_ids(1, 5), qformer_attention_mask=torch.ones(1, 5, dtype=torch.long),
        input_ids=torch.cat([torch.full((1, 2 * m.config.num_query_tokens), m.config.video_token_id), _ids(1, 6)], 1),
        decoder_input_ids=_ids(1, 4),
    ),
    "clap": lambda m: _kwargs(
        input_ids=_ids(1, 8),
        input_features=ramp(1, 1, m.config.audio_config.spec_size * 4, m.config.audio_config.num_mel_bins),
        is_longer=torch.tensor([[False]]),
    ),
    "clvp": lambda m: _kwargs(input_ids=_ids(1, 8), input_features=ramp(1, m.config.decoder_config.feature_size, 40)),
    "decision_transformer": lambda m: _kwargs(
        states=ramp(1, 5, m.config.state_dim), actions=ramp(1, 5, m.config.act_dim), rewards=ramp(1, 5, 1),
        returns_to_go=ramp(1, 5, 1), timesteps=torch.arange(5)[None], attention_mask=torch.ones(1, 5),
    ),
    "canine": lambda m: _kwargs(input_ids=_ids(1, 32)),
    "dia": lambda m: _kwargs(
        input_ids=_ids(1, 8), decoder_input_ids=_ids(1, 6, m.config.decoder_config.num_channels), use_cache=False
    ),
    "efficientloftr": lambda m: _kwargs(pixel_values=ramp(1, 2, 3, 64, 64)),
    "lightglue": lambda m: _kwargs(pixel_values=ramp(1, 2, 3, 64, 64)),
    "gemma3n": lambda m: _kwargs(
        pixel_values=ramp(1, 3, 32, 32), input_features=ramp(1, 64, m.config.audio_config.input_feat_size),
        input_features_mask=torch.ones(1, 64, dtype=torch.bool), use_cache=False,
        input_ids=torch.cat([
            _ids(1, 3), torch.full((1, m.config.vision_soft_tokens_per_image), m.config.image_token_id),
            torch.full((1, m.config.audio_soft_tokens_per_image), m.config.audio_token_id), _ids(1, 3),
        ], 1),
    ),
    "gemma3n_audio": lambda m: _kwargs(
        audio_mel=ramp(1, 64, m.config.input_feat_size), audio_mel_mask=torch.zeros(1, 64, dtype=torch.bool)
    ),
    "gemma4": lambda m: _gemma4(m.config, _gemma4_image(m.vision_tower, "image_position_ids"), ramp(1, 64, 128), image=4, sound=16),
    "embedding_gemma2": lambda m: _gemma4(m.config, _gemma4_image(m.vision_tower, "image_position_ids"), ramp(1, 64, 128), image=4, sound=16),
    "gemma4_unified": lambda m: _gemma4(
        m.config, _gemma4_image(m, "image_position_ids", m.config.vision_config.model_patch_size, across=2),
        ramp(1, 2, m.config.audio_config.audio_embed_dim), image=4, sound=2,
    ),
    "gemma4_audio": lambda m: _kwargs(
        input_features=ramp(1, 64, 128), attention_mask=torch.ones(1, 64, dtype=torch.bool)
    ),
    "gemma4_vision": lambda m: _gemma4_image(m, "pixel_position_ids"),
    "glm_image_vqmodel": lambda m: _kwargs(input=ramp(1, m.config.in_channels, 32, 32)),
    "granite_speech5_ctc": lambda m: _kwargs(input_features=ramp(1, 64, 320)),
    "granite_speech5_encoder": lambda m: _kwargs(input_features=ramp(1, 64, 320)),
    "fun_asr_nano_encoder": lambda m: _kwargs(input_features=ramp(1, 24, 560), input_features_mask=torch.ones(1, 24, dtype=torch.long)),
    "idefics": lambda m: _kwargs(
        input_ids=_ids(1, 8), pixel_values=_image(m.config, 1, 1), image_attention_mask=torch.ones(1, 8, 1, dtype=torch.long), use_cache=False
    ),
    "kosmos-2": lambda m: _kwargs(
        pixel_values=_image(m.config), input_ids=_ids(1, 4 + m.config.latent_query_num),
        image_embeds_position_mask=torch.tensor([[0, 0] + [1] * m.config.latent_query_num + [0, 0]]), use_cache=False,
    ),
    "lxmert": lambda m: _kwargs(
        input_ids=_ids(1, 8), visual_feats=ramp(1, 5, m.config.visual_feat_dim), visual_pos=ramp(1, 5, m.config.visual_pos_dim)
    ),
    "mimi_decoder": _latents("hidden_size"),
    "pocket_tts_audio_tokenizer_decoder": _latents("hidden_size"),
    "musicgen": lambda m: _kwargs(
        input_ids=_ids(1, 8), input_values=ramp(1, 1, 3200), decoder_input_ids=_ids(4, 6), use_cache=False
    ),
    "musicgen_melody": lambda m: _kwargs(
        input_ids=_ids(1, 8), input_features=ramp(1, 6, m.config.num_chroma), decoder_input_ids=_ids(4, 6), use_cache=False
    ),
    "muse_spark_audio": lambda m: _kwargs(input_values=ramp(1, 9600)),
    "muse_glimmer_assistant": lambda m: _kwargs(
        noise_embeds=ramp(1, 4, m.config.hidden_size), context_hidden_states=ramp(1, 6, _linear(m, 'fc').in_features)
    ),
    "nemotron3_5_transcribe_word_timestamp": lambda m: _kwargs(inputs_embeds=ramp(1, 8, m.config.hidden_size)),
    "neucodec": lambda m: _kwargs(input_features=ramp(1, 20, 160), input_values=ramp(1, 1, 6400)),
    "xcodec2": lambda m: _kwargs(input_features=ramp(1, 10, 160), input_values=ramp(1, 1, 3200)),
    "xcodec": lambda m: _kwargs(input_values=ramp(1, 1, 6400)),
    "oneformer": lambda m: _kwargs(pixel_values=ramp(1, 3, 64, 64), task_inputs=_ids(1, m.config.task_seq_len)),
    "omdet-turbo": lambda m: _kwargs(
        pixel_values=ramp(1, 3, 128, 128), classes_input_ids=_ids(2, 6), classes_attention_mask=torch.ones(2, 6, dtype=torch.long),
        tasks_input_ids=_ids(1, 6), tasks_attention_mask=torch.ones(1, 6, dtype=torch.long), classes_structure=torch.tensor([2]),
    ),
    "pe_video": lambda m: _kwargs(input_ids=_ids(1, 8), pixel_values_videos=ramp(1, 4, 3, 56, 56)),
    "pe_video_encoder": lambda m: _kwargs(pixel_values_videos=ramp(1, 4, 3, 56, 56)),
    "pe_audio_video": lambda m: _kwargs(
        input_ids=_ids(1, 8), pixel_values_videos=ramp(1, 4, 3, 56, 56), input_values=ramp(1, 1, 4 * 1920)
    ),
    "pe_audio_video_encoder": lambda m: _kwargs(pixel_values_videos=ramp(1, 4, 3, 56, 56), input_values=ramp(1, 1, 4 * 1920)),
    "perception_lm": _with_tower("image", pixel_values=lambda c: ramp(1, 1, 3, 56, 56)),
    "perceiver": lambda m: _kwargs(inputs=ramp(1, 12, m.config.d_model)),
    "pi0": lambda m: _kwargs(
        action_embeds=ramp(1, 4, m.config.dit_config.hidden_size), pixel_values=_image(m.config, 1, 1),
        input_ids=torch.cat([torch.full((1, 16), m.config.vlm_config.image_token_id), _ids(1, 4)], dim=1),
        pixel_attention_mask=torch.ones(1, 1, dtype=torch.bool),
    ),
    "qwen3_asr_encoder": lambda m: _kwargs(
        input_features=ramp(1, m.config.num_mel_bins, 200), input_features_mask=torch.ones(1, 200, dtype=torch.long)
    ),
    "seggpt": lambda m: _kwargs(
        pixel_values=ramp(1, 3, 64, 64), prompt_pixel_values=ramp(1, 3, 64, 64), prompt_masks=ramp(1, 3, 64, 64)
    ),
    "reformer": lambda m: _kwargs(input_ids=_ids(1, 32), use_cache=False),
    "speecht5": lambda m: _kwargs(
        input_values=ramp(1, 6, m.config.hidden_size), decoder_input_values=ramp(1, 4, m.config.hidden_size), use_cache=False
    ),
    "tvp": lambda m: _kwargs(pixel_values=ramp(1, m.config.num_frames, 3, 448, 448), input_ids=_ids(1, 8)),
    "udop": lambda m: _kwargs(
        input_ids=_ids(1, 8), bbox=torch.rand(1, 8, 4).sort(-1).values.mul(0) + torch.tensor([0.1, 0.1, 0.4, 0.4]),
        pixel_values=_image(m.config), decoder_input_ids=_ids(1, 4), use_cache=False,
    ),
    "univnet": lambda m: _kwargs(input_features=ramp(1, 10, m.config.num_mel_bins)),
    "vibevoice_acoustic_tokenizer": _sound(),
    "vibevoice_acoustic_tokenizer_encoder": lambda m: _kwargs(hidden_states=ramp(1, 1, 3200)),
    "vibevoice_acoustic_tokenizer_decoder": lambda m: _kwargs(hidden_states=ramp(1, m.config.hidden_size, 4)),
    "video_llama_3_vision": _more(merge_sizes=lambda c: torch.tensor([2])),
    "voxtral_realtime": lambda m: _kwargs(
        input_ids=_ids(1, 24), input_features=ramp(1, 128, 192), num_delay_tokens=2, use_cache=False
    ),
    "xclip": lambda m: _kwargs(
        input_ids=_ids(1, 8), pixel_values=_image(m.config, 1, m.config.vision_config.num_frames)
    ),
    "aria": _with_tower("image", pixel_values=_image, pixel_mask=lambda c: torch.ones(1, _image_size(c), _image_size(c), dtype=torch.bool)),
    "chameleon": lambda m: _kwargs(
        input_ids=torch.cat([torch.full((1, 16), 260), _ids(1, 6, start=70)], 1), pixel_values=ramp(1, 3, 64, 64), use_cache=False
    ),
    "depth_pro": lambda m: _kwargs(pixel_values=ramp(1, 3, 4 * m.config.patch_size, 4 * m.config.patch_size)),
    "deepseek_vl_hybrid": _with_tower("image", pixel_values=_image, high_res_pixel_values=lambda c: ramp(1, 3, *[c.high_res_vision_config.image_size] * 2)),
    "evolla": lambda m: _kwargs(
        input_ids=_ids(1, 8), attention_mask=torch.ones(1, 8, dtype=torch.long), protein_input_ids=_ids(1, 6),
        protein_attention_mask=torch.ones(1, 6, dtype=torch.long), use_cache=False,
    ),
    "fun_asr_nano": _with_tower("audio", input_features=lambda c: ramp(1, 24, 560), input_features_mask=lambda c: torch.ones(1, 24, dtype=torch.long)),
    "granite_docling": _with_tower(
        "image", pixel_values=lambda c: _image(c, 1, 1), pixel_attention_mask=lambda c: torch.ones(1, 1, dtype=torch.bool)
    ),
    "moss_transcribe_diarize": _with_tower(
        "audio", input_features=lambda c: ramp(1, 80, 64), input_features_mask=lambda c: torch.ones(1, 64, dtype=torch.long),
        padding_mask=lambda c: torch.ones(1, 64 * 160, dtype=torch.long),
    ),
    "qwen3_asr": _with_tower(
        "audio", input_features=lambda c: ramp(1, 128, 200), input_features_mask=lambda c: torch.ones(1, 200, dtype=torch.long)
    ),
    "kosmos-2.5": lambda m: _kwargs(
        flattened_patches=_flattened_patches(m.config), input_ids=_ids(1, 4 + m.config.latent_query_num),
        image_embeds_position_mask=torch.tensor([[0, 0] + [1] * m.config.latent_query_num + [0, 0]]), use_cache=False,
    ),
    "minicpmv4_6": _with_tower("image", pixel_values=lambda c: ramp(1, 3, 16, 16 * 16), target_sizes=lambda c: torch.tensor([[4, 4]])),
    "vibevoice_asr": _with_tower("audio", input_values=lambda c: ramp(1, 1, 6400), padding_mask=lambda c: torch.ones(1, 6400, dtype=torch.bool)),
    "voxtral": _with_tower("audio", input_features=lambda c: ramp(1, 128, 64)),
    "qwen2_audio": lambda m: _kwargs(
        input_ids=torch.cat([_ids(1, 3), torch.full((1, 16), m.config.audio_token_index), _ids(1, 3)], 1),
        attention_mask=torch.ones(1, 22, dtype=torch.long), input_features=ramp(1, 128, 64),
        feature_attention_mask=torch.ones(1, 64, dtype=torch.long), use_cache=False,
    ),
    "video_llava": lambda m: _video_llava(m),  # noqa: PLW0108  defined below
    "inkling2": _with_tower(
        "image",
        pixel_values=lambda c: ramp(16, *[c.vision_config.patch_size * c.vision_config.spatial_merge_size] * 2, 3),
        image_grid_thw=lambda c: torch.tensor([[1, 4, 4]]),
    ),
    "inkling2_vision": lambda m: _kwargs(
        pixel_values=ramp(16, *[m.config.patch_size * m.config.spatial_merge_size] * 2, 3), image_grid_thw=torch.tensor([[1, 4, 4]])
    ),
    "minicpm_ocr_vision": lambda m: _kwargs(pixel_values=ramp(1, 3, 16, 16 * 16), target_sizes=torch.tensor([[4, 4]])),
    "minicpmv4_7_vision": lambda m: _kwargs(pixel_values=ramp(1, 3, 16, 16 * 16), target_sizes=torch.tensor([[4, 4]])),
    "minicpm_ocr": _with_tower("image", pixel_values=lambda c: ramp(1, 3, 16, 16 * 16), target_sizes=lambda c: torch.tensor([[4, 4]])),
    "minicpmv4_7": _with_tower("image", pixel_values=lambda c: ramp(1, 3, 16, 16 * 16), target_sizes=lambda c: torch.tensor([[4, 4]])),
    "moonshine": lambda m: _kwargs(input_values=ramp(1, 6400), decoder_input_ids=_ids(1, 4), use_cache=False),
    "moonshine_streaming": lambda m: _kwargs(input_values=ramp(1, 6400), decoder_input_ids=_ids(1, 4), use_cache=False),
    "granite_speech": _with_tower("audio", input_features=lambda c: ramp(1, 96, c.encoder_config.input_dim)),
    "granite_speech_plus": _with_tower("audio", input_features=lambda c: ramp(1, 96, c.encoder_config.input_dim)),
    "granite4_vision": lambda m: _kwargs(
        input_ids=torch.cat([_ids(1, 3), torch.full((1, 56), m.config.image_token_id), _ids(1, 3)], 1), use_cache=False,
        pixel_values=_image(m.config, 1, 3), image_sizes=torch.tensor([[256, 128]]),
    ),
    "video_llama_3": _with_tower(
        "image", pixel_values=lambda c: ramp(16, 768), image_grid_thw=lambda c: torch.tensor([[1, 4, 4]]),
        image_merge_sizes=lambda c: torch.tensor([2]),
    ),
    "mllama": lambda m: _kwargs(
        input_ids=_ids(1, 8), pixel_values=_image(m.config, 1, 1, m.config.vision_config.max_num_tiles),
        aspect_ratio_ids=torch.tensor([[1]]), aspect_ratio_mask=torch.ones(1, 1, m.config.vision_config.max_num_tiles, dtype=torch.long),
        cross_attention_mask=torch.ones(1, 8, 1, m.config.vision_config.max_num_tiles, dtype=torch.long), use_cache=False,
    ),
    "musicflamingo": lambda m: _kwargs(
        input_ids=torch.cat([_ids(1, 3), torch.full((1, 16), m.config.audio_token_id), _ids(1, 3)], 1),
        input_features=ramp(1, 128, 64), input_features_mask=torch.ones(1, 64, dtype=torch.long), use_cache=False,
    ),
    "diffusion_gemma": lambda m: _diffusion_gemma(m),  # noqa: PLW0108  defined below
    "dots3_note": _with_towers(
        image={"pixel_values": lambda c: ramp(16, 3 * _patch_values(c)), "image_grid_thw": lambda c: torch.tensor([[1, 4, 4]])},
        audio={
            "input_features": lambda c: ramp(1, c.audio_config.feature_size, 64),
            "chunk_sample_lengths": lambda c: torch.tensor([64 * c.audio_config.hop_length]),
        },
    ),
    "fast_vlm": _with_tower("image", pixel_values=lambda c: ramp(1, 3, 128, 128)),
    "glm_image": lambda m: _kwargs(
        input_ids=torch.cat(
            [
                _ids(1, 3), torch.tensor([[m.config.image_start_token_id]]), torch.full((1, 16), m.config.image_token_id),
                torch.tensor([[m.config.image_end_token_id]]), _ids(1, 3), torch.tensor([[m.config.image_start_token_id]]),
            ], 1,
        ),
        pixel_values=ramp(16, 3 * m.config.vision_config.patch_size**2), image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 4]]), use_cache=False,
    ),
    "inkling_mm_model": _with_towers(
        image={
            "pixel_values": lambda c: ramp(4, c.vision_config.temporal_patch_size, c.vision_config.patch_size, c.vision_config.patch_size, 3)
        },
        audio={"audio_input_ids": lambda c: _ids(1, 3, c.audio_config.n_mel_bins)},
    ),
    "molmo2": lambda m: _kwargs(
        input_ids=torch.cat([_ids(1, 3), torch.full((1, 4), m.config.image_patch_id), _ids(1, 3)], 1), use_cache=False,
        pixel_values=ramp(1, m.config.vision_config.num_position_embeddings, 3 * m.config.vision_config.patch_size**2),
        image_token_pooling=torch.arange(16).reshape(4, 4), image_grids=torch.tensor([[2, 2, 0, 0]]),
    ),
    "muse_spark": _with_towers(
        image={"pixel_values": lambda c: ramp(16, 6 * c.vision_config.patch_size**2), "image_grid_thw": lambda c: torch.tensor([[1, 4, 4]])},
        audio={"input_values": lambda c: ramp(1, 9600)},
    ),
    "phi4_multimodal": lambda m: _phi4(m),  # noqa: PLW0108  defined below
    "vibevoice": lambda m: _kwargs(
        input_ids=torch.cat([_ids(1, 3), torch.full((1, 2), m.config.audio_token_id), _ids(1, 3)], 1), use_cache=False, sample=False,
        input_values=ramp(1, 1, 6400), padding_mask=torch.ones(1, 6400, dtype=torch.bool),
    ),
    "xmod": lambda m: _kwargs(input_ids=_ids(1, 8), lang_ids=torch.tensor([0]), use_cache=False),
    "kyutai_speech_to_text": lambda m: _kwargs(input_ids=_ids(1, 8, m.config.num_codebooks + 1), use_cache=False),
    "t5gemma2": lambda m: _kwargs(
        input_ids=torch.cat([torch.full((1, 4), m.config.image_token_index), _ids(1, 4)], dim=1),
        pixel_values=_image(m.config), decoder_input_ids=_ids(1, 4), use_cache=False,
    ),
}  # fmt: skip


def _gemma4_image(model: nn.Module, positions: str, side: int = 0, *, across: int = 6) -> Inputs:
    """Patches of an image, so many in each direction, with the place of each; `side` is that of a patch, if not the
    model's."""
    side = side or model.config.patch_size
    places = torch.arange(across)
    grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1).reshape(1, across**2, 2)
    return _kwargs(pixel_values=ramp(1, across**2, 3 * side**2), **{positions: grid})


def _gemma4(config: Any, pixels: Inputs, features: Tensor, *, image: int, sound: int) -> Inputs:
    """A text with an image and a sound, of which the model makes so many vectors."""
    tokens = torch.full((1, image), config.image_token_id), torch.full((1, sound), config.audio_token_id)
    return _kwargs(
        input_ids=torch.cat([_ids(1, 3), tokens[0], _ids(1, 2), tokens[1], _ids(1, 3)], 1), use_cache=False,
        input_features=features, input_features_mask=torch.ones(features.shape[:2], dtype=torch.bool), **pixels.kwargs,
    )  # fmt: skip


def _diffusion_gemma(model: nn.Module) -> Inputs:
    """A prompt with an image of 6 x 6 patches, of which the tower makes 2 x 2 vectors, and a short canvas."""
    config = model.config
    image = _gemma4_image(model.encoder.vision_tower, "image_position_ids")
    ids = torch.cat([_ids(1, 3), torch.full((1, 4), config.image_token_id), _ids(1, 3)], 1)
    return _kwargs(input_ids=ids, decoder_input_ids=_ids(1, 6), **image.kwargs)


def _phi4(model: nn.Module) -> Inputs:
    """A text with an image, in one piece and as a whole, and a sound."""
    vision, audio = model.config.vision_config, model.config.audio_config
    side = vision.image_size // vision.patch_size
    image, sound = 2 * (side // 2) * (side // 2 + 1) + 1, 8
    ids = [_ids(1, 3), torch.full((1, image), vision.image_token_id), torch.full((1, sound), audio.audio_token_id)]
    return _kwargs(
        input_ids=torch.cat([*ids, _ids(1, 3)], 1), use_cache=False,
        image_pixel_values=ramp(1, 2, 3, vision.image_size, vision.image_size),
        image_sizes=torch.tensor([[vision.crop_size, vision.crop_size]]), image_attention_mask=torch.ones(1, 2, side, side),
        audio_input_features=ramp(1, sound * audio.time_reduction, audio.input_size), audio_embed_sizes=torch.tensor([sound]),
    )  # fmt: skip


def _patch_values(config: Any) -> int:
    """Values of one channel in a patch of one image."""
    vision = config.vision_config
    return getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2


def _video_llava(model: nn.Module) -> Inputs:
    """A text with one image and one video of 8 frames."""
    config = model.config
    size = _image_size(config)
    side = size // config.vision_config.patch_size
    image, video = side**2, 8 * (side**2 + 1)
    ids = torch.cat(
        [
            _ids(1, 2),
            torch.full((1, image), config.image_token_index),
            torch.full((1, video), config.video_token_index),
        ],
        1,
    )
    return _kwargs(
        input_ids=ids, pixel_values=_image(config), pixel_values_videos=ramp(1, 8, 3, size, size), use_cache=False,
    )  # fmt: skip


def _linear(model: nn.Module, name: str) -> nn.Linear:
    """The first linear module of that name."""
    found = next(module for path, module in model.named_modules() if path.rpartition(".")[2] == name)
    assert isinstance(found, nn.Linear)
    return found


def _flattened_patches(config: Any) -> Tensor:
    """(1, patches, 2 + values): row and column of each patch, from 1, before its values."""
    vision = config.vision_config
    rows, columns = torch.meshgrid(torch.arange(1, 4), torch.arange(1, 4), indexing="ij")
    values = ramp(1, 9, vision.patch_embed_hidden_size)
    return torch.cat([rows.reshape(1, 9, 1).float(), columns.reshape(1, 9, 1).float(), values], dim=-1)
