"""Features are adapted where they are the last dimension of a sum, and nowhere else."""

import pytest
import torch
from torch import nn

import inarch
from inarch.sites import ProbeError

WIDTH = 12


class Body(nn.Module):
    """A stem on pictures, then three blocks in a list."""

    def __init__(self, block, *, last=False):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.last = last
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, image):
        x = self.stem(image)
        x = x.permute(0, 2, 3, 1) if self.last else x
        for block in self.blocks:
            x = block(x)
        return x


class PoolMixer(nn.Module):
    """PoolFormer's block: a pooling without weights, and an MLP of 1x1 convolutions, on (B, C, H, W)."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(nn.Conv2d(WIDTH, 24, 1), nn.GELU(), nn.Conv2d(24, WIDTH, 1))

    def forward(self, x):
        x = x + self.pool(x)
        return x + self.mlp(x)


class DualPath(nn.Module):
    """Adds a slice of the features that a convolution makes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH + 5, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)[:, :WIDTH]


class ConvNeXt(nn.Module):
    """A depthwise convolution, then a norm and an MLP on the last dimension, and back."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.LayerNorm(WIDTH)
        self.mlp, self.drop = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)), nn.Identity()

    def forward(self, x):
        h = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + self.drop(h)


class ChannelsLastConvolution(nn.Module):
    """Runs on (B, H, W, C), and turns to a convolution inside the branch."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.drop = nn.Identity()

    def forward(self, x):
        h = self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop(h)


class SpatialGate(nn.Module):
    """Multiplies a map by one that is made at a quarter of its size: what its features are is hard to tell."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.drop = nn.Identity()

    def forward(self, x):
        batch, channels, height, width = x.shape
        h = self.gate(x.reshape(batch, channels * height * width // 4, 4)).reshape(x.shape)
        return x + self.drop(h)


@pytest.mark.parametrize("block", [PoolMixer, DualPath, ConvNeXt])
@pytest.mark.parametrize("size", [8, 4 * WIDTH], ids=["wide", "square"])
def test_feature_maps_are_refused_by_name_however_they_are_made(block, size):
    """Also where the width of the picture is the number of channels, and the last dimension would fit."""
    with pytest.raises(ProbeError, match=rf"`blocks.0` \({block.__name__}\): a sum of feature maps"):
        inarch.probe(Body(block), example_inputs=torch.randn(1, 3, size, size))


def test_a_map_whose_features_cannot_be_told_is_refused():
    with pytest.raises(ProbeError, match=r"`blocks.2` \(SpatialGate\): a sum of feature maps"):
        inarch.probe(Body(SpatialGate), example_inputs=torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("size", [8, 4 * WIDTH], ids=["wide", "square"])
def test_maps_with_their_features_last_are_adapted(size):
    model = Body(ChannelsLastConvolution, last=True)
    image = torch.randn(2, 3, size, size)
    adapters = inarch.attach(model, example_inputs=image)
    assert [(site.role, site.width, site.arrangement) for site in adapters.sites] == [("mixer", WIDTH, "pre")] * 3
    adapters.add("a", "seq_bn[mh_adapter=True,output_adapter=False]")
    adapters.train("a")
    model(image).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters["a"].values())


class TokenMLP(nn.Module):
    """Mixes tokens by an MLP across them."""

    def __init__(self, tokens):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(tokens, 24), nn.GELU(), nn.Linear(24, tokens))

    def forward(self, x):
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class MixerBlock(nn.Module):
    def __init__(self, tokens=9):
        super().__init__()
        self.norm1, self.tokens, self.drop1 = nn.LayerNorm(WIDTH), TokenMLP(tokens), nn.Identity()
        self.norm2, self.drop2 = nn.LayerNorm(WIDTH), nn.Identity()
        self.channels = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x):
        x = x + self.drop1(self.tokens(self.norm1(x)))
        return x + self.drop2(self.channels(self.norm2(x)))


@pytest.mark.parametrize("tokens", [9, WIDTH], ids=["wide", "square"])
def test_an_mlp_across_tokens_is_a_mixer_on_the_features_of_its_norm(tokens):
    model = nn.Sequential(*(MixerBlock(tokens) for _ in range(2)))
    sites = inarch.probe(model, example_inputs=torch.randn(2, tokens, WIDTH))
    assert [(site.role, site.width, sorted(site.projections)) for site in sites] == [
        ("mixer", WIDTH, []), ("mlp", WIDTH, ["down", "up"]),
    ] * 2  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.rnn, self.out = nn.LayerNorm(WIDTH), nn.LSTM(WIDTH, 7, batch_first=True), nn.Linear(7, WIDTH)

    def forward(self, x):
        return x + self.out(self.rnn(self.norm(x))[0])


def test_a_recurrent_branch_is_a_mixer():
    model = nn.Sequential(Recurrent(), Recurrent())
    assert {site.kind for site in inarch.probe(model, example_inputs=torch.randn(2, 5, WIDTH))} == {"mixer"}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class ConvolutionBetween(nn.Module):
    """TinyViT's block: between the two branches the stream itself passes a convolution."""

    def __init__(self):
        super().__init__()
        self.attn, self.conv = Attention(), nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        x = x + self.attn(x)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_an_attention_before_a_convolution_of_the_stream_is_a_site():
    sites = inarch.probe(
        nn.Sequential(*(ConvolutionBetween() for _ in range(2))), example_inputs=torch.randn(2, 5, WIDTH)
    )
    assert [site.key for site in sites] == [f"data0.{n}.{role}" for n in range(2) for role in ("self_attention", "mlp")]
    assert {site.output.path for site in sites} == {"attn", "down"}


def test_equal_lists_of_sibling_stages_are_one_stack():
    """However many classes of blocks a stage alternates."""
    model = nn.Sequential(*(nn.Sequential(MixerBlock(5), ConvolutionBetween()) for _ in range(3)))
    assert inarch.probe(model, example_inputs=torch.randn(2, 5, WIDTH)).num_layers == {"data0": 6}


class Outside(nn.Module):
    """A residual branch before the list of layers, as LeViT's downsampling has it."""

    def __init__(self):
        super().__init__()
        self.first = MixerBlock(5)
        self.blocks = nn.ModuleList(ConvolutionBetween() for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_branch_outside_of_the_lists_of_layers_is_named():
    sites = inarch.probe(Outside(), example_inputs=torch.randn(2, 5, WIDTH))
    assert {site.layer_path for site in sites} == {"blocks.0", "blocks.1"}
    assert sites.refused == ("`first` (MixerBlock): a sum outside of the lists of layers",)
