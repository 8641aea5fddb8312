"""Hooks follow the call: an argument is found whether a caller passes it by position or by name."""

import pytest
import torch
from torch import nn

import inarch
from inarch.core.errors import SiteError
from inarch.testing import perturb

CONFIG = "double_seq_bn[original_ln_before=True]|lora[attn_matrices=['q','v'],init_weights=bert]"


class Norm(nn.LayerNorm):
    """A norm whose forward has a flag before the tensor, so that a guess takes the wrong argument."""

    def forward(self, flag, states=None):
        assert flag
        return super().forward(torch.zeros(2, 5, 16) if states is None else states)


class Attention(nn.Module):
    def __init__(self, width, call):
        super().__init__()
        self.call = call
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        if self.call == "position":
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            q, k, v = self.q(input=x), self.k(input=x), self.v(input=x)
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v))


class Layer(nn.Module):
    def __init__(self, width, call):
        super().__init__()
        self.call = call
        self.norm_1, self.norm_2 = Norm(width), Norm(width)
        self.attention = Attention(width, call)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def normed(self, norm, x):
        if self.call == "nothing":
            return norm(True)
        return norm(True, x) if self.call == "position" else norm(states=x, flag=True)

    def forward(self, x):
        x = x + self.attention(self.normed(self.norm_1, x))
        return x + self.mlp(self.normed(self.norm_2, x))


class Model(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.layers = nn.ModuleList(Layer(16, call) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def adapted(call):
    """A model in which everything is called in one way, with adapters; the same weights each time."""
    torch.manual_seed(0)
    model = Model(call).eval()
    x = torch.randn(2, 5, 16)
    adapters = inarch.attach(model, example_inputs=x)
    adapters.add("a", CONFIG)
    adapters.activate("a")
    perturb(model)
    return model, x, adapters


def test_calls_by_name_and_by_position_give_the_same():
    model, x, adapters = adapted("position")
    named, _, others = adapted("name")
    assert {site.stream.key for site in adapters.sites} == {(1,)}
    assert {site.stream.key for site in others.sites} == {("states",)}
    assert torch.equal(model(x), named(x))
    adapters.deactivate()
    assert not torch.equal(model(x), named(x))


@pytest.mark.parametrize(("probed", "called"), [("position", "name"), ("name", "position")])
def test_a_caller_may_change_its_way_after_the_probe(probed, called):
    model, x, _ = adapted(probed)
    expected = model(x)
    for layer in model.layers:
        layer.call = layer.attention.call = called
    assert torch.equal(model(x), expected)


def test_a_stream_that_is_not_passed_is_named():
    model, x, _ = adapted("position")
    for layer in model.layers:
        layer.call = "nothing"
    with pytest.raises(SiteError, match=r"got no stream for an output of shape \(2, 5, 16\) at site `data0.0.self"):
        model(x)


def test_a_projection_without_its_input_is_named():
    model, x, _ = adapted("position")
    projection = model.layers[0].attention.q
    projection.forward = lambda other: nn.functional.linear(other, projection.weight, projection.bias)
    with pytest.raises(SiteError, match=r"its argument `input`; got a call with `other` of a Linear\. Leave this"):
        projection(other=x)
