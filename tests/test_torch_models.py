"""torch's own Transformer: both arrangements, both layouts, with and without its fused inference."""

import copy

import pytest
import torch
from torch import nn

import inarch
from inarch.core.errors import SiteError

WIDTH, HEADS, INNER = 16, 2, 24
LAYOUTS = [(norm_first, batch_first) for norm_first in (False, True) for batch_first in (False, True)]
EVERYTHING = "double_seq_bn[original_ln_before=True]|lora[attn_matrices=[q,k,v,o],init_weights=bert,output_lora=True]"


def encoder(*, norm_first=False, batch_first=True):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0, norm_first=norm_first, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first).eval()


def decoder(*, norm_first=False, batch_first=True):
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, INNER, 0.0, norm_first=norm_first, batch_first=batch_first)
    return nn.TransformerDecoder(layer, 2).eval()


def streams(count, *, batch_first):
    """`count` streams of 3 samples, of lengths 5, 6, ..."""
    found = [torch.randn(3, 5 + number, WIDTH) for number in range(count)]
    return tuple(x if batch_first else x.transpose(0, 1) for x in found)


def awake(adapters, name):
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters[name].values():
        nn.init.normal_(parameter, std=0.3, generator=generator)


@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize(("norm_first", "batch_first"), LAYOUTS)
def test_the_whole_way_on_torch_layers(make, norm_first, batch_first, tmp_path):
    """Sites, an adapter at every place, gradients, saving, loading, detaching."""
    model = make(norm_first=norm_first, batch_first=batch_first)
    args = streams(1 if make is encoder else 2, batch_first=batch_first)
    with torch.no_grad():
        base = model(*args)
    adapters = inarch.attach(model, example_inputs=args)
    roles = ["self_attention", "mlp"] if make is encoder else ["self_attention", "cross_attention", "mlp"]
    assert [site.role for site in adapters.sites] == roles * 2
    assert {site.arrangement for site in adapters.sites} == {"pre" if norm_first else "post"}
    assert {site.batch_dim for site in adapters.sites} == {0 if batch_first else 1}
    config = EVERYTHING if make is encoder else EVERYTHING.replace("[orig", "[cross_adapter=True,orig")
    adapters.add("a", config)
    adapters.train("a")
    awake(adapters, "a")
    found = model(*args)
    assert not torch.allclose(found, base, atol=1e-3)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters["a"].values())
    own = {id(p) for p in adapters["a"].values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    with torch.no_grad():
        expected = model(*args)
    assert torch.allclose(expected, found, atol=1e-5)
    adapters.save("a", tmp_path / "a")
    adapters.detach()
    with torch.no_grad():
        assert torch.equal(model(*args), base)
        again = inarch.attach(model, example_inputs=args)
        again.load(tmp_path / "a")
        again.activate("a")
        assert torch.allclose(model(*args), expected, atol=1e-6)  # equal but for where the new weights lie in memory


def calls_of_fused_inference(run):
    """How often torch's fused kernel of an encoder layer runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if "_transformer_encoder_layer_fwd" in event.key)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_fused_inference_is_left_while_adapters_are_active_and_only_then():
    """The fused kernel calls no module; an encoder with a padding mask makes nested tensors besides."""
    model = encoder()
    (x,) = streams(1, batch_first=True)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])

    def run(model=model):
        with torch.no_grad():
            return model(x, src_key_padding_mask=padding)

    base = run()
    assert calls_of_fused_inference(run) == 2
    adapters = inarch.attach(model, example_inputs={"src": x, "src_key_padding_mask": padding})
    assert torch.backends.mha.get_fastpath_enabled()
    assert calls_of_fused_inference(run) == 2
    adapters.add("a", EVERYTHING)
    adapters.train("a")
    awake(adapters, "a")
    assert calls_of_fused_inference(run) == 0
    adapted = run()
    slow = model(x, src_key_padding_mask=padding)  # training's own path
    assert torch.allclose(adapted[~padding], slow[~padding], atol=1e-5)
    assert not torch.allclose(adapted[~padding], base[~padding], atol=1e-2)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), adapted)
    inarch.attach(twin).deactivate()
    assert torch.equal(run(twin), base)
    assert torch.equal(run(), adapted)
    adapters.detach()
    assert torch.equal(run(), base)
    assert calls_of_fused_inference(run) == 2


def test_an_encoder_that_never_nests_is_not_made_to():
    model = encoder(norm_first=True)
    (x,) = streams(1, batch_first=True)
    adapters = inarch.attach(model, example_inputs=x)
    adapters.add("a")
    adapters.activate("a")
    adapters.detach()
    assert model.use_nested_tensor is False


def test_an_adapter_in_one_layer_leaves_the_others_fused():
    model = encoder()
    (x,) = streams(1, batch_first=True)
    adapters = inarch.attach(model, example_inputs=x)
    adapters.add("a", "seq_bn[leave_out=[0]]")
    adapters.activate("a")

    def run():
        with torch.no_grad():
            model(x)

    assert calls_of_fused_inference(run) == 1


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_whole_transformer_takes_sources_and_targets():
    model = nn.Transformer(WIDTH, HEADS, 1, 1, INNER, 0.0).eval()
    args = streams(2, batch_first=False)
    adapters = inarch.attach(model, example_inputs=args)
    assert [(site.key, site.batch_dim) for site in adapters.sites] == [
        ("data0.0.self_attention", 1), ("data0.0.mlp", 1),
        ("data1.0.self_attention", 1), ("data1.0.cross_attention", 1), ("data1.0.mlp", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "config", ["seq_bn[use_gating=True]", "lora[use_gating=True,selfattn_lora=False,output_lora=True]"]
)
def test_a_gate_is_of_one_sample_in_either_layout(batch_first, config):
    """The adapted output of a sample does not depend on the others in its batch."""
    model = encoder(batch_first=batch_first)
    args = streams(1, batch_first=batch_first)
    adapters = inarch.attach(model, example_inputs=args)
    adapters.add("a", config)
    adapters.activate("a")
    awake(adapters, "a")
    dim = 0 if batch_first else 1
    alone = torch.cat([model(part) for part in args[0].split(1, dim)], dim)
    assert torch.allclose(model(*args), alone, atol=1e-5)


def test_stochastic_depth_drops_samples_of_a_sequence_first_stream():
    model = encoder(batch_first=False)
    adapters = inarch.attach(model, example_inputs=torch.randn(4, 3, WIDTH))
    adapters.add("a", "seq_bn[stochastic_depth=0.5]")
    awake(adapters, "a")
    from inarch.attach import modules_at, slot_of

    module = modules_at(slot_of(model, adapters.sites["data0.0.mlp"]), "a").find("bottleneck").train()
    dead = module.branch(torch.randn(6, 500, WIDTH)).abs().sum(-1) == 0
    assert (dead == dead[:1]).all()
    assert 0.4 < dead[0].float().mean() < 0.6


class Turned(nn.Module):
    """A batch-first layer around an attention that is sequence-first."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        y = self.norm(x).transpose(0, 1)
        return x + self.drop(self.attn(y, y, y)[0].transpose(0, 1))


def test_what_an_attention_says_counts_only_for_a_stream_it_takes_as_it_is():
    model = nn.Sequential(Turned(), Turned()).eval()
    sites = inarch.probe(model, example_inputs=torch.randn(3, 5, WIDTH))
    assert {site.batch_dim for site in sites} == {0}


class SequenceFirst(nn.Module):
    """Takes token ids (B, L) and runs on a stream (L, B, D), without a module that says so."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)) for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids.T)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_stream_that_is_sequence_first_is_told_by_the_size_of_the_inputs():
    ids = torch.arange(12).reshape(2, 6)
    assert {site.batch_dim for site in inarch.probe(SequenceFirst(), example_inputs=ids)} == {1}


def test_a_layout_with_another_batch_dimension_is_refused():
    (x,) = streams(1, batch_first=True)
    model = encoder()
    layout = inarch.probe(model, example_inputs=x).to_dict()
    layout["sites"][0]["batch_dim"] = 2
    with pytest.raises(SiteError, match=r"`batch_dim` must be 0 or 1; got 2"):
        inarch.attach(model, layout=layout)
