"""What a person found, type by type: counts where the oracles are wrong, towers that need not run, types to refuse."""

from collections.abc import Mapping

REVIEWED: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    # Sites of a layer of that class, where neither the sums by name nor the modules by name give them.
    "axk2": {"AXK2DecoderLayer": (2,)},  # attention; the MLP or the experts: the indexer is part of the attention
    "ctrl": {"EncoderLayer": (2,)},  # the attention's variables are called `attn_output` and `original_x`
    "diffusion_gemma": {
        "DiffusionGemmaEncoderTextLayer": (2,),
        "DiffusionGemmaDecoderTextLayer": (2,),
    },  # experts and MLP in one
    "fun_asr_nano_encoder": {
        "FunAsrNanoEncoderLayer": (1, 2)
    },  # the first layer changes the width: its attention adds nothing
    "fun_asr_nano": {"FunAsrNanoEncoderLayer": (1, 2)},
    # Half an MLP, attention, convolution, half an MLP: one of the five sums is on another way through the source.
    "fastspeech2_conformer": {"FastSpeech2ConformerEncoderLayer": (4,)},
    "fastspeech2_conformer_with_hifigan": {"FastSpeech2ConformerEncoderLayer": (4,)},
    "align": {"AlignVisionBlock": (1,)},
    # In a stage of light convolutions, blocks with a sum: all but the first, which changes the width.
    "d_fine": {"HGNetV2Stage": (1,)},
    "deimv2": {"HGNetV2Stage": (1,)},
    "hgnet_v2": {"HGNetV2Stage": (1,)},
    "pp_doclayout_v3": {"HGNetV2Stage": (1,)},
    "pp_doclayout_v4": {"HGNetV2Stage": (1,)},
    # Attention with its own MLP behind it: to itself, then by one module to the other image, from both sides.
    "efficientloftr": {"EfficientLoFTRLocalFeatureTransformerLayer": (3,)},
    "efficientnet": {"EfficientNetBlock": (1,)},  # where width and size stay; the sum is in the module at its end
    # The stages of MobileNetV5 run their blocks themselves: all of 5, 37 and 39 but the first, which changes the size.
    "gemma3n_vision": {"Sequential": (4, 36, 38)},
    # LAuReL, attention, MLP: what AltUp adds to its streams is no branch of one of them.
    "gemma3n": {"Gemma3nTextDecoderLayer": (3,), "Sequential": (4, 36, 38)},
    "gemma3n_text": {"Gemma3nTextDecoderLayer": (3,)},
    # Attention, MLP: the streams of blocks that they look at are mixed, not added to.
    "inkling2": {"Inkling2SlidingDecoderLayer": (2,), "Inkling2FullDecoderLayer": (2,)},
    "inkling2_text": {"Inkling2SlidingDecoderLayer": (2,), "Inkling2FullDecoderLayer": (2,)},
    "gemma4": {"Gemma4TextDecoderLayer": (3,)},  # attention, MLP, embeddings per layer
    "gemma4_text": {"Gemma4TextDecoderLayer": (3,)},
    # By default without shared experts, `shared_intermediate_size` being 0: attention and experts.
    "granitemoe_swa": {"GraniteMoeSWADecoderLayer": (2,)},
    "granitemoeshared": {"GraniteMoeSharedDecoderLayer": (2,)},
    # A stage's own, its layers aside: groups look at patches, an MLP, groups gather patches, an MLP.
    "groupvit": {"GroupViTStage": (4,)},
    # Two attentions, each with an MLP; then, but for the last stage, a narrowing attention that adds nothing and its MLP.
    "levit": {"LevitStage": (4, 5)},
    "grounding-dino": {
        "GroundingDinoEncoderLayer": (6,)
    },  # text enhancer, fusion of both, deformable attention: two sums each
    "mm-grounding-dino": {"MMGroundingDinoEncoderLayer": (6,)},
    "inkling_mm_model": {
        "InklingDecoderLayer": (2,)
    },  # each with a short convolution behind it, whose own skip is inside
    "inkling_text": {"InklingDecoderLayer": (2,)},
    "lxmert": {
        "LxmertXLayer": (6,)
    },  # for text and for regions: attention to the other, by one module for both, then to itself, then an MLP
    "poolformer": {"PoolFormerLayer": (2,)},  # pooling, MLP; written twice, with and without scales
    "swiftformer": {"SwiftFormerEncoderBlock": (3,)},  # convolutions, attention, MLP; the last two written twice
    "patchtst": {"PatchTSTEncoderLayer": (2,)},  # attention and MLP, each written for two orders of its norm
}

IDLE: Mapping[str, Mapping[str, str]] = {
    # Towers that `forward` does not call, where `refused` names their layers, or they have none; parts not configured.
    "chameleon": {"vqmodel": "an image tokenizer of convolutions"},
    "emu3": {"vqmodel": "an image tokenizer of convolutions"},
    "janus": {"vqmodel": "an image tokenizer of convolutions, for generation"},
    "glm_image": {"vqmodel": "an image tokenizer of convolutions, for generation"},
    "csm": {
        "depth_decoder": "runs in generation, after the backbone",
        "codec_model": "makes the sound; adapts as `mimi`",
    },
    **{
        name: {
            "text_encoder": "reads a text instead of a sound: `forward` takes one of the two",
            "t2u_model": "runs in generation, after the decoder",
            "vocoder": "makes the sound, in generation",
        }
        for name in ("seamless_m4t", "seamless_m4t_v2")
    },
    "nemo_speechlm": {
        "word_timestamp_encoder": "adapts as `nemotron3_5_transcribe_word_timestamp`, on what `forward` returns"
    },
    "pe_audio_video": {
        "audio_model.text_model": "for a sound without video: adapts as `pe_audio`",
        "audio_model.audio_encoder": "for a sound without video: adapts as `pe_audio`",
        "video_model.text_model": "for a video without sound: adapts as `pe_video`",
        "video_model.video_encoder": "for a video without sound: adapts as `pe_video`",
    },
    "vibevoice": {
        "model.audio_tower.decoder": "makes the sound, in generation",
        "model.semantic_tokenizer_encoder": "an encoder of convolutions, for generation",
    },
    "musicgen": {"audio_encoder": "a codec of convolutions"},
    "dpt": {"backbone_config": "hybrid models have one in the place of these layers"},
    "esm": {"esmfold_config": "settings of the class that folds proteins"},
    "musicgen_melody": {"audio_encoder": "a codec of convolutions"},
}

TRAINS_ONLY_WITH: Mapping[str, str] = {
    # What a user has to do so that gradients come back at all, with any adapter of any library.
    "reformer": "its reversible layers give gradients in train mode only, after `model.enable_input_require_grads()`",
}

REFUSED: Mapping[str, str] = {
    "bark": "has no forward of its own: adapt its parts, `model.semantic` and the others, one by one",
    "edgetam": "its default configuration gives its backbone other widths than the backbone has",
    "edgetam_video": "its forward takes a video session that it changes: adapt `edgetam`",
    "sam2_video": "its forward takes a video session that it changes: adapt `sam2`",
    "sam3_tracker_video": "its forward takes a video session that it changes: adapt `sam3_tracker`",
    "sam3_video": "its forward takes a video session that it changes: adapt `sam3`",
    "glm_image_vqmodel": "an image tokenizer of convolutions without a forward",
    "voxtral_realtime_text": "the installed transformers names a class that it does not export: adapt `voxtral_realtime`",
    "pp_ocrv6_medium_det": "convolutions; its default configuration is incomplete",
    "pp_ocrv6_small_det": "convolutions; its default configuration is incomplete",
    "xcodec": "makes its sound from discrete codes, through which no gradient comes: adapt its semantic model",
    "edgetam_vision_model": "a backbone of convolutions and a pyramid on it, no residual Transformer block",
    "pp_ocrv6_small_rec": "convolutions, which carry the stream from one sum to the next",
    "pp_ocrv6_tiny_rec": "convolutions, which carry the stream from one sum to the next",
    "timm_wrapper": "is a ResNet by default: see the table of timm's models",
    "timm_backbone": "names no model by default: see the table of timm's models",
    "textnet": "convolutions, no residual Transformer block",
    "uvdoc": "convolutions, no residual Transformer block",
    "omdet-turbo": "keeps in a cache what its text encoder made of earlier texts, on which an adapter there would not act",
    "univnet": "a vocoder of convolutions, no residual Transformer block",
    **dict.fromkeys(("bit", "mobilenet_v1", "pp_ocrv5_mobile_rec", "pp_ocrv5_server_rec", "regnet", "resnet"), "convolutions, no residual Transformer block"),
    **dict.fromkeys(("dac", "encodec", "vibevoice_acoustic_tokenizer", "vibevoice_acoustic_tokenizer_decoder", "vibevoice_acoustic_tokenizer_encoder"), "a codec of convolutions, no residual Transformer block"),
}  # fmt: skip
