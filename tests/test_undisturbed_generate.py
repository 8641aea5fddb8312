"""Generation with adapters: what is cached, batched, padded or speculated changes nothing."""

import copy

import pytest
import torch
from little_adapters import awake

import inarch
from inarch.testing import perturb, tiny, tiny_inputs

DECODERS = ["llama-lm", "gpt2-lm", "qwen2-lm"]
MODELS = [*DECODERS, "t5-lm", "bart-lm", "whisper-lm"]

# Configuration -> whether training starts exactly at the base model.
CONFIGS = {
    "seq_bn[original_ln_before=True,mh_adapter=True]": False,
    "par_bn|lora[attn_matrices=[q,k,v,o]]": True,
}

MODES = {
    "greedy": {"do_sample": False},
    "beam search": {"do_sample": False, "num_beams": 2},
    "sampling": {"do_sample": True},
}


def talkative(name):
    """A tiny model that does not repeat one token for ever."""
    model = tiny(name)
    torch.manual_seed(2)
    perturb(model, 0.3)
    return model


def prompt(name):
    inputs = tiny_inputs(name)
    inputs.pop("decoder_input_ids", None)
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def write(model, inputs, **options):
    """Six tokens for each sequence; the same random numbers every time."""
    torch.manual_seed(5)
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "max_length": None, "min_length": None}
    return model.generate(**inputs, **length, pad_token_id=0, **options)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_what_is_cached_is_what_is_computed_anew(name):
    model, inputs = talkative(name), prompt(name)
    base = {mode: write(model, inputs, **options) for mode, options in MODES.items()}
    assert len(base["sampling"].unique()) > 4
    adapters = inarch.attach(model)
    for config, starts_at_base in CONFIGS.items():
        adapters.add("a", config, overwrite=True)
        adapters.activate("a")
        if starts_at_base:
            for mode, options in MODES.items():
                assert torch.equal(write(model, inputs, **options), base[mode]), (config, mode)
        awake(adapters, "a")
        differs = False
        for mode, options in MODES.items():
            cached = write(model, inputs, **options)
            assert torch.equal(cached, write(model, inputs, use_cache=False, **options)), (config, mode)
            differs |= not torch.equal(cached, base[mode])
        assert differs, config
    adapters.deactivate()
    for mode, options in MODES.items():
        assert torch.equal(write(model, inputs, **options), base[mode]), mode


@pytest.fixture(scope="module", params=DECODERS)
def awakened(request):
    """A decoder with an adapter of every port, awake, and its inputs."""
    model, inputs = talkative(request.param), prompt(request.param)
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn[original_ln_before=True,mh_adapter=True]|lora[init_weights=bert]")
    adapters.activate("a")
    torch.manual_seed(1)
    awake(adapters, "a")
    return model, inputs


def test_a_static_cache_gives_what_a_growing_one_gives(awakened):
    model, inputs = awakened
    assert torch.equal(write(model, inputs, cache_implementation="static"), write(model, inputs))


def test_padding_on_the_left_changes_nothing(awakened):
    model, inputs = awakened
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (3, 0)),
    }
    assert torch.equal(write(model, padded)[:, 3:], write(model, inputs))


def test_drafts_by_another_model_or_by_lookup_change_nothing(awakened):
    """The assistant is the base model, so that most of its drafts are refused."""
    model, inputs = awakened
    one = {key: value[:1] for key, value in inputs.items()}
    expected = write(model, one, do_sample=False)
    assistant = copy.deepcopy(model)
    inarch.attach(assistant).detach()
    assert torch.equal(write(model, one, do_sample=False, assistant_model=assistant), expected)
    assert torch.equal(write(model, one, do_sample=False, prompt_lookup_num_tokens=2), expected)


def test_an_assistant_may_have_adapters(awakened):
    model, inputs = awakened
    one = {key: value[:1] for key, value in inputs.items()}
    plain = copy.deepcopy(model)
    inarch.attach(plain).deactivate()
    assert torch.equal(write(plain, one, do_sample=False, assistant_model=model), write(plain, one, do_sample=False))
