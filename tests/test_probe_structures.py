"""How layers hang together: lists of lists, a module for two sums, keys from pooled tokens, streams side by side."""

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import inarch
from inarch.sites import ProbeError

WIDTH = 8


def attention():
    return nn.MultiheadAttention(WIDTH, 2, batch_first=True)


def starts_at_the_base(model, inputs, adapter):
    """An adapter of zeros leaves the output as it was; with other weights each of its tensors matters."""
    before = model(*inputs)
    adapters = inarch.attach(model, example_inputs=inputs)
    adapters.add("a", adapter)
    adapters.train("a", head=False)
    assert torch.equal(before, model(*inputs))
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.add_(torch.randn_like(parameter))
    model(*inputs).square().sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in adapters["a"].values())


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x))))


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in "qkv")
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, other=None):
        x = self.norm(x)
        other = x if other is None else other
        return self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(other), self.v(other)))


class Resampler(nn.Module):
    """Layers that are no module: pairs in a list; a projection follows the last sum in the same forward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([SelfAttention(), MLP()]) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for attend, mlp in self.layers:
            x = attend(x) + x
            x = mlp(x) + x
        return self.out(x)


def test_the_last_layer_of_pairs_in_a_list_has_all_its_sites():
    """And each layer's maps are its own: that its sibling is no module which is called does not make it an expert."""
    model = Resampler()
    sites = inarch.probe(model, example_inputs=torch.randn(2, 5, WIDTH))
    assert [(site.key, site.output.path) for site in sites] == [
        (f"data0.{n}.{role}", f"layers.{n}.{m}") for n in range(3) for m, role in enumerate(("self_attention", "mlp"))
    ]
    assert {part.path for part in sites["data0.1.mlp"].projections["up"]} == {"layers.1.1.up"}
    assert {part.path for part in sites["data0.2.self_attention"].projections["q"]} == {"layers.2.0.q"}
    starts_at_the_base(model, (torch.randn(2, 5, WIDTH),), "double_seq_bn[init_weights=mam_adapter]")


class Quantisers(nn.Module):
    """Each codes what those before it have left; their results are added up."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(MLP() for _ in range(4))

    def forward(self, x):
        total = 0.0
        for part in self.parts:
            coded = part(x)
            x, total = x - coded, total + coded
        return total


def test_a_sum_of_what_all_parts_of_a_list_give_is_no_site():
    model = Quantisers()
    with pytest.raises(ProbeError, match="A model has residual branches"):
        inarch.probe(model, example_inputs=torch.randn(2, 5, WIDTH))


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, h, x):
        return self.norm(self.dense(h) + x)


class Exchange(nn.Module):
    """Two streams look at each other through one attention, which is the first thing that the layer calls."""

    def __init__(self):
        super().__init__()
        self.attend, self.output = SelfAttention(), Output()
        self.left, self.right, self.left_out, self.right_out = MLP(), MLP(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, left, right):
        new_left = self.output(self.attend(left, right), left)
        new_right = self.output(self.attend(right, left), right)
        return self.left_out(new_left + self.left(new_left)), self.right_out(new_right + self.right(new_right))


class CheckpointedExchange(Exchange, GradientCheckpointingLayer):
    """The same layer where its own hooks would not run again."""


class Exchanges(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, left, right):
        for layer in self.layers:
            left, right = layer(left, right)
        return torch.cat([left, right], dim=1)


def test_a_module_for_two_sums_is_told_by_its_calls_since_the_layer_began():
    model, inputs = Exchanges(Exchange), (torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH))
    sites = [site for site in inarch.probe(model, example_inputs=inputs) if site.layer == 0]
    assert [(site.role, site.output.path, site.output.call, site.output.since) for site in sites] == [
        ("cross_attention", "output.dense", 1, ""),
        ("cross_attention_2", "output.dense", 2, ""),
        ("mlp", "left", 0, None),
        ("mlp_2", "right", 0, None),
    ]
    starts_at_the_base(
        model, inputs, "double_seq_bn[init_weights=mam_adapter,mh_adapter=False,cross_adapter=True,ln_before=True]"
    )


def test_maps_that_two_sites_share_are_adapted_once():
    model, inputs = Exchanges(Exchange), (torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH))
    first, second, *_ = inarch.probe(model, example_inputs=inputs)
    assert sorted(first.projections) == ["k", "o", "q", "v"]
    assert second.projections == {}
    assert second.notes == ("shares linear maps with cross_attention, where they are adapted",)


def test_a_checkpointed_layer_that_begins_with_a_shared_module_is_refused():
    inputs = torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH)
    with pytest.raises(ProbeError, match=r"got none for cross_attention of `layers.0` \(CheckpointedExchange\)"):
        inarch.probe(Exchanges(CheckpointedExchange), example_inputs=inputs)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.mlp = SelfAttention(), MLP()

    def forward(self, x):
        x = x + self.attend(x)
        return x + self.mlp(x)


class Look(nn.Module):
    """A cross-attention with its own skip."""

    def __init__(self):
        super().__init__()
        self.attend = SelfAttention()

    def forward(self, x, other):
        return x + self.attend(x, other)


class Pooled(nn.Module):
    """Tokens look at what other layers made of them, two to one."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (nn.ModuleList([Block(), Block()]) for _ in range(3))
        self.looks = nn.ModuleList([Look(), Look()])

    def forward(self, x):
        for block in self.first:
            x = block(x)
        pooled = x.unflatten(1, (-1, 2)).mean(2)
        for block in self.middle:
            pooled = block(pooled)
        for look, block in zip(self.looks, self.last, strict=True):
            x = block(look(x, pooled))
        return x


def test_an_attention_is_no_skip_over_the_layers_that_made_its_keys():
    model, inputs = Pooled(), (torch.randn(2, 6, WIDTH),)
    sites = inarch.probe(model, example_inputs=inputs)
    found = {}
    for site in sites:
        found.setdefault(site.layer_path, []).append(site.role)
    blocks = {f"{name}.{n}": ["self_attention", "mlp"] for name in ("first", "middle", "last") for n in (0, 1)}
    assert found == blocks | {"looks.0": ["cross_attention"], "looks.1": ["cross_attention"]}
    assert sites.refused == ()


class Streams(nn.Module):
    """Three streams side by side: each is given what one branch makes of their mean, by a gate of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(3 * WIDTH), nn.Linear(3 * WIDTH, 3)
        self.attend, self.mlp, self.mlp_gate = SelfAttention(), MLP(), nn.Linear(3 * WIDTH, 3)

    def forward(self, x):
        for branch, gate in ((self.attend, self.gate), (self.mlp, self.mlp_gate)):
            gates = torch.sigmoid(gate(self.norm(x)))
            h = branch(x.unflatten(-1, (3, WIDTH)).mean(-2))
            x = x + (h.unsqueeze(-2) * gates.unsqueeze(-1)).flatten(-2)
        return x


def test_streams_side_by_side_have_sites_of_the_width_of_one():
    model, inputs = nn.Sequential(Streams(), Streams()), (torch.randn(2, 5, 3 * WIDTH),)
    sites = inarch.probe(model, example_inputs=inputs)
    assert [(site.role, site.width, site.output.path, site.same_layout, site.arrangement) for site in sites] == [
        ("self_attention", WIDTH, "attend", False, "none"), ("mlp", WIDTH, "mlp", False, "none")
    ] * 2  # fmt: skip
    assert sites["data0.1.mlp"].projections["down"][0].path == "mlp.down"
    starts_at_the_base(model, inputs, "double_seq_bn[init_weights=mam_adapter,reduction_factor=2]|lora[r=2]")


class Bottleneck(nn.Module):
    """A block of a residual network: a rectifier takes up its sum, so the next one goes on from another tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class PoolingHead(nn.Module):
    """One row looks at all tokens, and goes through an MLP of its own."""

    def __init__(self):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.attention, self.mlp = attention(), MLP()

    def forward(self, x):
        pooled = self.attention(self.probe.expand(len(x), -1, -1), x, x)[0]
        return (pooled + self.mlp(pooled))[:, 0]


class Detector(nn.Module):
    """A backbone of convolutions, layers, and a head around them."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Bottleneck(), Bottleneck())
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = PoolingHead()

    def forward(self, pixels):
        x = self.backbone(pixels).flatten(2).mT
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_sums_before_and_behind_the_layers_are_named():
    sites = inarch.probe(Detector().eval(), example_inputs=torch.randn(2, WIDTH, 4, 4))
    assert [site.key.partition(".")[2] for site in sites] == ["0.self_attention", "0.mlp", "1.self_attention", "1.mlp"]
    assert sites.refused == (
        "`head` (PoolingHead): a sum outside of the lists of layers",
        "`backbone.0`, `backbone.1` (Bottleneck): a sum that convolutions make, from which no later branch starts",
    )


class Sized(nn.Module):
    """Patches with positions that are computed from how many rows and columns an image has."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, pixel_values, spatial_shapes):
        x = pixel_values + spatial_shapes.float().sum(-1)[:, None, None]
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_shapes_of_images_are_no_text():
    inputs = {"pixel_values": torch.randn(2, 6, WIDTH), "spatial_shapes": torch.tensor([[2, 3], [3, 2]])}
    assert set(inarch.probe(Sized().eval(), example_inputs=inputs).num_layers) == {"image0"}


class Windowed(nn.Module):
    """Attends within windows of four tokens, and puts them together again."""

    def __init__(self):
        super().__init__()
        self.norm, self.attend, self.mlp = nn.LayerNorm(WIDTH), SelfAttention(), MLP()

    def forward(self, x):
        h = self.attend(self.norm(x).unflatten(1, (-1, 4)).flatten(0, 1))
        x = x + h.unflatten(0, (len(x), -1)).flatten(1, 2)
        return x + self.mlp(x)


def test_what_reads_the_stream_is_refused_where_a_branch_is_in_windows():
    model, inputs = nn.Sequential(Windowed(), Windowed()), torch.randn(2, 16, WIDTH)
    adapters = inarch.attach(model, example_inputs=inputs)
    assert [site.same_layout for site in adapters.sites] == [False, True] * 2
    with pytest.raises(
        inarch.SiteError,
        match=r"got another layout at site `data0\.0\.self_attention` \(`0`\)\. Use `original_ln_before=F",
    ):
        adapters.add("a", "par_bn[mh_adapter=True]")
    assert adapters.names == ()
    starts_at_the_base(model, (inputs,), "double_seq_bn[original_ln_before=False,init_weights=mam_adapter]")
