"""In training, adapters act on the branch output as the layer has dropped it, wherever the layer does that.

The references are the layers written out, with the adapter where the paper of Houlsby et al. and the `adapters` library
have it: after the branch's own dropout, before the sum.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import inarch
from inarch.sites import synthesise
from inarch.undropped import undropped

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 50, "max_position_embeddings": 20,
    "dropout": 0.5, "activation_dropout": 0.5, "attention_dropout": 0.5,
}  # fmt: skip

MODELS = {
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**SIZES, image_size=16, patch_size=8, hidden_dropout_prob=0.5)),
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES, vocab_size=50, hidden_dropout_prob=0.5)),
    "bart": lambda: tf.BartModel(tf.BartConfig(**BART)),
    "mbart": lambda: tf.MBartModel(tf.MBartConfig(**BART)),
    "bloom": lambda: tf.BloomModel(
        tf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50, hidden_dropout=0.5, attention_dropout=0.5)
    ),
}
"""Dropout of a half before every sum: a module that both sublayers share (ViT), a module of each (BERT), a function."""

LAYERS = {
    "vit": "layers.0",
    "bert": "encoder.layer.0",
    "bart": "encoder.layers.0",
    "mbart": "encoder.layers.0",
    "bloom": "h.0",
}


def drop(value):
    return F.dropout(value, 0.5, training=True)


def vit(layer, x, attention, mlp):
    x = x + attention(drop(layer.attention(layer.layernorm_before(x))[0]))
    return x + mlp(drop(layer.mlp(layer.layernorm_after(x))))


def bert(layer, x, attention, mlp):
    out = layer.attention.output
    x = out.LayerNorm(x + attention(drop(out.dense(layer.attention.self(x)[0]))))
    return layer.output.LayerNorm(x + mlp(drop(layer.output.dense(layer.intermediate(x)))))


def bart(layer, x, attention, mlp):
    x = layer.self_attn_layer_norm(x + attention(drop(layer.self_attn(x, attention_mask=None)[0])))
    return layer.final_layer_norm(x + mlp(drop(layer.fc2(drop(F.gelu(layer.fc1(x)))))))


def mbart(layer, x, attention, mlp):
    x = x + attention(drop(layer.self_attn(layer.self_attn_layer_norm(x), attention_mask=None)[0]))
    return x + mlp(drop(layer.fc2(drop(F.gelu(layer.fc1(layer.final_layer_norm(x)))))))


def bloom(layer, x, attention, mlp):
    before = layer.input_layernorm(x)
    # Its attention adds x by itself; without a stream it gives the branch alone, already dropped.
    x = x + attention(layer.self_attention(before, torch.zeros_like(x), alibi=ALIBI, attention_mask=MASK)[0])
    hidden = layer.mlp.gelu_impl(layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(x)))
    return x + mlp(drop(layer.mlp.dense_4h_to_h(hidden)))


ALIBI, MASK = torch.zeros(4, 1, 5), torch.zeros(2, 1, 5, 5)
ARGUMENTS = {"bart": (None,), "mbart": (None,), "bloom": (ALIBI, MASK)}


@pytest.mark.parametrize("name", MODELS)
def test_adapters_act_after_the_dropout_of_their_branch(name):
    """Outputs and gradients equal those of the layer written out, to the last bit, with the same random numbers."""
    torch.manual_seed(0)
    model = MODELS[name]()
    plain = copy.deepcopy(model).train().get_submodule(LAYERS[name])
    adapters = inarch.attach(model)
    adapters.add("a", "double_seq_bn[reduction_factor=4,init_weights=bert]")
    adapters.train("a")
    layer = model.train().get_submodule(LAYERS[name])
    slots = {slot.site.role: slot for slot in layer.inarch.values()}
    branches = {role: slots[role].adapters.find("a").find("bottleneck") for role in ("self_attention", "mlp")}
    for parameter in (p for branch in branches.values() for p in branch.parameters()):
        nn.init.normal_(parameter, std=0.5)

    x = torch.randn(2, 5, 16)

    def adapted(role):
        return lambda h: h + branches[role].branch(h)

    torch.manual_seed(1)
    found = layer(x, *ARGUMENTS.get(name, ()))
    found = found[0] if isinstance(found, tuple) else found
    torch.manual_seed(1)
    expected = globals()[name](plain, x, adapted("self_attention"), adapted("mlp"))
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)
    weights = [p for branch in branches.values() for p in branch.parameters()]
    ours = torch.autograd.grad(found.square().sum(), weights)
    theirs = torch.autograd.grad(expected.square().sum(), weights)
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_changes_nothing_in_training(name):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    inputs = synthesise(model)
    torch.manual_seed(1)
    before = model(**inputs).last_hidden_state
    adapters = inarch.attach(model)
    adapters.add("a", "double_seq_bn[init_weights=mam_adapter]")
    adapters.train("a")
    model.train()
    torch.manual_seed(1)
    assert torch.equal(model(**inputs).last_hidden_state, before)


@pytest.mark.parametrize("name", ["vit", "bart"])
def test_a_compiled_layer_drops_before_it_adapts(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    adapters = inarch.attach(model)
    adapters.add("a", "double_seq_bn[init_weights=bert]")
    adapters.train("a")
    layer = model.train().get_submodule(LAYERS[name])
    x = torch.randn(2, 5, 16)
    torch.manual_seed(1)
    expected = layer(x, *ARGUMENTS.get(name, ()))
    torch.manual_seed(1)
    found = torch.compile(layer, backend="eager", fullgraph=True)(x, *ARGUMENTS.get(name, ()))
    expected, found = (value[0] if isinstance(value, tuple) else value for value in (expected, found))
    assert torch.equal(found, expected)


def test_the_layer_may_not_drop_after_all():
    """Where a layer leaves the dropout out, its first operator gets the adapted output."""
    waiting = undropped(torch.ones(2, 3), lambda h, factor: factor * h, 10.0)
    assert (waiting.shape, waiting.dtype, waiting.dim(), waiting.size(-1)) == ((2, 3), torch.float32, 2, 3)
    for found in (waiting + 1, torch.stack([waiting]).squeeze(0) + 1, torch.add(input=waiting, other=1)):
        assert type(found) is torch.Tensor
        assert torch.equal(found, torch.full((2, 3), 11.0))


def test_what_a_hook_changes_in_place_is_what_the_layer_goes_on_with():
    waiting = undropped(torch.ones(2, 3), lambda h, factor: factor * h, 10.0)
    waiting.add_(1)
    waiting[0] = 0
    waiting *= 2
    assert torch.equal(waiting + 0, torch.tensor([[0.0] * 3, [22.0] * 3]))

    torch.manual_seed(0)
    model = MODELS["bart"]()
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn[init_weights=bert]")
    adapters.train("a")
    branch = model.train().encoder.layers[0].fc2
    outputs = []

    def zero(_module, _args, output):
        output.zero_()

    for hook in (lambda *_: None, zero, lambda *call: torch.zeros_like(call[2])):
        handle = branch.register_forward_hook(hook)
        torch.manual_seed(1)
        outputs.append(model(input_ids=torch.arange(4, 12)[None]).last_hidden_state)
        handle.remove()
    assert torch.equal(outputs[1], outputs[2]) and not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(("name", "expected"), [("vit", True), ("bert", False), ("bart", True), ("bloom", True)])
def test_dropouts_that_no_hook_can_follow_are_seen_in_eval_mode(name, expected):
    """Also where the probability is 0: what is found does not depend on it."""
    model = MODELS[name]()
    for module in model.modules():
        for setting in ("dropout", "hidden_dropout"):
            if isinstance(getattr(module, setting, None), float):
                setattr(module, setting, 0.0)
    assert {site.dropped_later for site in inarch.probe(model.eval())} == {expected}
