"""Prefixes against the formula of attention, in float64, on the queries, keys and values of the base model."""

import copy
import gc
import pickle
import re
import threading
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel
from transformers.modeling_utils import AttentionInterface
from zoo.build import tiny_model
from zoo.factories import FACTORIES
from zoo.judge import _generic

import inarch
from inarch.attach import stored
from inarch.methods import layer_number, read_config
from inarch.methods.prefix import PrefixConfig
from inarch.plan import plan
from inarch.testing import PlainTransformer, tiny, tiny_inputs

SMALL = "prefix_length=3,bottleneck_size=6"
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def padded(name):
    inputs = tiny_inputs(name)
    return inputs | {"attention_mask": PADDED}


def grafted(name, config, **kwargs):
    model = tiny(name, **kwargs)
    adapters = inarch.attach(model)
    adapters.add("a", config)
    adapters.activate("a")
    return model, adapters


@contextmanager
def recorded():
    """Calls of the attention interface, as the base model makes them."""
    calls, before = [], AttentionInterface.get_interface

    def note(function, module, *tensors, **kwargs):
        calls.append((module, *tensors, kwargs))
        return function(module, *tensors, **kwargs)

    def get_interface(self, implementation, default):
        return partial(note, before(self, implementation, default))

    AttentionInterface.get_interface = get_interface
    try:
        yield calls
    finally:
        AttentionInterface.get_interface = before


def expected(call, keys, values):
    """What the attention gives with a prefix, (B, L, N, H), by the formula."""
    module, q, k, v, mask, kwargs = call
    q, k, v = q.double(), k.double(), v.double()
    size, heads, length, _ = q.shape
    split = [part.detach().double().view(1, -1, k.shape[1], k.shape[-1]).transpose(1, 2) for part in (keys, values)]
    k, v = (torch.cat([part.expand(size, -1, -1, -1), own], 2) for part, own in zip(split, (k, v), strict=True))
    k, v = (part.repeat_interleave(heads // part.shape[1], 1) for part in (k, v))
    scores = q @ k.mT * (kwargs.get("scaling") or q.shape[-1] ** -0.5)
    own = scores[..., keys.shape[0] :]
    if kwargs.get("position_bias") is not None:
        own += kwargs["position_bias"]
    if mask is not None:
        own += mask if mask.dtype != torch.bool else torch.where(mask, 0.0, -torch.inf)
    elif kwargs.get("is_causal", getattr(module, "is_causal", True)) and length > 1:
        own += torch.full((length, length), -torch.inf).triu(1)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def forward(model, given, *, cached):
    """The whole sequence at once, or its last two tokens one by one with a cache of those before."""
    if not cached:
        model(**given)
        return
    ids, mask, cache = given["input_ids"], given.get("attention_mask"), None
    for start, end in ((0, 5), (5, 6), (6, 7)):
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        cache = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **more).past_key_values


def skip_where_attention_is_its_own(name):
    """T5 came to transformers' attention interface late; before, prefixes are refused there."""
    if name.startswith("t5") and not tiny(name)._supports_sdpa:
        with pytest.raises(inarch.SiteError, match="got `T5Attention` at site"):
            inarch.attach(tiny(name)).add("a", "prefix_tuning")
        pytest.skip("in this release of transformers T5 has an attention of its own")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "inputs", "site", "cached"),
    [
        ("bert", padded, "text0.0.self_attention", False),
        ("vit", tiny_inputs, "image0.0.self_attention", False),
        ("llama", tiny_inputs, "text0.0.self_attention", False),
        ("llama", padded, "text0.0.self_attention", False),
        ("llama", tiny_inputs, "text0.0.self_attention", True),
        ("llama", padded, "text0.0.self_attention", True),
        ("gpt2", tiny_inputs, "text0.0.self_attention", False),
        ("gpt2", padded, "text0.0.self_attention", True),
        ("t5", padded, "text0.0.self_attention", False),
        ("t5", padded, "text1.0.cross_attention", False),
        ("bart", tiny_inputs, "text1.0.self_attention", False),
    ],
)
def test_an_attention_sees_its_prefix_and_what_it_saw(name, inputs, site, cached, implementation):
    """Under padding, causal without a mask, with fewer heads of keys, with a bias of positions, across, and with a
    cache: by the formula, in float64, in every call, and under both implementations."""
    skip_where_attention_is_its_own(name)
    model = tiny(name).double()
    model.set_attn_implementation(implementation)
    adapters = inarch.attach(model)
    given = {key: value.double() if value.is_floating_point() else value for key, value in inputs(name).items()}
    with recorded() as base:
        forward(model, given, cached=cached)
    parts = adapters.sites[site]
    others = [n for n in range(sum(adapters.sites.num_layers.values())) if n != layer_number(parts, adapters.sites)]
    roles = [r for r in ("self_attention", "cross_attention") if r in {s.role for s in adapters.sites} - {parts.role}]
    adapters.add("a", PrefixConfig(prefix_length=3, bottleneck_size=6, leave_out=others, leave_out_roles=roles))
    attention = model.get_submodule(parts.absolute(parts.projections["k"][0].path)[:-1].rpartition(".")[0])
    calls = [call for call in base if call[0] is attention]
    assert len(calls) == (3 if cached else 1)
    module = _module(model, adapters, site)
    seen = []
    parent, _, leaf = parts.absolute(parts.projections["o"][0].path).rpartition(".")
    hook = getattr(model.get_submodule(parent), leaf).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    adapters.activate("a")
    forward(model, given, cached=cached)
    hook.remove()
    assert len(seen) == len(calls)
    for call, found in zip(calls, seen, strict=True):
        result = expected(call, *module.flattened()).flatten(2)
        # A token of padding that looks back sees the prefix alone, and each way something else.
        real = PADDED.bool()[:, : found.shape[1]] if inputs is padded and name in ("llama", "gpt2") else ...
        real = ... if found.shape[1] == 1 else real
        close = 1e-6 if implementation == "eager" else 1e-12  # some have a softmax in single precision there
        assert (found.reshape(result.shape) - result)[real].abs().max() < close


def _module(model, adapters, site):
    return stored(model, adapters.sites, "a")[site].find("prefix")


def test_the_mlp_is_one_for_the_attentions_of_a_kind():
    """Section 4.3: a table and a hidden map that all layers share, and an output map for each."""
    model, adapters = grafted("bart", f"prefix_tuning[{SMALL}]")
    shapes = {key: tuple(parameter.shape) for key, parameter in adapters["a"].items()}
    own = {f"text{s}.{n}.{role}" for s, n, role in [(0, 0, "self"), (0, 1, "self"), (1, 0, "self"), (1, 1, "self")]}
    attentions = {f"{key}_attention" for key in own} | {"text1.0.cross_attention", "text1.1.cross_attention"}
    first = {key for key in attentions if ".0." in key}
    assert shapes == (
        {f"{key}.prefix.out.weight": (64, 6) for key in attentions}
        | {f"{key}.prefix.out.bias": (64,) for key in attentions}
        | {f"{key}.prefix.source.embedding": (3, 32) for key in first}
        | {f"{key}.prefix.source.hidden.weight": (6, 32) for key in first}
        | {f"{key}.prefix.source.hidden.bias": (6,) for key in first}
    )
    assert adapters.plan().num_parameters == sum(parameter.numel() for parameter in adapters["a"].values())
    module = _module(model, adapters, "text0.1.self_attention")
    start, out = (adapters["a"].__getitem__, adapters["a"].__getitem__)
    key = "text0.0.self_attention.prefix.source."
    hidden = torch.tanh(start(key + "embedding") @ start(key + "hidden.weight").T + start(key + "hidden.bias"))
    key = "text0.1.self_attention.prefix.out."
    whole = hidden @ out(key + "weight").T + out(key + "bias")
    torch.testing.assert_close(torch.cat(module.flattened(), -1), whole)


def test_the_size_of_the_known_models():
    """9,872,384 and 552,960 parameters on BERT-base, as in the library `adapters`."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
    sites = inarch.probe(model)
    assert plan(sites, {"a": read_config("prefix_tuning")}).num_parameters == 9_872_384
    assert plan(sites, {"a": read_config("prefix_tuning_flat")}).num_parameters == 552_960
    assert plan(sites, {"a": read_config("mam")}).num_parameters == 22_493_984
    assert plan(sites, {"a": read_config("unipelt")}).num_parameters == 11_083_376


@pytest.mark.parametrize("name", ["llama-lm", "t5-lm", "gptj"])
def test_a_decoding_step_sees_the_prefix(name):
    """With a cache and without, also behind padding."""
    skip_where_attention_is_its_own(name)
    model, _ = grafted(name, "prefix_tuning_flat[prefix_length=3]")
    ids = tiny_inputs(name)["input_ids"]
    if name == "t5-lm":
        tokens, mask = {"input_ids": ids, "attention_mask": PADDED}, {}
        word = "decoder_input_ids"
    else:
        tokens, mask = {}, {"attention_mask": PADDED, "position_ids": (PADDED.cumsum(1) - 1).clamp(min=0)}
        word = "input_ids"
    whole = model(**tokens, **mask, **{word: ids})[0]
    cache, steps = None, []
    for place in range(ids.shape[1]):
        now = (
            {"attention_mask": PADDED[:, : place + 1], "position_ids": mask["position_ids"][:, place, None]}
            if mask
            else {}
        )
        step = model(**tokens, **now, **{word: ids[:, place, None]}, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        steps.append(step[0])
    real = PADDED.bool() if mask else torch.ones_like(ids).bool()
    assert (torch.cat(steps, 1) - whole)[real].abs().max() < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_batch_have_prefixes_of_their_own(attention):
    """Of other lengths too; each row gets what its adapter gives alone."""
    model = tiny("llama")
    model.set_attn_implementation(attention)
    adapters = inarch.attach(model)
    adapters.add("a", f"prefix_tuning[{SMALL},use_gating=True]")
    adapters.add("b", "prefix_tuning_flat[prefix_length=5]")
    adapters.add("none", "lora")
    inputs = padded("llama")
    alone = {}
    for name in ("a", "b"):
        adapters.activate(name)
        alone[name] = model(**inputs).last_hidden_state
    adapters.activate(inarch.BatchSplit("a", "b", batch_sizes=[1, 1]))
    found = model(**inputs).last_hidden_state
    real = PADDED.bool()
    assert (found[0] - alone["a"][0])[real[0]].abs().max() < 1e-5
    assert (found[1] - alone["b"][1]).abs().max() < 1e-5
    adapters.activate(inarch.Parallel("a", "b"))
    both = model(**inputs).last_hidden_state
    assert (both - torch.cat([alone["a"], alone["b"]]))[torch.cat([real, real])].abs().max() < 1e-5
    adapters.activate(inarch.Stack("b", inarch.BatchSplit("none", "a", batch_sizes=[1, 1])))
    assert (model(**inputs).last_hidden_state[0] - alone["b"][0])[real[0]].abs().max() < 1e-5


def test_shares_of_an_average_are_shares_of_the_attention():
    model = tiny("vit")
    adapters = inarch.attach(model)
    inputs = tiny_inputs("vit")
    adapters.add("a", f"prefix_tuning[{SMALL}]")
    adapters.add("b", "prefix_tuning_flat[prefix_length=5]")
    adapters.activate("a")
    alone = model(**inputs).last_hidden_state
    for setup in (inarch.Average("a", "a"), inarch.Average("a", "b", weights=[1, 0])):
        adapters.activate(setup)
        assert (model(**inputs).last_hidden_state - alone).abs().max() < 1e-5
    adapters.activate(inarch.Average("a", "b"))
    assert (model(**inputs).last_hidden_state - alone).abs().max() > 1e-2
    with pytest.raises(inarch.SetupError, match="shares of the attention, so no weight below zero"):
        adapters.activate(inarch.Average("a", "b", weights=[2, -1]))
    with pytest.raises(inarch.SetupError, match="seen by whole sequences"):
        adapters.activate(inarch.Split("a", "b", splits=[8, 9]))


def test_the_gate_is_a_mean_over_the_tokens():
    model = tiny("bert")
    adapters = inarch.attach(model)
    inputs = tiny_inputs("bert")
    seen, layer = [], model.encoder.layer[0].attention
    layer.self.query.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.output.dense.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with recorded() as calls:
        model(**inputs)
    adapters.add("a", f"prefix_tuning[{SMALL},use_gating=True,shared_gating=False]")
    module = _module(model, adapters, "text0.0.self_attention")
    with torch.no_grad():
        module.gate.weight.mul_(30)
    gates = (seen[0] @ module.gate.weight.T + module.gate.bias).sigmoid().mean(1)
    assert gates.std(0).min() > 1e-3
    keys, values = module.flattened()
    call = calls[0]
    seen.clear()
    adapters.activate("a")
    model(**inputs)
    for row, (of_keys, of_values) in enumerate(gates):
        one = (call[0], *(part[row : row + 1] for part in call[1:4]), None, call[5])
        result = expected(one, keys * of_keys, values * of_values)
        assert (seen[1][row].double().flatten() - result.flatten()).abs().max() < 1e-5


def test_what_the_mlp_makes_is_kept_without_it(tmp_path):
    model, adapters = grafted("bart", f"prefix_tuning[{SMALL},use_gating=True]|lora")
    inputs = tiny_inputs("bart")
    before, size = model(**inputs).last_hidden_state, sum(p.numel() for p in adapters["a"].values())
    adapters.eject_prefix("a")
    assert adapters.config("a") == read_config(f"prefix_tuning_flat[{SMALL},use_gating=True]|lora")
    assert sum(p.numel() for p in adapters["a"].values()) < size
    assert (model(**inputs).last_hidden_state - before).abs().max() < 1e-6
    adapters.save("a", tmp_path / "a")
    again = tiny("bart")
    inarch.attach(again).activate(inarch.attach(again).load(tmp_path / "a"))
    assert (again(**inputs).last_hidden_state - before).abs().max() < 1e-6
    adapters.add("b", "lora")
    with pytest.raises(inarch.SetupError, match="ejected from an adapter that has some; got `b`"):
        adapters.eject_prefix("b")


def test_forwards_side_by_side_have_prefixes_of_their_own():
    """Each thread computes on its own model and batch, by the interface (ViT) or a method (GPT-J)."""
    found = {}

    def work(number, name):
        model, _ = models[number]
        inputs = tiny_inputs(name, seed=number)
        found[number] = all((model(**inputs).last_hidden_state == expected[number]).all() for _ in range(5))

    names = ["vit", "gptj", "vit", "gptj"]
    models = [grafted(name, f"prefix_tuning[{SMALL},use_gating=True]") for name in names]
    expected = [models[n][0](**tiny_inputs(name, seed=n)).last_hidden_state for n, name in enumerate(names)]
    threads = [threading.Thread(target=work, args=(n, name)) for n, name in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_other_models_and_copies_are_left_alone():
    """What meets the call is there only while a prefix is active, asks only adapted attentions, and copies have it."""
    gc.collect()  # models of other tests
    before = AttentionInterface.get_interface
    model, adapters = grafted("vit", "prefix_tuning_flat[prefix_length=3]")
    inputs, other = tiny_inputs("vit"), tiny("vit", seed=1)
    prefixed, plain = model(**inputs).last_hidden_state, other(**inputs).last_hidden_state
    assert AttentionInterface.get_interface is not before
    copied, pickled = copy.deepcopy(model), pickle.dumps(model)
    adapters.detach()
    assert (copied(**inputs).last_hidden_state == prefixed).all()
    inarch.attach(copied).detach()
    assert AttentionInterface.get_interface is before
    assert (other(**inputs).last_hidden_state == plain).all()
    again = pickle.loads(pickled)
    assert (again(**inputs).last_hidden_state == prefixed).all()
    del again
    gc.collect()
    assert AttentionInterface.get_interface is before


def test_a_model_of_the_users_own_that_calls_the_fused_attention():
    model = PlainTransformer()
    x = torch.randn(2, 6, 32)
    adapters = inarch.attach(model, example_inputs=x)
    base = model(x)
    adapters.add("a", "prefix_tuning_flat[prefix_length=3,leave_out=[1]]")
    adapters.activate("a")
    module = _module(model, adapters, next(site.key for site in adapters.sites if "attention" in site.key))
    block, seen = model.blocks[0], []
    block.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert (model(x) - base).abs().max() > 1e-4
    q, k, v = block.qkv(block.norm_1(x)).view(2, 6, 3, 4, 8).permute(2, 0, 3, 1, 4)
    result = expected((nn.Module(), q, k, v, None, {"is_causal": False}), module.keys, module.values)
    assert (seen[0].double().flatten() - result.flatten()).abs().max() < 1e-5
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 6, 31))
    assert torch.overrides._len_torch_function_stack() == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jetmoe", "got keys or values of 4 heads of 16 features, and 32 projected ones, at `text0.0.self_attention`"),
        ("kosmos-2.5", "got a forward of `Kosmos2_5VisionAttention` that did so nowhere that can be seen"),
    ],
)
def test_an_attention_that_takes_no_prefix_is_refused_before_anything_is_added(name, message):
    """No site tells; one forward does."""
    model = tiny_model(name)
    inputs = FACTORIES[name](model).kwargs if name in FACTORIES else _generic(model).kwargs
    adapters = inarch.attach(model, example_inputs=dict(inputs) if name in FACTORIES else None)
    adapters.add("other", "lora")
    adapters.activate("other")
    with pytest.raises(inarch.SiteError, match=message):
        adapters.add("a", "prefix_tuning_flat[prefix_length=3]")
    assert (adapters.names, adapters.setup) == (("other",), "other")
    model(**inputs)


def test_what_cannot_be_had_is_refused():
    model = tiny("bert")
    adapters = inarch.attach(model)
    adapters.add("a", "prefix_tuning_flat[prefix_length=2]")
    adapters.activate("a")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(inarch.SiteError, match="computed by `eager` or `sdpa`; got `flex_attention`"):
        model.encoder.layer[0].attention.self(torch.randn(2, 3, 32))
    adapters.deactivate()
    model.config._attn_implementation = "sdpa"
    adapters.add("mlp", f"prefix_tuning[{SMALL}]")
    adapters["mlp"]["text0.0.self_attention.prefix.source.embedding"].full_tensor = None  # as `fully_shard` leaves it
    adapters.activate("mlp")
    with pytest.raises(inarch.SiteError, match="spread over processes .*, for `text0.1.self_attention`"):
        model(**tiny_inputs("bert"))
    with pytest.raises(inarch.ConfigError, match=re.escape("must reach at least one attention")):
        adapters.add("b", "prefix_tuning[leave_out=[0,1]]")


@pytest.mark.parametrize("kind", ["fused", "scores"])
def test_an_interrupted_forward_leaves_other_attentions_as_they_are(kind):
    """Python's `KeyboardInterrupt` passes by the hooks that end a forward."""
    model, inputs = PlainTransformer().eval(), {"x": torch.randn(2, 5, 32)}
    last = model.blocks[0].out
    if kind == "scores":
        model, inputs = tiny_model("deberta-v2").eval(), {"input_ids": torch.arange(3, 11)[None]}
        last = next(module for path, module in model.named_modules() if path.endswith("layer.0.attention.self.dropout"))
    adapters = inarch.attach(model, example_inputs=inputs)
    adapters.add("a", f"prefix_tuning[{SMALL}]")
    adapters.activate("a")
    expected = model(**inputs)

    def interrupt(*_):
        raise KeyboardInterrupt

    q = torch.randn(2, 4, 5, 8)
    alone = nn.functional.scaled_dot_product_attention(q, q, q), (q @ q.mT).softmax(-1) @ q
    hook = last.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    hook.remove()
    assert torch.overrides._get_current_function_mode_stack()  # what the test is about: the hook was passed by
    others = nn.functional.scaled_dot_product_attention(q, q, q), (q @ q.mT).softmax(-1) @ q
    assert all(torch.equal(one, other) for one, other in zip(alone, others, strict=True))
    first = [output if torch.is_tensor(output) else output[0] for output in (expected, model(**inputs))]
    assert torch.equal(*first)
    adapters.deactivate()
    assert not torch.overrides._get_current_function_mode_stack()
