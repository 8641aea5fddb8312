"""Features are adapted where they are: in the last dimension of a sum, or in the second of feature maps."""

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


class ConvNeXtWithoutDrop(ConvNeXt):
    """The module whose result is nearest to the sum has its features last."""

    def forward(self, x):
        return x + self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class MapNorm(nn.LayerNorm):
    """A layer norm of the channels of a map."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class WrappedNorm(nn.Module):
    """The same by a module that is given the channels last."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PostNorm(nn.Module):
    def __init__(self, norm=MapNorm):
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(WIDTH, 24, 1), nn.GELU(), nn.Conv2d(24, WIDTH, 1))
        self.norm = norm(WIDTH)

    def forward(self, x):
        return self.norm(x + self.mlp(x))


class ConvolvedBetween(nn.Module):
    """Two sums with a convolution of the stream between them, which no later sum starts from."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH) for _ in range(2))
        self.one, self.two = (nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.GELU()) for _ in range(2))

    def forward(self, x):
        x = self.conv1(x)
        x = x + self.one(x)
        x = self.conv2(x)
        return x + self.two(x)


class LinearAttention(nn.Module):
    """MobileViTV2's: places meet in a weighted sum of them all."""

    def __init__(self):
        super().__init__()
        self.maps, self.out = nn.Conv2d(WIDTH, 1 + WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        score, value = self.maps(x).split([1, WIDTH], dim=1)
        context = (score.flatten(2).softmax(-1).view_as(score) * value).sum((2, 3), keepdim=True)
        return x + self.out(value * context)


SIZES = pytest.mark.parametrize("size", [8, 4 * WIDTH], ids=["wide", "square"])
"""Of the picture; also where the width of a map is the number of its channels, and the last dimension would fit."""


@SIZES
@pytest.mark.parametrize(
    ("block", "roles", "dim"),
    [
        (PoolMixer, ["mixer", "mlp"], 1),
        (ConvNeXt, ["mixer"], 1),
        (ConvNeXtWithoutDrop, ["mixer"], -1),
        (PostNorm, ["mlp"], 1),
        (LinearAttention, ["mixer"], 1),
    ],
)
def test_feature_maps_have_sites_where_their_channels_are_certain(block, roles, dim, size):
    sites = inarch.probe(Body(block), example_inputs=torch.randn(1, 3, size, size))
    assert [(site.role, site.width, site.feature_dim) for site in sites] == [(r, WIDTH, dim) for r in roles] * 3
    assert inarch.probe(Body(block), layout=sites.to_dict()).sites == sites.sites


@SIZES
@pytest.mark.parametrize("block", [DualPath, ConvolvedBetween])
def test_maps_that_convolutions_make_are_refused_by_name(block, size):
    with pytest.raises(ProbeError, match=rf"`blocks.0` \({block.__name__}\): a sum of feature maps"):
        inarch.probe(Body(block), example_inputs=torch.randn(1, 3, size, size))


def adapter_of(adapters, key):
    """A(z) of a site, on (B, C, H, W), from the adapter's weights."""
    found = {name.removeprefix(f"{key}.bottleneck."): p for name, p in adapters["a"].items() if name.startswith(key)}

    def branch(z):
        z = torch.einsum("bchw,dc->bdhw", z, found["down.weight"]) + found["down.bias"][:, None, None]
        return torch.einsum("bdhw,cd->bchw", z.relu(), found["up.weight"]) + found["up.bias"][:, None, None]

    return branch


@SIZES
@pytest.mark.parametrize("preset", ["seq_bn", "par_bn[scaling=1.0]", "bottleneck"])
def test_an_adapter_on_maps_acts_on_every_place_by_itself(size, preset):
    """The pre-norm formula: A reads the sum, the stream or the branch."""
    model, image = Body(PoolMixer).double(), torch.randn(2, 3, size, size).double()
    adapters = inarch.attach(model, example_inputs=image)
    adapters.add("a", preset)
    adapters.activate("a")
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.normal_()
    x = model.stem(image)
    for number, block in enumerate(model.blocks):
        a = adapter_of(adapters, f"image0.{number}.mlp")
        x = x + block.pool(x)
        h = torch.nn.Sequential.forward(block.mlp, x)
        x = x + h + a({"seq_bn": x + h, "bottleneck": h}.get(preset, x))
    torch.testing.assert_close(model(image), x, rtol=1e-10, atol=1e-10)


@SIZES
@pytest.mark.parametrize("norm", [MapNorm, WrappedNorm])
def test_an_adapter_before_the_norm_of_maps_is_given_that_norm(norm, size):
    """The post-norm formula, y = LN(x + h + A(LN(x + h))); without the inner norm where that takes another layout."""
    model, image = Body(lambda: PostNorm(norm)).double(), torch.randn(2, 3, size, size).double()
    adapters = inarch.attach(model, example_inputs=image)
    adapters.add("a", "seq_bn")
    adapters.activate("a")
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.normal_()
    x = model.stem(image)
    for number, block in enumerate(model.blocks):
        h = torch.nn.Sequential.forward(block.mlp, x)
        z = block.norm(x + h) if norm is MapNorm else x + h
        x = block.norm(x + h + adapter_of(adapters, f"image0.{number}.mlp")(z))
    torch.testing.assert_close(model(image), x, rtol=1e-10, atol=1e-10)


def test_a_layout_says_where_the_features_are_in_two_ways_only():
    layout = inarch.probe(Body(PostNorm), example_inputs=torch.randn(1, 3, 8, 8)).to_dict()
    layout["sites"][0]["feature_dim"] = 2
    with pytest.raises(inarch.SiteError, match="`feature_dim` must be -1 or 1; got 2"):
        inarch.probe(Body(PostNorm), layout=layout)


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
