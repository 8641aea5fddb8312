"""What goes wrong in the library `adapters` 1.3.0, found there by running it, and goes right here: a test for each.

What the contract of all methods holds as well (`test_contract.py`) is shown here on the models and settings of the bug.
"""

import copy
import pickle

import pytest
import torch
from little_adapters import active, awake
from transformers import AutoModelForCausalLM, MistralConfig

import inarch
from inarch import Average, ConfigError
from inarch.methods import read_config
from inarch.testing import perturb, tiny, tiny_inputs


@torch.no_grad()
def still(model, name):
    found = model(**tiny_inputs(name))
    keys = ("last_hidden_state", "logits", "image_embeds", "text_embeds")
    return torch.cat([found[key].flatten() for key in keys if key in found])


def adapted(name, config, **options):
    """A tiny model with an active adapter that is awake."""
    model = tiny(name)
    return model, active(model, config, **options)


def mistral(implementation="sdpa"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        perturb(model, 0.1)
    return model


def written(model, ids, mask=None, **options):
    """The logits of five tokens."""
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=5, min_new_tokens=5,
        do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("make", [lambda: tiny("llama-lm"), mistral], ids=["llama", "mistral"])
@pytest.mark.parametrize("config", [None, "seq_bn"])
def test_1_a_cache_gives_the_tokens_of_no_cache_with_and_without_an_adapter(make, config):
    """There, an argument of the forward was renamed and swallowed: cached generation gave wrong tokens."""
    model, ids = make(), tiny_inputs("llama-lm")["input_ids"]
    plain = written(model, ids)
    adapters = inarch.attach(model)
    if config:
        adapters.add("a", config)
        awake(adapters, "a")
        adapters.activate("a")
    cached = written(model, ids)
    assert torch.allclose(cached, written(model, ids, use_cache=False), atol=1e-5)
    assert torch.equal(cached, plain) == (config is None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_2_prefixes_are_the_same_under_every_attention(name):
    """There, `is_causal` was aligned with the first key, so early tokens saw the prefix in the place of themselves."""
    found = []
    for implementation in ("eager", "sdpa"):
        model = mistral(implementation).model if name == "mistral" else tiny(name)
        model.set_attn_implementation(implementation)
        adapters = inarch.attach(model)
        torch.manual_seed(1)
        adapters.add("a", "prefix_tuning_flat[prefix_length=4]")
        awake(adapters, "a")
        adapters.activate("a")
        with torch.no_grad():
            found.append(model(**tiny_inputs("llama")).last_hidden_state)
    assert torch.allclose(*found, atol=1e-5)


def test_3_an_intervention_counts_the_tokens_of_the_prompt_under_a_cache_and_left_padding():
    """There, each decoded token was a prefix again, and left padding an index out of range."""
    model, _ = adapted("llama-lm", "loreft[prefix_positions=2,suffix_positions=1]")
    ids = tiny_inputs("llama-lm")["input_ids"]
    assert torch.allclose(written(model, ids), written(model, ids, use_cache=False), atol=1e-5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, 10)
    assert torch.allclose(written(model, padded, mask), written(model, ids), atol=1e-5)


@pytest.mark.parametrize("config", ["vera", "compacter[reduction_factor=4]"])
@pytest.mark.parametrize("name", ["bert", "t5-lm", "clip"])
def test_4_weights_that_layers_share_are_saved_for_every_class_of_model(name, config, tmp_path):
    """There, they were left out for bare base models, T5 with a head, and CLIP, without a word."""
    model, adapters = adapted(name, config)
    expected = still(model, name)
    adapters.save("a", tmp_path / "a")
    torch.manual_seed(99)  # what is random and not saved would be other numbers
    other = tiny(name)
    again = inarch.attach(other)
    again.load(tmp_path / "a")
    again.activate("a")
    assert torch.equal(still(other, name), expected)


def test_5_direft_stays_direft_in_its_file(tmp_path):
    """There, `subtract_projection` was not written, and reloaded as true."""
    model, adapters = adapted("bert", "direft")
    adapters.save("a", tmp_path / "a")
    adapters.load(tmp_path / "a", name="b")
    assert adapters.config("b") == read_config("direft")
    expected = still(model, "bert")
    adapters.activate("b")
    assert torch.equal(still(model, "bert"), expected)


def test_6_a_prompt_is_loaded_under_another_name(tmp_path):
    model, adapters = adapted("bert", "prompt_tuning")
    expected = still(model, "bert")
    adapters.save("a", tmp_path / "a")
    adapters.deactivate()
    adapters.remove("a")
    assert adapters.load(tmp_path / "a", name="b") == "b"
    assert adapters.names == ("b",)
    adapters.activate("b")
    assert torch.equal(still(model, "bert"), expected)


@pytest.mark.parametrize("config", ["dora", "ia3[attn_matrices=[q,k,v],output_lora=True]"])
def test_7_merging_keeps_the_output_and_is_undone_bit_for_bit(config):
    """There, the weight of DoRA stayed merged after a reset, and the bias of a scaled projection was not scaled."""
    model, adapters = adapted("bert", config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = still(model, "bert")
    adapters.merge("a")
    assert torch.allclose(still(model, "bert"), expected, atol=1e-4)
    adapters.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_8_the_average_of_equal_adapters_is_one_of_them():
    """There, weights that add up to one were divided by the number of adapters again."""
    model, adapters = adapted("bert", "seq_bn[reduction_factor=4]")
    expected = still(model, "bert")
    adapters.activate(Average("a", "a"))
    assert torch.allclose(still(model, "bert"), expected, atol=1e-6)


def test_9_an_average_takes_weights_by_name():
    _, adapters = adapted("bert", "lora")
    adapters.add("b", "lora")
    awake(adapters, "b", seed=4)
    adapters.average("c", {"a": 1.0, "b": 3.0})
    for key, value in adapters["c"].items():
        assert torch.allclose(value, adapters["a"][key] * 0.25 + adapters["b"][key] * 0.75, atol=1e-7)


@pytest.mark.parametrize("config", ["prefix_tuning[bottleneck_size=8]", "seq_bn"])
def test_10_a_model_is_saved_between_trainings(config, tmp_path):
    """There, saving took the prefixes apart, and training after it was an `AttributeError`."""
    model, adapters = adapted("bert", config)
    expected = still(model, "bert")
    model.save_pretrained(tmp_path)
    assert torch.equal(still(model, "bert"), expected)
    adapters.train("a")
    model(**tiny_inputs("bert")).last_hidden_state.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapters["a"].values())


def test_11_prefixes_are_saved_as_safetensors(tmp_path):
    model, adapters = adapted("bert", "prefix_tuning[bottleneck_size=8]")
    expected = still(model, "bert")
    adapters.save("a", tmp_path / "a")
    assert (tmp_path / "a" / "adapter.safetensors").is_file()
    other = tiny("bert")
    again = inarch.attach(other)
    again.load(tmp_path / "a")
    again.activate("a")
    assert torch.equal(still(other, "bert"), expected)


@pytest.mark.parametrize("name", ["bert", "gemma2", "olmo2", "bart"])
def test_12_every_layer_has_its_own_norm(name):
    """There, a loop's variable was bound late: every layer took the norm of the last one."""
    model = tiny(name)
    expected = still(model, name)
    adapters = inarch.attach(model)
    config = "adapter_plus[mh_adapter=True]" if name in ("bert", "bart") else "seq_bn[mh_adapter=True]"
    adapters.add("a", config)
    with torch.no_grad():
        for key, parameter in adapters["a"].items():
            parameter.mul_(".up." not in key)
    adapters.activate("a")
    assert torch.allclose(still(model, name), expected, atol=1e-5)


def test_12_the_adapters_of_both_attentions_of_a_decoder_are_different_ones():
    """There, those of the cross-attention overwrote those of the self-attention."""
    _, adapters = adapted("bart", "seq_bn[mh_adapter=True,cross_adapter=True]")
    keys = {key.rsplit(".", 3)[0] for key in adapters["a"] if key.startswith("text1.0")}
    assert keys == {f"text1.0.{role}" for role in ("self_attention", "cross_attention", "mlp")}
    by_hand = [p for key, p in adapters["a"].items() if key.startswith("text1.0") and key.endswith("up.weight")]
    assert len({parameter.data_ptr() for parameter in by_hand}) == 3


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit", "seq_bn[residual_before_ln=post_add,original_ln_after=False]"),
        ("bert", "seq_bn_inv[inv_adapter=glow]"),
        ("bert", "mtl_lora"),
        ("bert", "compacter[reduction_factor=4,init_weights=mam_adapter]"),
        ("vit", "seq_bn[scaling=2]"),
    ],
)
def test_13_options_that_crash_there_train_here(name, config):
    model, adapters = adapted(name, config)
    adapters.train("a")
    model(**tiny_inputs(name)).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters["a"].values())


def test_13_a_failed_add_leaves_no_name():
    adapters = inarch.attach(tiny("vit"))
    with pytest.raises(ConfigError, match="must exist; got `cross_adapter=True`"):
        adapters.add("a", "seq_bn[cross_adapter=True]")
    assert adapters.names == ()
    adapters.add("a", "seq_bn")


def test_13_a_model_with_adapters_is_pickled_and_copied():
    """There, the class of the model is made on the fly, in a module that does not know it."""
    model, _ = adapted("vit", "double_seq_bn|lora")
    expected = still(model, "vit")
    assert torch.equal(still(pickle.loads(pickle.dumps(model)), "vit"), expected)
    assert torch.equal(still(copy.deepcopy(model), "vit"), expected)


@pytest.mark.parametrize("flags", ["original_ln_after=False", "original_ln_before=False,original_ln_after=False"])
def test_13_a_wiring_that_loses_the_skip_connection_is_refused(flags):
    adapters = inarch.attach(tiny("vit"))
    with pytest.raises(ConfigError, match="must keep the pre-trained function when its branch is zero"):
        adapters.add("a", f"seq_bn[{flags}]")
