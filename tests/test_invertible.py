"""Invertible adapters: the couplings, where they act, where they are undone, and folders of the library `adapters`."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

import inarch
from inarch import BatchSplit, Parallel, Stack
from inarch.core.site import Sites
from inarch.methods import read_config
from inarch.methods.invertible import Invertible, InvertibleConfig
from inarch.testing import tiny, tiny_inputs


def made(config, width, *, seed=0):
    """A coupling in float64 with weights that matter."""
    sites = inarch.probe(tiny("bert"))
    (placement,) = Invertible.placements(config, sites)
    entry = placement.entry
    placement = type(placement)(
        site=placement.site,
        port="input",
        entry=type(entry)(**{f: getattr(entry, f) for f in entry.__slots__} | {"width": width}),
    )
    module = Invertible(config, placement, 0).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return module


def awake(adapters, *names):
    generator = torch.Generator().manual_seed(3)
    for name in names:
        for parameter in adapters[name].values():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("coupling", ["nice", "glow"])
@pytest.mark.parametrize("width", [8, 7])
def test_the_inverse_undoes_the_map(coupling, width):
    module = made(InvertibleConfig(inv_adapter=coupling), width)
    x = torch.randn(2, 3, width, dtype=torch.float64)
    y = module(x)
    assert (y - x).abs().max() > 0.1
    assert torch.allclose(module.inverse(y), x, rtol=0, atol=1e-12)
    assert torch.allclose(module(module.inverse(x)), x, rtol=0, atol=1e-12)


def test_nice_is_two_additive_couplings():
    """Dinh et al. 2015, section 3.2, with both halves in turn."""
    module = made(InvertibleConfig(non_linearity="tanh"), 6)
    x1, x2 = torch.randn(1, 2, 6, dtype=torch.float64).split(3, dim=-1)
    F, G = (dict(net.named_parameters()) for net in (module.F, module.G))

    def net(w, u):
        return torch.tanh(u @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]

    y1 = x1 + net(F, x2)
    assert torch.allclose(module(torch.cat((x1, x2), -1)), torch.cat((y1, x2 + net(G, y1)), -1))


def test_glow_is_two_affine_couplings():
    """Kingma and Dhariwal 2018, table 1: the logarithm of the volume is the sum of all log s."""
    module = made(InvertibleConfig(inv_adapter="glow"), 4)
    x = torch.randn(4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: module(v.view(1, 1, 4)).flatten(), x)
    y = module(x.view(1, 1, 4)).flatten()
    logs = torch.cat((module.F(x[2:])[:2], module.G(y[:2])[:2]))
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], logs.sum())


def bert_by_hand(model, ids, module):
    """The model on embeddings that were changed by hand, and the head on states that were changed back."""
    embedded = module(model.bert.embeddings(ids))
    states = model.bert.encoder(embedded).last_hidden_state
    head = model.cls.predictions
    return head.decoder(module.inverse(head.transform(states)))


@pytest.mark.parametrize("coupling", ["nice", "glow"])
def test_it_stands_between_the_embeddings_and_is_undone_before_the_output(coupling):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForMaskedLM(BertConfig(vocab_size=40, **settings)).eval()
    adapters = inarch.attach(model)
    adapters.add("a", f"invertible[inv_adapter={coupling}]")
    awake(adapters, "a")
    ids = torch.randint(0, 40, (2, 5))
    base = model(input_ids=ids).logits
    module = next(m for m in model.modules() if isinstance(m, Invertible))
    expected = bert_by_hand(model, ids, module)
    adapters.activate("a")
    found = model(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, base, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-lm", "t5-lm", "bart-lm"])
def test_what_enters_the_first_layer_is_changed(name):
    """And the hidden states say so: the map of what they are without the adapter."""
    model = tiny(name)
    adapters = inarch.attach(model)
    adapters.add("a", "invertible")
    awake(adapters, "a")
    inputs = tiny_inputs(name)
    key = "encoder_hidden_states" if "decoder_input_ids" in inputs else "hidden_states"
    before = model(**inputs, output_hidden_states=True)
    module = next(m for m in model.modules() if isinstance(m, Invertible))
    adapters.activate("a")
    after = model(**inputs, output_hidden_states=True)
    assert torch.allclose(after[key][0], module(before[key][0]), atol=1e-6)
    adapters.deactivate()
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (module.inverse(args[0]),))
    with torch.no_grad():
        undone = model(**inputs).logits
    handle.remove()
    assert not torch.allclose(undone, before.logits, atol=1e-3)


def test_a_stack_runs_the_part_of_the_language_and_undoes_it_in_the_opposite_order():
    model = tiny("gpt2-lm")
    adapters = inarch.attach(model)
    adapters.add("language", "seq_bn_inv[reduction_factor=4]")
    adapters.add("other", "invertible[inv_adapter=glow]")
    adapters.add("task", "seq_bn[reduction_factor=4]")
    awake(adapters, "language", "other")
    awake(adapters, "task")
    inputs = tiny_inputs("gpt2-lm")
    adapters.activate(Stack("language", "task"))
    stacked = model(**inputs).logits
    for key, parameter in adapters["task"].items():
        if "up" in key:
            parameter.data.zero_()
    adapters.activate("language")
    alone = model(**inputs).logits
    assert not torch.allclose(stacked, alone, atol=1e-3)
    adapters.activate(Stack("language", "task"))
    assert torch.allclose(model(**inputs).logits, alone, atol=1e-6)
    # Two maps: with branches at zero, embeddings go in by both, and the head gets what both give, undone.
    for key, parameter in adapters["language"].items():
        if "bottleneck.up" in key:
            parameter.data.zero_()
    adapters.activate(Stack("language", "other"))
    seen = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = model.transformer(**inputs).last_hidden_state
    model(**inputs)
    handle.remove()
    first, second = (m for m in model.modules() if isinstance(m, Invertible))
    assert torch.allclose(second(first(seen[0])) if second.scales else first(second(seen[0])), states, atol=1e-5)


def test_rows_and_copies_have_their_own():
    model = tiny("llama-lm")
    adapters = inarch.attach(model)
    for name in "ab":
        adapters.add(name, "invertible")
        awake(adapters, name)
    for parameter in adapters["b"].values():
        parameter.data.neg_()
    inputs = tiny_inputs("llama-lm")
    alone = []
    for name in "ab":
        adapters.activate(name)
        alone.append(model(**inputs).logits)
    adapters.activate(BatchSplit("a", "b", batch_sizes=[1, 1]))
    assert torch.allclose(model(**inputs).logits, torch.cat((alone[0][:1], alone[1][1:])), atol=1e-5)
    adapters.activate(Parallel("a", "b"))
    assert torch.allclose(model(**inputs).logits, torch.cat(alone), atol=1e-5)


def test_blocks_without_a_meaning_are_refused():
    adapters = inarch.attach(tiny("bert"))
    for name in "ab":
        adapters.add(name, "invertible")
    with pytest.raises(inarch.SetupError, match="mean of invertible maps has no inverse; got `invertible` of `a`"):
        adapters.activate(inarch.Average("a", "b"))
    with pytest.raises(inarch.SetupError, match="one for all tokens of a sample"):
        adapters.activate(inarch.Split("a", "b", splits=[3, 4]))


@pytest.mark.parametrize(
    ("name", "message"), [("vit", "no stack of layers gets token ids"), ("whisper", "decoder writes")]
)
def test_a_model_without_text_is_refused(name, message):
    with pytest.raises(inarch.ConfigError, match=f"`invertible` acts on .*{message}"):
        inarch.attach(tiny(name)).add("a", "seq_bn_inv")


def test_generation_with_a_cache_is_generation_without():
    model = tiny("gpt2-lm")
    adapters = inarch.attach(model)
    adapters.add("a", "invertible[inv_adapter=glow]")
    awake(adapters, "a")
    adapters.activate("a")
    ids = tiny_inputs("gpt2-lm")["input_ids"]
    kinds = [
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)
    ]
    assert torch.equal(*kinds)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("seq_bn_inv", "seq_bn|invertible"),
        ("houlsby+inv", "double_seq_bn|invertible[non_linearity=swish]"),
        (
            "seq_bn[inv_adapter=nice,inv_adapter_reduction_factor=4]",
            "seq_bn|invertible[inv_adapter_reduction_factor=4]",
        ),
        (
            "double_seq_bn_inv[inv_adapter=glow,reduction_factor=8,non_linearity=gelu]",
            "double_seq_bn[reduction_factor=8,non_linearity=gelu]|invertible[inv_adapter=glow,non_linearity=gelu]",
        ),
    ],
)
def test_the_strings_of_the_library_adapters_are_read(text, same):
    assert read_config(text) == read_config(same)


def test_a_field_of_no_part_is_refused():
    with pytest.raises(inarch.ConfigError, match="`seq_bn_inv` has no field `reduction`; got 3"):
        read_config("seq_bn_inv[reduction=3]")


def settings(**changes):
    config = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "non_linearity": "tanh"}
    given = {"original_ln_before": True, "original_ln_after": True, "residual_before_ln": True}
    return config | given | {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2} | changes


def written(folder, config, adapters):
    """A folder as the library writes it for BERT, of our adapter `a`, by the names in its reference."""
    prefix, tensors = "bert.", {}
    for key, tensor in adapters["a"].items():
        _, layer, _, method, *leaf = key.split(".")
        if method == "invertible":
            tensors[f"{prefix}invertible_adapters.x.{leaf[0]}.{ {'down': 0, 'up': 2}[leaf[1]] }.{leaf[2]}"] = tensor
        else:
            side = {"down": "adapter_down.0", "up": "adapter_up"}[leaf[0]]
            tensors[f"{prefix}encoder.layer.{layer}.output.adapters.x.{side}.{leaf[1]}"] = tensor
    folder.mkdir()
    save_file({key: tensor.detach().clone() for key, tensor in tensors.items()}, folder / "adapter.safetensors")
    record = {"name": "x", "model_type": "bert", "version": "adapters.1.3.0", "config": config}
    (folder / "adapter_config.json").write_text(json.dumps(record))


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_of_the_library_adapters_is_read(tmp_path, old):
    model = tiny("bert-classifier")
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn_inv[non_linearity=tanh]")
    awake(adapters, "a")
    adapters.activate("a")
    expected = model(**tiny_inputs("bert")).logits
    config = settings()
    if old:  # as folders of its predecessor have it
        del config["inv_adapter"], config["inv_adapter_reduction_factor"]
        config["invertible_adapter"] = {"block_type": "nice", "non_linearity": "tanh", "reduction_factor": 2}
    written(tmp_path / "x", config, adapters)
    assert adapters.load(tmp_path / "x") == "x"
    adapters.activate("x")
    assert torch.equal(model(**tiny_inputs("bert")).logits, expected)


def test_what_the_library_cannot_run_is_not_read(tmp_path):
    adapters = inarch.attach(tiny("bert-classifier"))
    adapters.add("a", "seq_bn_inv[non_linearity=tanh]")
    written(tmp_path / "x", settings(inv_adapter="glow"), adapters)
    with pytest.raises(inarch.StateError, match="a coupling that the library itself cannot run"):
        adapters.load(tmp_path / "x")


def test_a_folder_for_places_that_a_model_does_not_have_is_refused_as_a_folder(tmp_path):
    """With the error of folders, as everything that does not fit: a decoder has no text that it only reads."""
    adapters = inarch.attach(tiny("bert-classifier"))
    adapters.add("a", "seq_bn_inv[non_linearity=tanh]")
    written(tmp_path / "x", settings(), adapters)
    config = tiny("bert-classifier").config
    config.is_decoder = config.add_cross_attention = True
    decoder = inarch.attach(
        transformers.BertModel(config),
        example_inputs=tiny_inputs("bert") | {"encoder_hidden_states": torch.randn(2, 3, 32)},
    )
    with pytest.raises(
        inarch.StateError, match="that has its places; got `.*x` for BertModel: `invertible` acts on the"
    ):
        decoder.load(tmp_path / "x")
    assert decoder.names == ()


def test_entries_are_read_off_the_model_and_are_no_part_of_a_layout():
    sites = inarch.probe(tiny("bert-classifier"))
    entry = sites.entries["text0"]
    assert (entry.caller, entry.runner, entry.embedding) == ("bert", "bert.encoder", "bert.embeddings")
    assert entry.words == "bert.embeddings.word_embeddings"
    assert "entries" not in sites.to_dict()
    assert Sites.from_dict(sites.to_dict()) == sites.__class__.from_dict(sites.to_dict())
    (image,) = inarch.probe(tiny("vit-classifier")).entries.values()
    assert (image.caller, image.fan_in) == (None, 3 * 8 * 8)
