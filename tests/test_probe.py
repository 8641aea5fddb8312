"""The probe against the configurations of real architectures, and against what real forwards compute."""

import json
import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from zoo.build import tiny_model

from inarch.core.errors import SiteError
from inarch.core.site import Sites, Tap
from inarch.sites import ProbeError, probe, synthesise
from inarch.sites.graph import Graph, Value
from inarch.sites.inputs import given_inputs, made_inputs
from inarch.sites.meta import meta_copy
from inarch.sites.probe import _dtype, _for_real, _sites

WIDTH, HEADS, KV_HEADS, INNER, VOCAB = 32, 4, 2, 48, 99

TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**TEXT, "num_key_value_heads": KV_HEADS}
IMAGE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "image_size": 32,
    "patch_size": 8,
}
SEQ2SEQ = {
    "d_model": WIDTH,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": WIDTH, "n_layer": 3, "n_head": HEADS, "n_inner": INNER, "vocab_size": VOCAB, **SPECIAL}
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": 3, "num_decoder_layers": 2, "num_heads": HEADS}

CONFIGS = {
    "vit": lambda: tf.ViTConfig(**IMAGE),
    "dinov2": lambda: tf.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, mlp_ratio=2, image_size=28, patch_size=14
    ),
    "dinov2_swiglu": lambda: tf.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, use_swiglu_ffn=True, image_size=28
    ),
    "beit": lambda: tf.BeitConfig(**IMAGE),
    "clip_vision": lambda: tf.CLIPVisionConfig(**IMAGE),
    "clip_text": lambda: tf.CLIPTextConfig(**TEXT),
    "clip": lambda: tf.CLIPConfig(text_config=TEXT, vision_config=IMAGE),
    "siglip": lambda: tf.SiglipConfig(text_config=TEXT, vision_config=IMAGE),
    "swin": lambda: tf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2, 1], num_heads=[2, 2, 4], window_size=4, mlp_ratio=1.5
    ),
    "bert": lambda: tf.BertConfig(**TEXT),
    "bert_decoder": lambda: tf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True),
    "roberta": lambda: tf.RobertaConfig(**TEXT),
    "distilbert": lambda: tf.DistilBertConfig(dim=WIDTH, n_layers=3, n_heads=HEADS, hidden_dim=INNER, vocab_size=VOCAB),
    "deberta_v2": lambda: tf.DebertaV2Config(
        **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True, position_buckets=8
    ),
    "deberta": lambda: tf.DebertaConfig(**TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "albert": lambda: tf.AlbertConfig(**TEXT, embedding_size=16),
    "modernbert": lambda: tf.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2),
    "gpt2": lambda: tf.GPT2Config(**GPT),
    "gptj": lambda: tf.GPTJConfig(**GPT, rotary_dim=4),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**TEXT),
    "bloom": lambda: tf.BloomConfig(hidden_size=WIDTH, n_layer=3, n_head=HEADS, vocab_size=VOCAB, **SPECIAL),
    "falcon": lambda: tf.FalconConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, num_kv_heads=KV_HEADS, vocab_size=VOCAB,
        ffn_hidden_size=INNER, new_decoder_architecture=True, **SPECIAL,
    ),
    "phi3": lambda: tf.Phi3Config(**GQA),
    "llama": lambda: tf.LlamaConfig(**GQA),
    "mistral": lambda: tf.MistralConfig(**GQA),
    "qwen2": lambda: tf.Qwen2Config(**GQA),
    "gemma2": lambda: tf.Gemma2Config(**GQA, head_dim=8),
    "t5": lambda: tf.T5Config(**T5, vocab_size=VOCAB, decoder_start_token_id=0),
    "t5_gated": lambda: tf.T5Config(**T5, vocab_size=VOCAB, decoder_start_token_id=0, feed_forward_proj="gated-gelu"),
    "bart": lambda: tf.BartConfig(**SEQ2SEQ, max_position_embeddings=40),
    "mbart": lambda: tf.MBartConfig(**SEQ2SEQ, max_position_embeddings=40),
    "whisper": lambda: tf.WhisperConfig(**SEQ2SEQ, max_source_positions=30, max_target_positions=20),
    "wav2vec2": lambda: tf.Wav2Vec2Config(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, intermediate_size=INNER, conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    ),
    "xlm": lambda: tf.XLMConfig(emb_dim=WIDTH, n_layers=3, n_heads=HEADS, n_words=VOCAB, vocab_size=VOCAB, **SPECIAL),
}  # fmt: skip

MODELS = {
    "vit": tf.ViTForImageClassification,
    "dinov2": tf.Dinov2ForImageClassification,
    "dinov2_swiglu": tf.Dinov2Model,
    "beit": tf.BeitForImageClassification,
    "clip_vision": tf.CLIPVisionModel,
    "clip_text": tf.CLIPTextModel,
    "clip": tf.CLIPModel,
    "siglip": tf.SiglipModel,
    "swin": tf.SwinForImageClassification,
    "bert": tf.BertForSequenceClassification,
    "bert_decoder": tf.BertLMHeadModel,
    "roberta": tf.RobertaForSequenceClassification,
    "distilbert": tf.DistilBertForSequenceClassification,
    "deberta_v2": tf.DebertaV2ForSequenceClassification,
    "deberta": tf.DebertaForSequenceClassification,
    "albert": tf.AlbertForSequenceClassification,
    "modernbert": tf.ModernBertForSequenceClassification,
    "gpt2": tf.GPT2LMHeadModel,
    "gptj": tf.GPTJForCausalLM,
    "gpt_neox": tf.GPTNeoXForCausalLM,
    "bloom": tf.BloomForCausalLM,
    "falcon": tf.FalconForCausalLM,
    "phi3": tf.Phi3ForCausalLM,
    "llama": tf.LlamaForCausalLM,
    "mistral": tf.MistralForCausalLM,
    "qwen2": tf.Qwen2ForCausalLM,
    "gemma2": tf.Gemma2ForCausalLM,
    "t5": tf.T5ForConditionalGeneration,
    "t5_gated": tf.T5ForConditionalGeneration,
    "bart": tf.BartForSequenceClassification,
    "mbart": tf.MBartForConditionalGeneration,
    "whisper": tf.WhisperForConditionalGeneration,
    "wav2vec2": tf.Wav2Vec2ForCTC,
    "xlm": tf.XLMModel,
}

ENCODER = ("self_attention", "mlp")
DECODER = ("self_attention", "cross_attention", "mlp")


def stack(name, num_layers, roles, arrangement, layer_class):
    return name, num_layers, tuple((role, arrangement) for role in roles), layer_class


EXPECTED = {
    "vit": [stack("image0", 3, ENCODER, "pre", "ViTLayer")],
    "dinov2": [stack("image0", 3, ENCODER, "pre", "Dinov2Layer")],
    "dinov2_swiglu": [stack("image0", 2, ENCODER, "pre", "Dinov2Layer")],
    "beit": [stack("image0", 3, ENCODER, "pre", "BeitLayer")],
    "clip_vision": [stack("image0", 3, ENCODER, "pre", "CLIPEncoderLayer")],
    "clip_text": [stack("text0", 3, ENCODER, "pre", "CLIPEncoderLayer")],
    "clip": [
        stack("image0", 3, ENCODER, "pre", "CLIPEncoderLayer"),
        stack("text0", 3, ENCODER, "pre", "CLIPEncoderLayer"),
    ],
    "siglip": [
        stack("image0", 3, ENCODER, "pre", "SiglipEncoderLayer"),
        stack("text0", 3, ENCODER, "pre", "SiglipEncoderLayer"),
    ],
    "swin": [stack("image0", 5, ENCODER, "pre", "SwinLayer")],
    "bert": [stack("text0", 3, ENCODER, "post", "BertLayer")],
    "bert_decoder": [stack("text0", 3, DECODER, "post", "BertLayer")],
    "roberta": [stack("text0", 3, ENCODER, "post", "RobertaLayer")],
    "distilbert": [stack("text0", 3, ENCODER, "post", "TransformerBlock")],
    "deberta_v2": [stack("text0", 3, ENCODER, "post", "DebertaV2Layer")],
    "deberta": [stack("text0", 3, ENCODER, "post", "DebertaLayer")],
    "albert": [stack("text0", 1, ENCODER, "post", "AlbertLayer")],
    "gpt2": [stack("text0", 3, ENCODER, "pre", "GPT2Block")],
    "gptj": [stack("text0", 3, ENCODER, "pre", "GPTJBlock")],
    "gpt_neox": [stack("text0", 3, ENCODER, "pre", "GPTNeoXLayer")],
    "bloom": [stack("text0", 3, ENCODER, "pre", "BloomBlock")],
    "falcon": [stack("text0", 3, ENCODER, "pre", "FalconDecoderLayer")],
    "phi3": [stack("text0", 3, ENCODER, "pre", "Phi3DecoderLayer")],
    "llama": [stack("text0", 3, ENCODER, "pre", "LlamaDecoderLayer")],
    "mistral": [stack("text0", 3, ENCODER, "pre", "MistralDecoderLayer")],
    "qwen2": [stack("text0", 3, ENCODER, "pre", "Qwen2DecoderLayer")],
    "gemma2": [stack("text0", 3, ENCODER, "sandwich", "Gemma2DecoderLayer")],
    "t5": [stack("text0", 3, ENCODER, "pre", "T5Block"), stack("text1", 2, DECODER, "pre", "T5Block")],
    "t5_gated": [stack("text0", 3, ENCODER, "pre", "T5Block"), stack("text1", 2, DECODER, "pre", "T5Block")],
    "bart": [
        stack("text0", 3, ENCODER, "post", "BartEncoderLayer"),
        stack("text1", 2, DECODER, "post", "BartDecoderLayer"),
    ],
    "mbart": [
        stack("text0", 3, ENCODER, "pre", "MBartEncoderLayer"),
        stack("text1", 2, DECODER, "pre", "MBartDecoderLayer"),
    ],
    "whisper": [
        stack("audio0", 3, ENCODER, "pre", "WhisperEncoderLayer"),
        stack("text0", 2, DECODER, "pre", "WhisperDecoderLayer"),
    ],
    "wav2vec2": [stack("audio0", 3, ENCODER, "post", "Wav2Vec2EncoderLayer")],
    "xlm": [stack("text0", 3, ENCODER, "post", "XLMModel")],
}

# What the configurations say of the projections: output features that play the roles q k v o, and those of the MLP.
PLAIN = {"q": WIDTH, "k": WIDTH, "v": WIDTH, "o": WIDTH}
GROUPED = {"q": WIDTH, "k": WIDTH * KV_HEADS // HEADS, "v": WIDTH * KV_HEADS // HEADS, "o": WIDTH}
MLP = {"up": INNER, "down": WIDTH}
GATED = {"up": INNER, "gate": INNER, "down": WIDTH}
PROJECTIONS = {name: (PLAIN, MLP) for name in EXPECTED if name != "swin"} | {
    "dinov2": (PLAIN, {"up": 2 * WIDTH, "down": WIDTH}),
    "dinov2_swiglu": (PLAIN, {"up": 88, "gate": 88, "down": WIDTH}),  # 4 * 32 * 2 / 3, in steps of 8
    "bloom": (PLAIN, {"up": 4 * WIDTH, "down": WIDTH}),
    "xlm": (PLAIN, {"up": 4 * WIDTH, "down": WIDTH}),
    "t5_gated": (PLAIN, GATED),
    "falcon": (GROUPED, MLP),
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma2", "phi3"), (GROUPED, GATED)),
    "modernbert": (PLAIN, GATED),
}


@cache
def build(name):
    torch.manual_seed(0)
    model = MODELS[name](CONFIGS[name]()).eval()
    with torch.no_grad():  # not the ones and zeros of a fresh model: a wrong scale must show
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@cache
def found(name):
    return probe(build(name))


def layers_of(sites):
    """Roles and arrangements by stack and layer."""
    layers = {}
    for site in sites:
        layers.setdefault((site.stack, site.layer), []).append((site.role, site.arrangement))
    return layers


LEFT_ALONE = {
    "siglip": ("`vision_model.head` (SiglipMultiheadAttentionPoolingHead): a sum outside of the lists of layers",)
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_layer_has_exactly_the_expected_sites(name):
    """Each layer of each stack has the roles and norms of its architecture, found without weights."""
    sites = found(name)
    wanted = {(s, layer): list(roles) for s, num, roles, _ in EXPECTED[name] for layer in range(num)}
    assert layers_of(sites) == wanted
    assert {(site.stack, site.layer_class) for site in sites} == {(s, cls) for s, _, _, cls in EXPECTED[name]}
    assert sites.source == "meta"
    assert sites.refused == LEFT_ALONE.get(name, ())
    assert (sites.model_class, sites.model_type) == (MODELS[name].__name__, build(name).config.model_type)


def test_modernbert_first_attention_has_no_norm():
    """The norm of a branch is read off each layer, not off the class."""
    layers = layers_of(found("modernbert"))
    assert [layers["text0", 0][0][1], layers["text0", 1][0][1]] == ["none", "pre"]
    assert {role for roles in layers.values() for role, _ in roles} == set(ENCODER)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_have_the_features_of_the_configuration(name):
    """q, k, v, o, up, gate and down are linear modules with as many features as the configuration gives them."""
    attention, mlp = PROJECTIONS[name]
    model = build(name)
    for site in found(name):
        wanted = mlp if site.kind == "mlp" else attention
        assert {role: sum(p.num_rows for p in ps) for role, ps in site.projections.items()} == wanted
        for projection in (p for ps in site.projections.values() for p in ps):
            weight = model.get_submodule(site.absolute(projection.path)).weight
            shape = (projection.out_features, projection.in_features)
            assert tuple(weight.shape) == (shape[::-1] if projection.transposed else shape)
        assert site.width == WIDTH


def test_swin_stages_are_one_stack_of_growing_width():
    """Layers are counted through the stages, each with the width of its stage."""
    sites = found("swin")
    assert [(site.layer, site.width) for site in sites if site.kind == "mlp"] == [
        (0, 16), (1, 16), (2, 32), (3, 32), (4, 64)
    ]  # fmt: skip
    assert [p.out_features for site in sites for p in site.projections.get("up", ())] == [24, 24, 48, 48, 96]


@pytest.mark.parametrize("name", ["gptj", "gpt_neox", "falcon"])
def test_parallel_branches_share_their_sum(name):
    """Attention and MLP that are added at once are marked."""
    assert all(site.shared_sum for site in found(name))
    assert not any(site.shared_sum for site in found("llama"))


def test_layer_scale_is_inside_the_output():
    """The hook is behind a layer scale: the scale itself where it is a module, else one that runs behind it, here a
    stochastic depth that the branches of a layer share."""
    assert {site.output.path for site in found("dinov2")} == {"layer_scale1", "layer_scale2"}
    assert {(site.role, site.output.path, site.output.call) for site in found("beit")} == {
        ("self_attention", "drop_path", 1),
        ("mlp", "drop_path", 2),
    }
    assert all(site.exact for name in ("dinov2", "beit") for site in found(name))


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_adapters_wait_for_a_dropout_that_branches_share(probability):
    """Whatever its probability: no hook needs to tell its calls apart."""
    model = tf.ViTModel(tf.ViTConfig(**IMAGE, hidden_dropout_prob=probability))
    if "dropout" not in dict(model.get_submodule(probe(model)["image0.0.mlp"].layer_path).named_children()):
        pytest.skip("in this release of transformers each branch of ViT has a dropout of its own")
    sites = [site for site in probe(model) if site.layer == 0]
    assert [(site.output.path, site.output.call, site.dropped_later) for site in sites] == [
        ("attention", 0, True),
        ("mlp", 0, True),
    ]


def test_scale_that_no_module_follows_is_told():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.map, self.scale = nn.LayerNorm(8), nn.Linear(8, 8), nn.Parameter(torch.rand(8))

        def forward(self, x):
            return x + self.scale * self.map(self.norm(x))

    sites = probe(nn.Sequential(Block(), Block()), example_inputs=torch.randn(2, 3, 8))
    assert [(site.output.path, site.exact) for site in sites] == [("map", False), ("map", False)]


# -------------------------------------------------------------------- taps, against a real forward


class Watch:
    """What passes at the taps, at the norms behind the sums and at the ends of layers, call by call."""

    def __init__(self, model, sites):
        self.x, self.h, self.normed, self.ends, handles = {}, {}, {}, {}, []
        for site in sites:
            handles.append(self.watch_tap(model, site, site.stream, self.x))
            handles.append(self.watch_tap(model, site, site.output, self.h))
            if site.post_norm is not None:
                norm = model.get_submodule(site.absolute(site.post_norm))
                handles.append(norm.register_forward_pre_hook(self.keep_input(site.key)))
            layer = model.get_submodule(site.layer_path)
            handles.append(layer.register_forward_hook(self.keep_output(site.key)))
        with torch.no_grad():
            model(**synthesise(model))
        for handle in handles:
            handle.remove()

    def watch_tap(self, model, site, tap, into):
        module = model.get_submodule(site.absolute(tap.path))

        calls = [0]  # of the module, in this call of the layer (no layer here is checkpointed)
        model.get_submodule(site.layer_path).register_forward_pre_hook(lambda *_: calls.__setitem__(0, 0))

        def pick(value, key):
            calls[0] += 1
            if tap.call not in (0, calls[0]):
                return
            for part in key:
                value = value[part]
            into.setdefault(site.key, []).append(value.clone())

        if tap.side == "out":
            return module.register_forward_hook(lambda _module, _args, output: pick(output, tap.key))

        def read(_, args, kwargs):
            pick(kwargs if isinstance(tap.key[0], str) else args, tap.key)

        return module.register_forward_pre_hook(read, with_kwargs=True)

    def keep_input(self, key):
        return lambda _, args: self.normed.setdefault(key, []).append(args[0].clone())

    def keep_output(self, key):
        def keep(_, args, output):
            self.ends.setdefault(key, []).append((output if torch.is_tensor(output) else output[0]).clone())

        return keep


@pytest.mark.parametrize("name", MODELS)
def test_stream_plus_output_is_what_the_layer_goes_on_with(name):
    """x + h is the norm's input, the next branch's stream or the layer's result, in each call of the layer."""
    sites = found(name)
    watch = Watch(build(name), sites)
    assert all(site.stream is not None and site.stream.path for site in sites), "the stream is read inside the layer"
    by_layer = {}
    for site in sites:
        by_layer.setdefault((site.stack, site.layer), []).append(site)
    for layer in by_layer.values():
        for place, site in enumerate(layer):
            together = layer if site.shared_sum else [site]
            after = layer[place + 1 :] if not site.shared_sum else []
            for call, x in enumerate(watch.x[site.key]):
                total = x + sum(watch.h[other.key][call] for other in together)
                if site.post_norm is not None:
                    reached = watch.normed[site.key][call]
                elif after:
                    reached = watch.x[after[0].key][call]
                else:
                    reached = watch.ends[site.key][call]
                if site.exact:
                    torch.testing.assert_close(total, reached, rtol=1e-4, atol=1e-5)
                else:  # a scale per feature follows
                    scale = (reached - x) / watch.h[site.key][call]
                    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale), rtol=1e-2, atol=1e-3)


def test_shared_layer_is_one_layer_called_often():
    """ALBERT's only layer has one site per branch, which runs once per virtual layer."""
    watch = Watch(build("albert"), found("albert"))
    assert {key: len(calls) for key, calls in watch.h.items()} == {"text0.0.self_attention": 3, "text0.0.mlp": 3}


# -------------------------------------------------------------------- fused projections


class HandwrittenAttention(nn.Module):
    """Fused q, k, v, read as `reshape(...).permute(...).unbind(0)`."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj, self.drop = (
            heads,
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            nn.Dropout(0.1),
        )

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.drop(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D)))


class HandwrittenMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x):
        return x * self.gamma


class HandwrittenBlock(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = (
            nn.LayerNorm(width),
            HandwrittenAttention(width, 4),
            Scale(width),
            nn.Identity(),
        )
        self.norm2, self.mlp, self.ls2, self.drop_path2 = (
            nn.LayerNorm(width),
            HandwrittenMLP(width, INNER),
            Scale(width),
            nn.Identity(),
        )

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class HandwrittenViT(nn.Module):
    """Describes its input as timm's models do."""

    default_cfg = {"input_size": (3, 32, 32)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.Sequential(*(HandwrittenBlock() for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


FUSED = ["gpt2", "modernbert", "phi3", "gpt_neox", "falcon"]


@pytest.mark.parametrize("name", [*FUSED, "llama", "handwritten"])
@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_rows_are_exactly_the_features_of_the_role(name, role, monkeypatch):
    """Shifting the rows of a role changes every element of that operand of the attention, and no other operand."""
    model = HandwrittenViT().eval() if name == "handwritten" else build(name)
    sites = probe(model) if name == "handwritten" else found(name)
    site = next(site for site in sites if site.kind == "self_attention")
    (projection,) = site.projections[role]
    assert name == "llama" or projection.rows is not None
    rows = torch.zeros(projection.out_features, dtype=torch.bool)
    for start, stop in projection.rows or ((0, projection.out_features),):
        rows[start:stop] = True
    operands, plain = [], F.scaled_dot_product_attention

    def record(q, k, v, *args, **kwargs):
        operands.append({"q": q.clone(), "k": k.clone(), "v": v.clone()})
        return plain(q, k, v, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    linear = model.get_submodule(site.absolute(projection.path))
    inputs = synthesise(model)
    with torch.no_grad():
        model(**inputs)
        before, operands[:] = operands[0], []
        handle = linear.register_forward_hook(lambda _module, _args, output: output + rows * torch.randn(rows.shape))
        model(**inputs)
        handle.remove()
    for other, value in operands[0].items():
        assert (value != before[other]).all() if other == role else torch.equal(value, before[other])


def written_into_buffers(y):
    """q, k and v as parts of new tensors that are filled in place."""
    parts = []
    for part in y.chunk(3, dim=-1):
        buffer = y.new_empty(*part.shape[:-1], 2 * WIDTH)
        buffer[..., :WIDTH] = part
        parts.append(buffer[..., :WIDTH])
    return parts


SPLITS = {
    "chunk": lambda y: y.chunk(3, dim=-1),
    "unequal split": lambda y: y.split([WIDTH, WIDTH // 2, 3 * WIDTH // 2], dim=-1)[0:1] * 2 + (y[..., -WIDTH:],),
    "slices": lambda y: (y[..., :WIDTH], y[..., WIDTH : 2 * WIDTH], y[..., 2 * WIDTH :]),
    "interleaved": lambda y: y.unflatten(-1, (WIDTH, 3)).unbind(-1),
    "reshaped and permuted": lambda y: y.reshape(*y.shape[:2], 3, WIDTH).permute(2, 0, 1, 3).contiguous().unbind(0),
    "scaled and clipped": lambda y: (y.clamp(-1, 1) * 0.5).chunk(3, dim=-1),
    "in place": lambda y: y.clone().mul_(2.0).chunk(3, dim=-1),
    "lists of places": lambda y: [y.unflatten(-1, (3, WIDTH))[:, :, [part]].squeeze(2) for part in range(3)],
    "buffers": written_into_buffers,
}


class Fused(nn.Module):
    def __init__(self, split):
        super().__init__()
        self.split, self.norm, self.qkv, self.o = (
            split,
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.split(self.qkv(self.norm(x))))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def features_with_a_gradient(split):
    """For q, k and v the output features of the fused map that they depend on, as autograd has them."""
    y = torch.randn(1, 4, 3 * WIDTH, requires_grad=True)
    return [
        set(
            torch.autograd.grad((part * part.detach()).sum(), y, retain_graph=True)[0]
            .abs()
            .sum((0, 1))
            .nonzero()
            .flatten()
            .tolist()
        )
        for part in split(0.1 * y)
    ]


@pytest.mark.parametrize("name", SPLITS)
def test_rows_are_the_features_with_a_gradient(name):
    """However a fused projection is taken apart, its rows are those that autograd traces each operand to."""
    model = Stack(nn.ModuleList([Residual(Fused(SPLITS[name])), Residual(Fused(SPLITS[name]))]))
    projections = probe(model, example_inputs=torch.randn(1, 4, 8))["data0.0.self_attention"].projections
    for role, wanted in zip("qkv", features_with_a_gradient(SPLITS[name]), strict=True):
        (projection,) = projections[role]
        assert {row for start, stop in projection.rows for row in range(start, stop)} == wanted


def test_features_that_cannot_be_followed_are_left_out():
    """Where the features of q, k and v cannot be told apart, they get no projection, and a note says so."""
    model = Stack(nn.ModuleList([Residual(Fused(lambda y: y.flip(-1).chunk(3, dim=-1))) for _ in range(2)]))
    site = probe(model, example_inputs=torch.randn(1, 4, 8))["data0.0.self_attention"]
    assert set(site.projections) == {"o"}
    assert site.notes == ("`qkv` computes q, k, v, and which of its output features is which could not be told",)


@pytest.mark.parametrize("name", ["bloom", "deberta"])
def test_interleaved_rows_follow_the_heads(name):
    """Where q, k and v alternate head by head, each role has one range per head."""
    (projection,) = found(name)["text0.1.self_attention"].projections["k"]
    order = torch.arange(3 * WIDTH).reshape(HEADS, 3, WIDTH // HEADS)
    assert projection.rows == tuple((int(head[0]), int(head[-1]) + 1) for head in order[:, 1])


@pytest.mark.parametrize("name", ["modernbert", "phi3"])
def test_fused_gate_and_up_are_told_apart(name):
    """With the rows of `up` at one, what enters the last map is the activation of the rows of `gate`."""
    model, site = build(name), found(name)["text0.0.mlp"]
    (up,), (gate,), (down,) = (site.projections[role] for role in ("up", "gate", "down"))
    assert up.path == gate.path
    seen = {}

    def set_up(_, args, output):
        ((start, stop),) = gate.rows
        seen["gate"] = output[..., start:stop].clone()
        ((start, stop),) = up.rows
        output[..., start:stop] = 1.0

    handles = [
        model.get_submodule(site.absolute(up.path)).register_forward_hook(set_up),
        model.get_submodule(site.absolute(down.path)).register_forward_hook(
            lambda _module, args, _output: seen.update(down=args[0])
        ),
    ]
    with torch.no_grad():
        model(**synthesise(model))
    for handle in handles:
        handle.remove()
    activation = F.silu if name == "phi3" else F.gelu
    torch.testing.assert_close(seen["down"], activation(seen["gate"]))


def test_latent_attention_shares_one_map_between_keys_and_values():
    """DeepSeek's keys come from two maps, and its values from other rows of one of them."""
    config = tf.DeepseekV3Config(
        **TEXT, num_key_value_heads=HEADS, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, head_dim=4,
        moe_intermediate_size=16, first_k_dense_replace=1,
    )  # fmt: skip
    site = probe(tf.DeepseekV3Model(config))["text0.0.self_attention"]
    by_role = {role: {p.path: p for p in projections} for role, projections in site.projections.items()}
    shared = "self_attn.kv_b_proj"
    assert by_role["k"][shared].rows == ((0, 8), (14, 22), (28, 36), (42, 50))
    assert by_role["v"][shared].rows == ((8, 14), (22, 28), (36, 42), (50, 56))
    assert by_role["k"]["self_attn.kv_a_proj_with_mqa"].rows == ((12, 16),)
    assert set(by_role["q"]) == {"self_attn.q_b_proj"}


@pytest.mark.skipif(not hasattr(tf, "MistralLarge4TextModel"), reason="this release does not have the model")
def test_a_map_that_gives_the_keys_no_feature_is_none_of_theirs():
    """Mistral Large 4 has layers without rotary features, whose keys come from the latent alone."""
    model = tiny_model("mistral_large4_text")
    k = {site.layer: [p.path for p in site.projections["k"]] for site in probe(model) if site.kind == "self_attention"}
    assert k[0] == ["self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"]
    assert k[3] == ["self_attn.kv_b_proj"]


# -------------------------------------------------------------------- what the keys depend on

HEADS_AND_BASES = [
    (tf.ViTModel, tf.ViTForImageClassification, "vit"),
    (tf.Dinov2Model, tf.Dinov2ForImageClassification, "dinov2"),
    (tf.SwinModel, tf.SwinForImageClassification, "swin"),
    (tf.CLIPVisionModel, tf.CLIPVisionModelWithProjection, "clip_vision"),
    (tf.BertModel, tf.BertForSequenceClassification, "bert"),
    (tf.BertModel, tf.BertForMultipleChoice, "bert"),
    (tf.BertModel, tf.BertForMaskedLM, "bert"),
    (tf.RobertaModel, tf.RobertaForTokenClassification, "roberta"),
    (tf.GPT2Model, tf.GPT2ForSequenceClassification, "gpt2"),
    (tf.LlamaModel, tf.LlamaForCausalLM, "llama"),
    (tf.LlamaModel, tf.LlamaForSequenceClassification, "llama"),
    (tf.Qwen2Model, tf.Qwen2ForCausalLM, "qwen2"),
    (tf.T5Model, tf.T5ForConditionalGeneration, "t5"),
    (tf.BartModel, tf.BartForSequenceClassification, "bart"),
    (tf.WhisperModel, tf.WhisperForConditionalGeneration, "whisper"),
]


@pytest.mark.parametrize(("base", "head", "name"), HEADS_AND_BASES, ids=lambda value: getattr(value, "__name__", value))
def test_keys_are_the_same_under_a_task_head(base, head, name):
    """A base model has the same keys, widths and taps bare and under a head; only the layers' paths differ."""
    bare, headed = probe(base(CONFIGS[name]())), probe(head(CONFIGS[name]()))
    assert [site.key for site in bare] == [site.key for site in headed]
    assert [site.signature() for site in bare] == [site.signature() for site in headed]


def test_encoder_alone_has_the_keys_of_the_encoder():
    """T5's encoder keeps its keys when it comes without the decoder."""
    encoder = [site.key for site in probe(tf.T5EncoderModel(CONFIGS["t5"]()))]
    assert encoder == [site.key for site in found("t5") if site.stack == "text0"]


@pytest.mark.parametrize(
    "name", ["vit", "swin", "bert", "deberta_v2", "gpt2", "falcon", "llama", "t5", "whisper", "clip"]
)
def test_probe_without_weights_equals_a_real_forward(name):
    """The copy without weights shows the same sites, taps and projections as the model itself."""
    model = build(name)
    graph = _for_real(model, made_inputs(model)[0], _dtype(model))
    assert _sites(model, graph, "forward").sites == found(name).sites


@pytest.mark.parametrize("implementation", ["eager", "flex_attention", "flash_attention_2"])
def test_attention_kernels_do_not_matter(implementation):
    """A model that is set to a kernel the copy cannot run has the sites of a plain one."""
    model = tf.LlamaForCausalLM(CONFIGS["llama"]())
    model.config._attn_implementation = implementation
    assert probe(model).sites == found("llama").sites
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_does_not_matter(dtype):
    """A model in half precision has the sites of one in full precision."""
    assert probe(tf.ViTForImageClassification(CONFIGS["vit"]()).to(dtype)).sites == found("vit").sites


def test_experts_are_probed_without_weights():
    """A mixture of experts whose kernel refuses single precision without memory is probed in half."""
    config = tf.MixtralConfig(**GQA, num_local_experts=4)
    sites = probe(tf.MixtralForCausalLM(config))
    assert sites.source == "meta"
    assert layers_of(sites)["text0", 2] == [("self_attention", "pre"), ("mlp", "pre")]


# -------------------------------------------------------------------- models of other origin


class Stack(nn.Module):
    """A stream of width WIDTH through layers that `forward` runs one by one."""

    def __init__(self, layers):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.layers = layers

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


class PreNorm(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x):
        return self.inner(self.norm(x))


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x


class Sublayer(nn.Module):
    """Adds what another module computes."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.1)

    def forward(self, x, inner):
        return x + self.dropout(inner(self.norm(x)))


class LayerOfSublayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = HandwrittenAttention(WIDTH, 4), HandwrittenMLP(WIDTH, INNER)
        self.sublayers = nn.ModuleList([Sublayer(), Sublayer()])

    def forward(self, x):
        return self.sublayers[1](self.sublayers[0](x, self.attn), self.mlp)


class PairsInLists(Stack):
    def forward(self, x):
        x = self.embed(x)
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return x


class ResidualsInLists(Stack):
    def forward(self, x):
        x = self.embed(x)
        for attention, mlp in self.layers:
            x = mlp(attention(x))
        return x


class NamedLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Linear(8, WIDTH), HandwrittenBlock(), HandwrittenBlock()

    def forward(self, x):
        return self.second(self.first(self.embed(x)))


def branches():
    return HandwrittenAttention(WIDTH, 4), HandwrittenMLP(WIDTH, INNER)


def residuals():
    return [Residual(PreNorm(branch)) for branch in branches()]


HANDWRITTEN = {
    "list": lambda: Stack(nn.ModuleList(HandwrittenBlock() for _ in range(3))),
    "sequential": lambda: nn.Sequential(nn.Linear(8, WIDTH), nn.Sequential(*(HandwrittenBlock() for _ in range(3)))),
    "sequential of residuals": lambda: nn.Sequential(
        nn.Linear(8, WIDTH), nn.Sequential(*(nn.Sequential(*residuals()) for _ in range(3)))
    ),
    "stages": lambda: Stack(
        nn.ModuleList(nn.Sequential(*(HandwrittenBlock() for _ in range(depth))) for depth in (1, 2))
    ),
    "sublayers that add": lambda: Stack(nn.ModuleList(LayerOfSublayers() for _ in range(3))),
    "pairs in lists": lambda: PairsInLists(
        nn.ModuleList(nn.ModuleList(PreNorm(branch) for branch in branches()) for _ in range(3))
    ),
    "residuals in lists": lambda: ResidualsInLists(nn.ModuleList(nn.ModuleList(residuals()) for _ in range(3))),
}


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_handwritten_models_have_three_layers(name):
    """However a model keeps its layers, they are found as layers, with taps inside them."""
    sites = probe(HANDWRITTEN[name]().eval(), example_inputs=torch.randn(2, 5, 8))
    assert layers_of(sites) == {("data0", layer): [("self_attention", "pre"), ("mlp", "pre")] for layer in range(3)}
    assert all(site.exact and site.same_layout and site.stream is not None for site in sites)
    assert {role for site in sites for role in site.projections} == {"q", "k", "v", "o", "up", "down"}
    assert len({(site.layer_path, site.output) for site in sites}) == 6


def test_layers_kept_as_attributes_or_alone():
    """Without any list, layers are the modules that have a sibling of their class, or the only one there is."""
    x = torch.randn(2, 5, 8)
    assert [site.layer_path for site in probe(NamedLayers(), example_inputs=x)] == ["first"] * 2 + ["second"] * 2
    alone = nn.Sequential()
    alone.add_module("embed", nn.Linear(8, WIDTH))
    alone.add_module("block", HandwrittenBlock())
    assert {site.layer for site in probe(alone, example_inputs=x)} == {0}


def test_model_that_describes_its_input_needs_no_example():
    """The input size that timm keeps in `default_cfg` is enough; q, k and v are told apart."""
    sites = probe(HandwrittenViT())
    assert sites.num_layers == {"image0": 3}
    rows = {role: sites["image0.0.self_attention"].projections[role][0].rows for role in "qkv"}
    assert rows == {"q": ((0, 32),), "k": ((32, 64),), "v": ((64, 96),)}
    assert {site.output.path for site in sites} == {"drop_path1", "drop_path2"}


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoder_layers(norm_first):
    """`nn.TransformerEncoder` works, fast path or not; its fused attention applies its weights itself."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(
        nn.Embedding(VOCAB, WIDTH), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ).eval()
    sites = probe(model, example_inputs=torch.arange(12).reshape(2, 6))
    arrangement = "pre" if norm_first else "post"
    assert layers_of(sites)["text0", 1] == [("self_attention", arrangement), ("mlp", arrangement)]
    projections = sites["text0.0.self_attention"].projections
    assert {role: (p.path, p.weight, p.rows) for role, (p,) in projections.items()} == {
        "q": ("self_attn", "in_proj_weight", ((0, WIDTH),)),
        "k": ("self_attn", "in_proj_weight", ((WIDTH, 2 * WIDTH),)),
        "v": ("self_attn", "in_proj_weight", ((2 * WIDTH, 3 * WIDTH),)),
        "o": ("self_attn", "out_proj.weight", None),
    }
    assert [p.path for p in sites["text0.0.mlp"].projections["up"]] == ["linear1"]


def test_torch_decoder_looks_at_the_encoder():
    """`nn.Transformer` has two text stacks, and cross-attention in the second."""
    model = nn.Transformer(WIDTH, HEADS, 1, 2, INNER, batch_first=True).eval()
    sites = probe(model, example_inputs=(torch.randn(2, 6, WIDTH), torch.randn(2, 4, WIDTH)))
    assert layers_of(sites)["data1", 1] == [("self_attention", "post"), ("cross_attention", "post"), ("mlp", "post")]


def test_encoder_and_decoder_of_different_modalities():
    """An image encoder and a text decoder are named after what each takes up."""
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(CONFIGS["vit"](), CONFIGS["bert"]())
    assert probe(tf.VisionEncoderDecoderModel(config)).num_layers == {"image0": 3, "text0": 3}


def test_state_space_layers_are_mixers():
    """A branch in which tokens meet without queries and keys is neither attention nor MLP."""
    sites = probe(tf.MambaModel(tf.MambaConfig(hidden_size=WIDTH, num_hidden_layers=2, vocab_size=VOCAB, state_size=4)))
    assert [(site.key, site.projections) for site in sites] == [("text0.0.mixer", {}), ("text0.1.mixer", {})]


def test_convolutions_are_mixers_except_inside_an_mlp():
    """Conformer's convolution module mixes tokens; SegFormer's MLP has a convolution per channel between its maps."""
    conformer = tf.Wav2Vec2ConformerConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=INNER, conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        conv_depthwise_kernel_size=3,
    )  # fmt: skip
    roles = [site.role for site in probe(tf.Wav2Vec2ConformerModel(conformer))]
    assert roles == ["mlp", "self_attention", "mixer", "mlp_2"]
    segformer = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    sites = probe(tf.SegformerModel(segformer))
    assert [(site.key, site.width) for site in sites] == [
        ("image0.0.self_attention", 16), ("image0.0.mlp", 16), ("image0.1.self_attention", 32), ("image0.1.mlp", 32)
    ]  # fmt: skip


class TwoMLPs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = PreNorm(HandwrittenMLP(WIDTH, INNER)), PreNorm(HandwrittenMLP(WIDTH, INNER))

    def forward(self, x):
        x = x + self.a(x)
        return x + self.b(x)


ARGUMENTS = {
    ("pixel_values", (1, 3, 8, 8)): "image",
    ("pixel_values_videos", (1, 3, 8, 8)): "video",
    ("decoder_input_ids", (1, 4)): "text",
    ("token_type_ids", (1, 4)): "text",
    ("inputs_embeds", (1, 4, 8)): "text",
    ("input_features", (1, 4, 8)): "audio",
    ("input_values", (1, 400)): "audio",
    ("grid_thw", (1, 3)): "image",
    ("attention_mask", (1, 4)): "",
    ("spatial_shapes", (1, 2)): "",
    ("aspect_ratio_ids", (1, 4)): "",
    ("position_ids", (1, 4)): "",
    ("x", (1, 3, 8, 8)): "image",
    ("x", (1, 4, 8)): "data",
    ("context", (1, 4, 8)): "data",
}


@pytest.mark.parametrize(("name", "shape"), ARGUMENTS)
def test_modality_is_read_off_the_argument(name, shape):
    """An input's name says its modality; dimensions speak where the name does not."""
    value = Value(0, "input", (), shape, True, 0, 0, (), None)
    assert Graph(nn.Module(), [value], [], {0: name}, {}).modality(0) == ARGUMENTS[name, shape]


def test_integers_of_no_known_name_are_text_in_two_dimensions():
    """Token ids need no particular name."""
    for shape, modality in {(1, 4): "text", (1, 4, 2): "data"}.items():
        value = Value(0, "input", (), shape, False, 0, 0, (), None)
        assert Graph(nn.Module(), [value], [], {0: "x"}, {}).modality(0) == modality


class OtherNames(nn.Module):
    """A handwritten block whose modules have other names and classes."""

    def __init__(self):
        super().__init__()
        block = HandwrittenBlock()
        self.a, self.b, self.c, self.d = block.norm1, block.attn, block.norm2, block.mlp

    def forward(self, x):
        x = x + self.b(self.a(x))
        return x + self.d(self.c(x))


def test_keys_do_not_depend_on_names():
    """A renaming in the host library changes paths, and no key, arrangement or shape of a projection."""

    def facts(block):
        sites = probe(Stack(nn.ModuleList([block(), block()])), example_inputs=torch.randn(1, 4, 8))
        shapes = [{role: [(p.out_features, p.rows) for p in ps] for role, ps in s.projections.items()} for s in sites]
        return [(site.key, site.arrangement, site.width) for site in sites], shapes

    assert facts(HandwrittenBlock) == facts(OtherNames)


def test_second_branch_of_a_kind_is_numbered():
    """Roles repeated in a layer are numbered from the second on."""
    sites = probe(Stack(nn.ModuleList([TwoMLPs(), TwoMLPs()])), example_inputs=torch.randn(1, 4, 8))
    assert [site.key for site in sites][:2] == ["data0.0.mlp", "data0.0.mlp_2"]


class Experts(nn.Module):
    """Sends every token to one expert; an expert without tokens does not run."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4), nn.ModuleList(HandwrittenMLP(WIDTH, INNER) for _ in range(4))

    def forward(self, x):
        result, choice = torch.zeros_like(x), self.router(x).argmax(-1)
        for number in choice.unique().tolist():
            chosen = choice == number
            result[chosen] = self.experts[number](x[chosen])
        return result


class LayerOfExperts(HandwrittenBlock):
    def __init__(self):
        super().__init__()
        self.mlp = Experts()


def test_experts_without_tokens_are_counted():
    """An expert that the example happens not to reach has its place among the projections, in the order of the list."""
    torch.manual_seed(0)
    model = Stack(nn.ModuleList([LayerOfExperts(), LayerOfExperts()])).eval()
    sites = probe(model, example_inputs=torch.randn(1, 2, 8))
    assert sites.source == "forward"
    for site in (sites["data0.0.mlp"], sites["data0.1.mlp"]):
        assert [p.path for p in site.projections["up"]] == [f"mlp.experts.{expert}.fc1" for expert in range(4)]
        assert [p.path for p in site.projections["down"]] == [f"mlp.experts.{expert}.fc2" for expert in range(4)]


def test_weights_outside_linear_modules_are_noted():
    """Experts kept in one tensor get none of the common roles; where their shapes leave a doubt, a note says where."""
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**GQA, num_local_experts=4))
    assert set(probe(model)["text0.0.mlp"].projections) == {"expert_up", "expert_down"}
    for layer in model.model.layers:  # with a third tensor nobody can tell which are the projections
        layer.mlp.experts.more = nn.Parameter(torch.randn(4, WIDTH, WIDTH))
    site = probe(model)["text0.0.mlp"]
    assert site.projections == {}
    assert "`mlp.experts` (MixtralExperts) has weights that are no linear module" in site.notes


# -------------------------------------------------------------------- the model is left as it was


class ReadsActivations(Stack):
    """Its Python looks at an activation, so that it runs on real values only."""

    def forward(self, x):
        result = super().forward(x + 0 * torch.randn_like(x))
        assert result.sum().item() < 1e9
        return result


def snapshot(model):
    """All of a model and of the random state that a probe might disturb."""
    return {
        "values": {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()},
        "modules": [
            (path, id(module), module.training, sorted(vars(module))) for path, module in model.named_modules()
        ],
        "hooks": [list(m._forward_hooks.items()) + list(m._forward_pre_hooks.items()) for m in model.modules()],
        "grad": [parameter.requires_grad for parameter in model.parameters()],
        "random": (torch.get_rng_state().tolist(), random.getstate()),
    }


@pytest.mark.parametrize("source", ["meta", "forward"])
def test_probe_leaves_the_model_and_the_random_state_alone(source):
    """State, hooks, modes of single modules and random numbers are the same after a probe, without and with weights."""
    layers = nn.ModuleList(HandwrittenBlock() for _ in range(2))
    model = (Stack if source == "meta" else ReadsActivations)(layers)
    model.layers[0].eval()
    model.embed.weight.requires_grad_(False)
    calls = []
    model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    before = snapshot(model)
    sites = probe(model, example_inputs=torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)))
    after = snapshot(model)
    assert sites.source == source
    assert calls == ([] if source == "meta" else [1]), "a hook that closes over weights must not run without them"
    for name, (identity, value) in before.pop("values").items():
        assert after["values"][name][0] == identity
        assert torch.equal(after["values"][name][1], value)
    assert {**after, "values": None} == {**before, "values": None}


def test_copy_has_no_weights_and_keeps_ties():
    """The copy needs no memory, also for tensors that are no parameters, and what was tied stays tied."""
    model = build("gpt2")
    model.extra = [torch.ones(3) * 2]
    twin = meta_copy(model)
    del model.extra
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert all(tensor.is_meta for tensor in [*twin.parameters(), *twin.buffers(), *twin.extra])
    assert twin.config is not model.config


def test_shared_module_is_not_mistaken_for_a_copy():
    """A module that deep copies share is refused, and the model is probed with its weights instead."""

    class Shared(HandwrittenBlock):
        def __deepcopy__(self, memo):
            return self

    model = Stack(nn.ModuleList([Shared(), Shared()]))
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    assert probe(model, example_inputs=torch.randn(1, 4, 8)).source == "forward"
    assert list(model.layers[0]._forward_hooks) == [handle.id]


def test_values_that_do_not_come_from_weights_are_known():
    """A model that asks its mask for padding, counts tokens or picks with a mask is probed without weights."""

    class Asks(Stack):
        def forward(self, x, mask):
            assert mask.all()
            assert int(mask.sum()) == mask.numel()
            return super().forward(x[mask].reshape(x.shape) + torch.zeros(mask.nonzero().shape[0] // 4, 1, 1))

    model = Asks(nn.ModuleList([HandwrittenBlock(), HandwrittenBlock()]))
    inputs = {"x": torch.randn(2, 4, 8), "mask": torch.ones(2, 4, dtype=torch.bool)}
    assert probe(model, example_inputs=inputs).source == "meta"


# -------------------------------------------------------------------- inputs and errors


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "dict"])
def test_example_inputs_may_be_a_tensor_a_tuple_or_a_dict(wrap):
    """All three ways to call a model are taken."""
    model = Stack(nn.ModuleList([HandwrittenBlock(), HandwrittenBlock()]))
    assert len(probe(model, example_inputs=wrap(torch.randn(1, 4, 8)))) == 4


def test_synthesised_inputs_run_the_model():
    """Made-up inputs are keyword arguments, the same each time, of the model's type."""
    model = tf.ViTModel(CONFIGS["vit"]()).to(torch.bfloat16)
    first, second = synthesise(model), synthesise(model)
    assert first["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert model(**first).last_hidden_state.shape == (1, 17, WIDTH)
    assert synthesise(nn.Linear(3, 3)) is None


def test_made_up_token_ids_are_plain_words():
    """No padding, image or beginning token is among made-up ids, except where the model needs one."""
    config = CONFIGS["bart"]()
    ids = made_inputs(tf.BartModel(config))[0].kwargs
    assert not {0, 1, 2} & set(ids["input_ids"][0, :-1].tolist())
    assert ids["input_ids"][0, -1] == config.eos_token_id
    assert ids["decoder_input_ids"][0, 0] == config.decoder_start_token_id


def test_unknown_inputs_are_asked_for():
    """A model whose inputs cannot be told is refused with the argument that helps."""
    with pytest.raises(SiteError, match=r"got Stack, whose inputs cannot be told.*Pass `example_inputs=`"):
        probe(Stack(nn.ModuleList()))


@pytest.mark.parametrize("value", ["a photo", 3, {}, ()])
def test_example_inputs_without_tensors_are_refused(value):
    """What is no tensor and holds none is refused by type."""
    with pytest.raises(SiteError, match=r"`example_inputs` is a tensor.*got (str|int|dict|tuple)"):
        given_inputs(value)


def test_model_that_cannot_run_is_reported_with_its_own_error():
    """The model's own error is in the message and is the cause."""
    model = Stack(nn.ModuleList([HandwrittenBlock()]))
    with pytest.raises(
        SiteError, match=r"A probe runs the model once; got RuntimeError: .* from Stack, on the example"
    ) as e:
        probe(model, example_inputs=torch.randn(1, 4, 7))
    assert isinstance(e.value.__cause__, RuntimeError)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_model_without_branches_is_refused():
    """A model that adds nothing to a stream has no place for adapters."""
    with pytest.raises(ProbeError, match=r"got none in Sequential.*layout=") as e:
        probe(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), example_inputs=torch.randn(2, 8))
    assert e.value.found["sites"] == []


class FunctionalBranch(nn.Module):
    """Its second branch is no module's result."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = PreNorm(HandwrittenMLP(WIDTH, INNER)), nn.LayerNorm(WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.first(x)
        return x + self.norm(x) @ self.weight


def test_branch_that_no_module_returns_is_named():
    """A branch without a hook place is an error that names it and holds what was found."""
    model = Stack(nn.ModuleList([FunctionalBranch(), FunctionalBranch()]))
    place = r"got none for mlp_2 of `layers.0` \(FunctionalBranch\)"
    with pytest.raises(ProbeError, match=rf"2 problems:(?s:.)*{place}(?s:.)*inarch.attach\(model, layout=") as e:
        probe(model, example_inputs=torch.randn(1, 4, 8))
    assert [site.key for site in Sites.from_dict(e.value.found)] == ["data0.0.mlp", "data0.1.mlp"]
    assert json.loads(json.dumps(e.value.found)) == e.value.found


class Moody(HandwrittenBlock):
    """Leaves out a branch for a reason that its structure does not show."""

    mood = 1.0

    def forward(self, x):
        if self.mood == 0:
            return self.norm1(x)
        return super().forward(x) if self.mood > 0 else x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))


@pytest.mark.parametrize(
    ("mood", "place"),
    [
        (
            -1.0,
            r"got self_attention at `layers.1` \(Moody, layer 1 of data0\) where its siblings have self_attention, mlp",
        ),
        (0.0, r"got none at `layers.1` \(Moody\)"),
    ],
)
def test_layer_that_differs_from_its_siblings_is_named(mood, place):
    """A layer built like its siblings and with fewer sites, or none, is refused by name."""
    model = Stack(nn.ModuleList(Moody() for _ in range(3)))
    model.layers[1].mood = mood
    with pytest.raises(ProbeError, match=rf"layers that are built alike have the same sites; {place}"):
        probe(model, example_inputs=torch.randn(1, 4, 8))


def test_layer_that_differs_by_its_modules_is_accepted():
    """Layers of one list may differ where their modules do."""
    model = Stack(nn.ModuleList([HandwrittenBlock(), TwoMLPs(), HandwrittenBlock()]))
    sites = probe(model, example_inputs=torch.randn(1, 4, 8))
    assert [role for role, _ in layers_of(sites)["data0", 1]] == ["mlp", "mlp_2"]
    assert sites.num_layers == {"data0": 3}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Linear(8, WIDTH), nn.ModuleList([Moody()])

    def forward(self, x):
        x = self.layers[0](self.embed(x))
        self.layers[0].mood = -1.0
        return self.layers[0](x)


def test_layer_whose_calls_differ_is_named():
    """A shared layer must have the same sites in every call."""
    with pytest.raises(
        ProbeError, match=r"a layer that runs several times .* got different ones at `layers.0` \(Moody\)"
    ):
        probe(Twice(), example_inputs=torch.randn(1, 4, 8))


class Projecting(HandwrittenBlock):
    """Its attention is added to a projection of the stream, as where a layer changes its width."""

    def __init__(self):
        super().__init__()
        self.skip = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.norm1(x)
        x = self.skip(x) + self.attn(x)
        return x + self.mlp(self.norm2(x))


def test_attention_that_is_added_to_a_projection_of_its_stream():
    """The projection is the stream of the attention; the MLP goes on from their sum."""
    sites = probe(Stack(nn.ModuleList([Projecting(), Projecting()])), example_inputs=torch.randn(1, 4, 8))
    attention, mlp, *_ = sites
    assert (attention.role, attention.output.path, attention.stream) == (
        "self_attention", "attn", Tap(path="skip", side="out"),
    )  # fmt: skip
    assert attention.notes == ("the layer projects the stream before the sum",)
    assert (attention.exact, attention.same_layout, attention.handed_on) == (True, True, True)
    assert mlp.output.path == "mlp"


def test_hiera_has_all_attentions():
    """The first layer of a stage projects its skip."""
    config = tf.HieraConfig(
        embed_dim=16, depths=[1, 2], num_heads=[1, 2], image_size=[32, 32], patch_stride=[4, 4], query_stride=[2, 2],
        masked_unit_size=[4, 4], masked_unit_attention=[True, False], num_query_pool=1,
    )  # fmt: skip
    sites = probe(tf.HieraModel(config))
    assert [role for role, _ in layers_of(sites)["image0", 1]] == ["self_attention", "mlp"]
    assert sites.refused == ()


class Replacing(HandwrittenBlock):
    """Its attention replaces the stream."""

    def forward(self, x):
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_attention_that_is_not_added_to_its_stream_is_told():
    """A layer class that loses its attention everywhere is an error; among layers that have theirs, it is refused."""
    with pytest.raises(ProbeError, match=r"got one that is not at `layers.0`, `layers.1` \(Replacing\)"):
        probe(Stack(nn.ModuleList([Replacing(), Replacing()])), example_inputs=torch.randn(1, 4, 8))


def test_attention_of_a_stage_change_is_refused():
    """LeViT makes fewer tokens by an attention that is added to nothing."""
    config = tf.LevitConfig(
        image_size=64, hidden_sizes=[16, 32, 48], depths=[1, 1, 1], key_dim=[8, 8, 8], num_attention_heads=[2, 2, 2],
        down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
    )  # fmt: skip
    sites = probe(tf.LevitModel(config))
    (refused,) = sites.refused
    assert refused.startswith("`encoder.stages.0`, `encoder.stages.1` (LevitStage): an attention whose result is not")


def test_layers_that_did_not_run_are_listed():
    """A tower that the inputs do not reach is told, not passed over."""

    class Towers(Stack):
        def __init__(self, layers):
            super().__init__(layers)
            self.others = nn.ModuleList([HandwrittenBlock(), HandwrittenBlock()])

    sites = probe(Towers(nn.ModuleList([HandwrittenBlock()])), example_inputs=torch.randn(1, 4, 8))
    assert sites.num_layers == {"data0": 1}
    (refused,) = sites.refused
    assert refused.startswith("`others` (2 of HandwrittenBlock): did not run in the probe")


def test_feature_maps_have_sites_on_their_channels():
    config = tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=64)
    sites = probe(tf.ConvNextModel(config))
    assert [(site.key, site.width, site.feature_dim) for site in sites] == [
        ("image0.0.mixer", 8, 1), ("image0.1.mixer", 16, 1), ("image0.2.mixer", 16, 1)
    ]  # fmt: skip


def _llava():
    """A vision tower and a text model, and a placeholder in the text for each patch the tower gives."""
    vision = tf.CLIPVisionConfig(**IMAGE)
    text = tf.LlamaConfig(**GQA)
    return tf.LlavaModel(tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=90)).eval()


def _llava_inputs(model):
    """The first made inputs. Older releases divide image sizes by a patch size that CLIP's tower does not have."""
    return {key: value for key, value in made_inputs(model)[0].kwargs.items() if key != "image_sizes"}


def test_made_inputs_have_a_placeholder_for_every_patch():
    model = _llava()
    inputs = _llava_inputs(model)
    patches = (IMAGE["image_size"] // IMAGE["patch_size"]) ** 2
    assert int((inputs["input_ids"] == 90).sum()) == patches
    with torch.no_grad():
        model(**inputs)


def test_a_model_that_ran_before_is_probed_with_all_its_towers():
    model = _llava()
    fresh = probe(model)
    with torch.no_grad():
        model(**_llava_inputs(model))  # transformers now keeps its own hooks in the model
    again = probe(model)
    assert {site.stack for site in fresh} == {"image0", "text0"}
    assert [site.key for site in again] == [site.key for site in fresh]
    assert again.source == fresh.source == "meta"


def test_a_text_config_that_is_ambiguous_is_no_error():
    parts = {"text_encoder": tf.T5Config(**T5, vocab_size=VOCAB), "audio_encoder": tf.EncodecConfig()}
    config = tf.MusicgenConfig(**parts, decoder=tf.MusicgenDecoderConfig(vocab_size=VOCAB, num_hidden_layers=1))
    with torch.device("meta"):
        model = tf.MusicgenForConditionalGeneration(config)
    assert made_inputs(model)[0].kwargs["input_ids"].max() < VOCAB
