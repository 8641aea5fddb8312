"""Layers that are built unlike the rest: what the probe finds in them, and that adapters there start at the base model.

Roles and hook places are written from the layers' source.
"""

from functools import cache

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import inarch
from inarch.bank import SiteSlot
from inarch.sites import ProbeError, synthesise
from inarch.testing import PlainTransformer, perturb

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 64, **SPECIAL,
}  # fmt: skip
GQA = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99, "max_position_embeddings": 64, **SPECIAL,
}  # fmt: skip
TOKENS = torch.arange(3, 11)[None]


def idefics():
    vision = {
        "embed_dim": 32, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    }  # fmt: skip
    model = tf.IdeficsModel(
        tf.IdeficsConfig(
            **TEXT, vision_config=vision, cross_layer_interval=2, use_resampler=False, additional_vocab_size=0
        )
    )
    inputs = {"pixel_values": torch.randn(1, 1, 3, 16, 16), "image_attention_mask": torch.ones(1, 8, 1).long()}
    return model, {"input_ids": TOKENS, "attention_mask": torch.ones(1, 8).long(), **inputs}


def xmod():
    model = tf.XmodModel(tf.XmodConfig(**TEXT, languages=["en_XX", "de_DE"]))
    model.set_default_language("en_XX")
    return model, None


def reformer():
    config = tf.ReformerConfig(
        hidden_size=32, num_attention_heads=4, attention_head_size=8, feed_forward_size=48, vocab_size=99,
        attn_layers=["local", "local"], axial_pos_shape=[8, 8], axial_pos_embds_dim=[16, 16],
        local_attn_chunk_length=4, max_position_embeddings=64, is_decoder=False, **SPECIAL,
    )  # fmt: skip
    return tf.ReformerModel(config), {"input_ids": torch.arange(3, 67)[None]}


MODELS = {
    # XLNet adds inside its attention and calls one dropout twice.
    "xlnet": lambda: (tf.XLNetModel(tf.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=99)), None),
    # X-MOD adds its language adapter to the MLP's output, with the same dropout.
    "xmod": xmod,
    "albert": lambda: (
        tf.AlbertModel(tf.AlbertConfig(**TEXT, embedding_size=16, num_hidden_groups=2, inner_group_num=2)), None,
    ),
    # Pegasus-X runs its MLP twice in a layer: on the tokens, and on the global ones.
    "pegasus_x": lambda: (tf.PegasusXModel(tf.PegasusXConfig(**SEQ2SEQ, block_size=4, num_global_tokens=2)), None),
    # MobileBERT has a narrow stream in each layer, and four MLPs on it.
    "mobilebert": lambda: (
        tf.MobileBertModel(tf.MobileBertConfig(**TEXT, embedding_size=16, intra_bottleneck_size=16)), None,
    ),
    # TimeSformer looks at the frames of a patch, then at the patches of a frame.
    "timesformer": lambda: (
        tf.TimesformerModel(
            tf.TimesformerConfig(
                image_size=32, patch_size=8, num_frames=2, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=48,
            )
        ), None,
    ),
    "gemma3n": lambda: (
        tf.Gemma3nTextModel(
            tf.Gemma3nTextConfig(
                **{**GQA, "intermediate_size": [48, 48]}, num_kv_shared_layers=0, vocab_size_per_layer_input=99,
                hidden_size_per_layer_input=8, laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0],
                layer_types=["sliding_attention", "full_attention"],
            )
        ), None,
    ),
    "ibert": lambda: (tf.IBertModel(tf.IBertConfig(**TEXT)), None),
    "reformer": reformer,
    "idefics": idefics,
    # RWKV's attention is a recurrence.
    "rwkv": lambda: (
        tf.RwkvModel(
            tf.RwkvConfig(
                vocab_size=99, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48
            )
        ), None,
    ),
    # The Funnel Transformer pools the queries of the first layer of a block, not its keys.
    "funnel": lambda: (
        tf.FunnelBaseModel(
            tf.FunnelConfig(d_model=32, n_head=4, d_head=8, d_inner=48, vocab_size=99, block_sizes=[1, 2])
        ), None,
    ),
    # OPT flattens the batch between attention and MLP.
    "opt": lambda: (
        tf.OPTModel(
            tf.OPTConfig(
                vocab_size=99, hidden_size=32, num_hidden_layers=2, ffn_dim=48, max_position_embeddings=64,
                num_attention_heads=4, word_embed_proj_dim=32, **SPECIAL,
            )
        ), None,
    ),
    # Only its last layer adds a bias after the attention.
    "gpt_neox_japanese": lambda: (tf.GPTNeoXJapaneseModel(tf.GPTNeoXJapaneseConfig(**TEXT)), None),
    "lilt": lambda: (
        tf.LiltModel(tf.LiltConfig(**{**TEXT, "hidden_size": 48}, channel_shrink_ratio=4)),
        {"input_ids": TOKENS, "bbox": torch.zeros(1, 8, 4).long()},
    ),
    "deepseek_v4": lambda: (
        tf.DeepseekV4Model(
            tf.DeepseekV4Config(
                **{**TEXT, "num_hidden_layers": 2}, moe_intermediate_size=32, head_dim=16, q_lora_rank=16,
                num_experts_per_tok=2, n_routed_experts=4, o_lora_rank=16, o_groups=4,
                layer_types=["heavily_compressed_attention"] * 2, mlp_layer_types=["moe"] * 2, sliding_window=16,
                index_n_heads=4, index_head_dim=16, index_topk=4, partial_rotary_factor=0.5,
            )
        ), None,
    ),
}  # fmt: skip

EXPECTED = {
    "xlnet": {"self_attention": "rel_attn.dropout", "mlp": "ff.layer_2"},
    "xmod": {"self_attention": "attention.output.dropout", "mlp": "output.dense", "mlp_2": "output.dropout"},
    "albert": {"self_attention": "attention.output_dropout", "mlp": "ffn_output"},
    "pegasus_x": {"self_attention": "self_attn", "self_attention_2": "self_attn", "mlp": "fc2", "mlp_2": "fc2"},
    "mobilebert": {
        "self_attention": "attention.output.dense", "mlp": "ffn.0.output.dense", "mlp_2": "ffn.1.output.dense",
        "mlp_3": "ffn.2.output.dense", "mlp_4": "output.dense",
    },
    "timesformer": {"self_attention": "temporal_dense", "self_attention_2": "attention", "mlp": "output"},
    "gemma3n": {
        "mlp": "laurel", "self_attention": "post_attention_layernorm", "mlp_2": "post_feedforward_layernorm"
    },
    "ibert": {"self_attention": "attention.output.dropout", "mlp": "output.dropout"},
    "reformer": {"self_attention": "attention", "mlp": "feed_forward"},
    "rwkv": {"mixer": "attention", "mlp": "feed_forward"},
    "funnel": {"self_attention": "attention.hidden_dropout", "mlp": "ffn.dropout"},
    "opt": {"self_attention": "self_attn", "mlp": "fc2"},
    "gpt_neox_japanese": {"self_attention": "attention", "mlp": "mlp"},
    "lilt": {
        "self_attention": "attention.output.dropout", "self_attention_2": "attention.layout_output.dropout",
        "mlp": "output.dropout", "mlp_2": "layout_output.dropout",
    },
    "deepseek_v4": {"self_attention": "self_attn", "mlp": "mlp"},
    "idefics": {"cross_attention": "cross_attn", "mlp": "mlp"},
}  # fmt: skip
"""Hook places by role, in the layers of the stack below or else of the first stack."""

STACKS = {"idefics": "text0"}


@cache
def made(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    perturb(model)
    return model, inputs


@pytest.mark.parametrize("name", EXPECTED)
def test_every_layer_has_the_sublayers_of_its_source(name):
    model, inputs = made(name)
    sites = inarch.probe(model, example_inputs=inputs)
    stack = STACKS.get(name, sites.sites[0].stack)
    layers = {}
    for site in sites:
        if site.stack == stack:
            layers.setdefault(site.layer, {})[site.role] = site.output.path
    assert list(layers.values()) == [EXPECTED[name]] * len(layers)


@pytest.mark.parametrize("name", EXPECTED)
def test_adapters_start_at_the_base_model_and_learn_everywhere(name):
    """With new adapters at every site the output is the same; then every one of them has a gradient."""
    model, inputs = MODELS[name]()
    model.eval()
    perturb(model)
    inputs = inputs or synthesise(model)
    before = model(**inputs).last_hidden_state
    adapters = inarch.attach(model, example_inputs=inputs)
    adapters.add("a", "double_seq_bn[reduction_factor=4,init_weights=mam_adapter]")
    adapters.train("a")
    model.eval()
    if name == "reformer":  # it computes its own gradients, in training mode, and for inputs that have some
        model.enable_input_require_grads()
        without_dropout(model).train()
    after = model(**inputs).last_hidden_state
    assert torch.equal(after, before)
    after.square().sum().backward()
    silent = {slot.site.key for slot in slots(model) if not reached(slot)}
    assert silent == UNUSED.get(name, set())


UNUSED = {
    "pegasus_x": {"text0.1.self_attention_2", "text0.1.mlp_2"},
    "lilt": {"text0.1.self_attention_2", "text0.1.mlp_2"},
}
"""Sites of the last layer on a stream that is no part of the output: global tokens, the layout."""


def slots(model):
    return [
        module for module in model.modules() if isinstance(module, SiteSlot) and any(True for _ in module.parameters())
    ]


def reached(slot):
    up = slot.adapters.find("a").find("bottleneck").up.weight
    return up.grad is not None and bool(up.grad.abs().max() > 0)


def without_dropout(model):
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def test_the_bias_of_one_layer_makes_its_output_inexact():
    model, _ = made("gpt_neox_japanese")
    assert [site.exact for site in inarch.probe(model) if site.role == "self_attention"] == [True, False]


def test_reversible_layers_hand_their_sum_to_no_site():
    model, inputs = made("reformer")
    assert {site.handed_on for site in inarch.probe(model, example_inputs=inputs) if site.role != "mlp"} == {False}


def test_a_stream_of_many_rows_cannot_be_read():
    """Hyper-connections keep four streams where a branch has one."""
    model, _ = made("deepseek_v4")
    assert {(site.stream, site.same_layout) for site in inarch.probe(model)} == {(None, False)}
    adapters = inarch.attach(model)
    try:
        with pytest.raises(inarch.SiteError, match=r"got none at site `text0.0.mlp` \(`layers.0`\)\. Use `original_ln"):
            adapters.add("a", "par_bn")
    finally:
        adapters.detach()


def test_sublayers_whose_results_are_lost_are_named():
    """MRA's attention gives zeros where its CUDA kernel is missing."""
    model = tf.MraModel(tf.MraConfig(**TEXT))
    (refused,) = inarch.probe(model).refused
    assert refused == (
        "`encoder.layer.0`, `encoder.layer.1` (MraLayer): nothing uses the results of attention.self.query, "
        "attention.self.key, attention.self.value"
    )


class Replaced(GradientCheckpointingLayer):
    """Its attention takes the place of the stream, and it has nothing else."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


def test_a_tower_without_any_sum_is_named():
    """Beside a tower that adapts: never half of a model in silence."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = PlainTransformer(16, 1, 2)
            self.other = nn.ModuleList([Replaced(), Replaced()])

        def forward(self, x):
            y = x
            for layer in self.other:
                y = layer(y)
            return self.one(x) + y.mean()

    sites = inarch.probe(Towers(), example_inputs=torch.randn(1, 4, 16))
    assert {site.layer_path for site in sites} == {"one.blocks.0"}
    assert sites.refused == ("`other.0`, `other.1` (Replaced): an attention, and no sum that adds it to a stream",)


class Optional(nn.Module):
    """Two towers without anything in common, of which one runs where there is something for it."""

    def __init__(self):
        super().__init__()
        self.one = PlainTransformer(16, 1, 2)
        self.other = nn.ModuleList([Joined(lambda x, h, _: x + h), Joined(lambda x, h, _: x + h)])
        self.heads = nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 3)])

    def forward(self, x, y=None):
        for layer in self.other if y is not None else ():
            y = layer(y)
        return self.one(x) if y is None else self.one(x) + y.mean()


def test_a_tower_that_the_inputs_do_not_reach_is_named(caplog):
    left_alone = "`other` (2 of Joined): did not run in the probe; to adapt it, pass `example_inputs=` that reach it"
    model, x = Optional(), torch.randn(1, 4, 16)
    adapters = inarch.attach(model, example_inputs=x)
    assert adapters.sites.refused == (left_alone,)
    assert f"Parts of Optional get no adapters: {left_alone}. All are listed in" in caplog.text
    adapters.detach()
    caplog.clear()
    adapters = inarch.attach(model, example_inputs=(x, x))
    assert adapters.sites.refused == ()
    assert {site.layer_path for site in adapters.sites} == {"one.blocks.0", "other.0", "other.1"}
    assert not caplog.records


class TwoWay(GradientCheckpointingLayer):
    """Tokens look at an image, then the image looks at them; the tokens' sum is limited before its norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.to_image, self.to_tokens = nn.LayerNorm(16), attention(), attention()
        self.mlp, self.end = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16)), nn.LayerNorm(16)

    def forward(self, tokens, image):
        tokens = self.norm(tokens + self.to_image(tokens, image, image)[0])
        tokens = self.end((tokens + self.mlp(tokens)).clamp(-9.0, 9.0))
        return tokens, image + self.to_tokens(image, tokens, tokens)[0]


def attention():
    return nn.MultiheadAttention(16, 2, batch_first=True)


class TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.last = nn.ModuleList([TwoWay(), TwoWay()]), attention()

    def forward(self, tokens, image):
        for layer in self.layers:
            tokens, image = layer(tokens, image)
        return tokens + self.last(tokens, image, image)[0], image


def test_two_streams_that_look_at_each_other_both_have_their_sites():
    """And the attention after the layers, which is in none, is named."""
    inputs = torch.randn(1, 3, 16), torch.randn(1, 4, 16)
    model = TwoWays()
    sites = inarch.probe(model, example_inputs=inputs)
    assert [(site.layer_path, site.output.path) for site in sites] == [
        (f"layers.{layer}", path) for layer in (0, 1) for path in ("to_image", "mlp", "to_tokens")
    ]
    assert sites.refused == ("`` (TwoWays): a sum outside of the lists of layers",)
    before = model(*inputs)
    adapters = inarch.attach(model, example_inputs=inputs)
    adapters.add("a", "lora")
    adapters.train("a", head=False)
    assert all(torch.equal(left, right) for left, right in zip(before, model(*inputs), strict=True))


class Gateway(nn.Module):
    """Weighs a stream and a branch against each other, feature by feature, as detectors do."""

    def __init__(self, width):
        super().__init__()
        self.gate, self.norm = nn.Linear(2 * width, 2 * width), nn.LayerNorm(width)

    def forward(self, x, h):
        first, second = torch.sigmoid(self.gate(torch.cat([x, h], dim=-1))).chunk(2, dim=-1)
        return self.norm(first * x + second * h)


class Weighing(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.attn, self.gateway = nn.MultiheadAttention(width, 2, batch_first=True), Gateway(width)
        self.mlp, self.norm = mlp(width), nn.LayerNorm(width)

    def forward(self, x):
        x = self.gateway(x, self.attn(x, x, x, need_weights=False)[0])
        return self.norm(x + self.mlp(x))


class Seasonal(nn.Module):
    """Goes on without the moving average of its sum, as models of time series do."""

    def __init__(self, width=16):
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(width, 2, batch_first=True), mlp(width)
        self.norm, self.pool = nn.LayerNorm(width), nn.AvgPool1d(3, stride=1, padding=1)

    def seasonal(self, x):
        return x - self.pool(x.transpose(1, 2)).transpose(1, 2)

    def forward(self, x):
        x = self.seasonal(x + self.attn(x, x, x, need_weights=False)[0])
        return self.norm(self.seasonal(x + self.mlp(x)))


class Routed(nn.Module):
    """Its router adds what it sees to what the routers before it saw."""

    def __init__(self, width=16):
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(width, 2, batch_first=True), mlp(width)
        self.norm = nn.LayerNorm(width)
        self.down, self.choose = nn.Linear(width, 4), nn.Linear(4, 1)

    def forward(self, x, seen=None):
        x = x + self.attn(x, x, x, need_weights=False)[0]
        normed = self.norm(x)
        seen = self.down(normed) if seen is None else self.down(normed) + seen * 0.5
        return x + self.mlp(normed) * torch.sigmoid(self.choose(torch.relu(seen))), seen


def mlp(width):
    return nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))


class Layers(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer(), layer()])

    def forward(self, x):
        state = (x,)
        for layer in self.layers:
            state = layer(*state)
            state = state if isinstance(state, tuple) else (state,)
        return state


@pytest.mark.parametrize("layer", [Weighing, Seasonal, Routed])
def test_a_layer_has_its_two_sublayers_and_nothing_else(layer):
    """A sum that is weighed, one that goes on without its average, and one inside a router, which is no sublayer's."""
    x = torch.randn(2, 9, 16)
    model = Layers(layer).requires_grad_(False)  # torch rounds otherwise with weights that require gradients
    sites = inarch.probe(model, example_inputs=x)
    assert [(site.layer_path, site.output.path) for site in sites] == [
        (f"layers.{number}", path) for number in range(3) for path in ("attn", "mlp")
    ]
    assert sites.refused == ()
    before = model(x)
    adapters = inarch.attach(model, example_inputs=x)
    adapters.add("a", "double_seq_bn[init_weights=mam_adapter,reduction_factor=8]")
    adapters.train("a", head=False)
    assert all(torch.equal(left, right) for left, right in zip(before, model(x), strict=True))


class Joined(nn.Module):
    """Adds its attention by a sum, and its MLP by whatever it is given."""

    def __init__(self, join, width=16):
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(width, 2, batch_first=True), mlp(width)
        self.gamma, self.join = nn.Parameter(torch.full((width,), 0.5)), join

    def forward(self, x):
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.join(x, self.mlp(x), self.gamma)


@pytest.mark.parametrize(
    "join",
    [lambda x, h, scale: torch.addcmul(x, scale, h), lambda x, h, scale: torch.addcmul(x, h, scale, value=0.5)],
)
def test_a_scale_and_a_sum_in_one_operator_are_a_scaled_branch(join):
    sites = inarch.probe(Layers(lambda: Joined(join)), example_inputs=torch.randn(2, 9, 16))
    assert [(site.role, site.output.path, site.exact) for site in sites] == [
        ("self_attention", "attn", True),
        ("mlp", "mlp", False),
    ] * 3


@pytest.mark.parametrize(
    ("join", "name"),
    [
        (lambda x, h, _: torch.lerp(x, h, 0.5), "lerp"),
        (lambda x, h, _: x - h, "sub"),
        (lambda x, h, _: torch.stack((x, h)).sum(0), "sum"),
        (torch.addcdiv, "addcdiv"),
    ],
)
def test_a_branch_that_is_joined_by_no_sum_is_named(join, name):
    """Without it the layers would have half of their sites."""
    with pytest.raises(ProbeError, match=f"adds what it computes to its stream; got `{name}` in .*`layers.0` .Joined"):
        inarch.probe(Layers(lambda: Joined(join)), example_inputs=torch.randn(2, 9, 16))


def test_a_weighed_sum_is_not_exact():
    """What an adapter gives back is scaled: wirings that count on `x + h` are refused."""
    sites = inarch.probe(Layers(Weighing), example_inputs=torch.randn(2, 9, 16))
    assert {(site.kind, site.exact) for site in sites} == {("self_attention", False), ("mlp", True)}


def test_the_mlp_before_a_stage_change_has_its_site():
    """LeViT narrows its stream by an attention inside of the stage: all of a stage's sublayers before it are sites."""
    config = tf.LevitConfig(
        image_size=128, hidden_sizes=[16, 32, 48], depths=[1, 1, 1], key_dim=[8, 8, 8], num_attention_heads=[2, 2, 2],
        down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
    )  # fmt: skip
    sites = inarch.probe(tf.LevitModel(config))
    assert [site.output.path for site in sites if site.layer < 2] == [f"layers.{n}.module" for n in (0, 1, 3)] * 2


def test_a_video_is_as_large_as_its_crop():
    """A configuration that has no image size but crops its frames to one."""
    config = tf.VJEPA2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, crop_size=32, frames_per_clip=4,
        pred_hidden_size=32, pred_num_attention_heads=2, pred_num_hidden_layers=1,
    )  # fmt: skip
    assert synthesise(tf.VJEPA2Model(config))["pixel_values_videos"].shape == (1, 4, 3, 32, 32)


def test_a_number_that_a_forward_makes_a_tensor_of_is_known_without_weights():
    class Merging(Layers):
        def forward(self, x):
            (side,) = torch.tensor([3], device=x.device).expand(1).tolist()
            return super().forward(x.reshape(-1, 3 * side, 16))

    sites = inarch.probe(Merging(Seasonal), example_inputs=torch.randn(2, 9, 16))
    assert (len(sites), sites.source) == (6, "meta")


class Remembering(nn.Module):
    """An attention beside a convolution of its values, as Fun-ASR's."""

    def __init__(self, narrow, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(narrow, width) for _ in range(3))
        self.o, self.conv = nn.Linear(width, width), nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.softmax(q @ k.mT, -1) @ v) + self.conv(v.mT).mT


class Widening(nn.Module):
    """A layer with a skip over its attention where the width stays."""

    def __init__(self, narrow, width=16):
        super().__init__()
        self.attn, self.mlp, self.keeps = Remembering(narrow, width), mlp(width), narrow == width

    def forward(self, x):
        x = x + self.attn(x) if self.keeps else self.attn(x)
        return x + self.mlp(x)


def test_an_attention_beside_a_convolution_of_its_values_is_one_branch():
    """Where a layer changes the width, nothing is added to the stream, so the sum of the two is none of its sites."""
    model = Layers(lambda: Widening(16))
    model.layers.insert(0, Widening(8))
    sites = inarch.probe(model, example_inputs=torch.randn(2, 9, 8))
    assert [site.role for site in sites] == ["mlp", *["self_attention", "mlp"] * 3]
    assert sites.refused == ("`layers.0` (Widening): an attention whose result is not added to the stream it looks at",)
