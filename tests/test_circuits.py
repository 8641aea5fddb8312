"""Adapters that take the stream, the branch and the norm as other libraries do, and outputs told by counting calls."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from torch import nn
from transformers import GPTJConfig, GPTJModel, ViTConfig, ViTModel

import inarch
from inarch.core.errors import SiteError
from inarch.core.site import Site, Tap
from inarch.core.wiring import layer_output
from inarch.methods import AdapterConfig
from inarch.methods.bottleneck import BottleneckConfig
from inarch.plan import formula
from inarch.programs import rewire, wired_adapter
from inarch.testing import tiny, tiny_inputs

FLAGS = [
    {"original_ln_before": before, "residual_before_ln": residual, "original_ln_after": after}
    for before, after in itertools.product((True, False), repeat=2)
    for residual in (True, False, "post_add")
] + [{"is_parallel": True, "original_ln_after": after} for after in (True, False)]


class Branch:
    """An adapter that is a fixed function."""

    def branch(self, z):
        return torch.sin(3 * z)

    def norm_branch(self, w):
        return w / 2


def documented(config, stream, branch, norm):
    """The site's output, after section 'placement' of the reference's documentation: post-norm and pre-norm."""
    adapter = Branch()
    if config.is_parallel:
        value = branch + adapter.branch(stream)
    elif not config.original_ln_before:
        value = branch + adapter.branch(branch)
    else:
        z = norm(stream + branch)
        residual = {True: branch, False: z, "post_add": stream + branch}[config.residual_before_ln]
        value = residual + adapter.branch(z)
    return norm(stream + value) if config.original_ln_after else value


def site(**changes):
    tap = Tap(path="a", side="out")
    known = {"stack": "text0", "layer": 0, "role": "mlp", "kind": "mlp", "layer_path": "", "layer_class": ""}
    return Site(**known, width=8, arrangement="post", output=tap, stream=tap, **changes)


def settled(config, place, tensors, norm):
    adapters = {"a": wired_adapter(config, place, Branch())}
    x, h, others = tensors
    return rewire("a", adapters, x, h, others=others, norm=norm)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("circuit", ["own", "exchanged", "unnormed", "joined"])
def test_a_circuit_is_the_documented_formula_of_what_it_takes(circuit, post_norm, flags):
    config = BottleneckConfig(circuits={"output_adapter": circuit}, **flags)
    x, h, others = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    norm = nn.LayerNorm(8, dtype=torch.float64) if post_norm else None
    layer_norm = norm or (lambda value: value)
    place = site(post_norm="n" if post_norm else None, shared_sum=circuit == "joined")
    if circuit == "joined":
        expected = documented(config, x + others, h, layer_norm)
    elif circuit == "exchanged":
        expected = documented(config, h, x, layer_norm)
    elif circuit == "unnormed":
        expected = layer_norm(documented(config, x, h, lambda value: value))
    else:
        others = None
        expected = documented(config, x, h, layer_norm)
    handed = settled(config, place, (x, h, others), norm)
    found = layer_output(handed, x if circuit != "joined" else x + others, norm)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("flags", [flags for flags in FLAGS if flags["original_ln_after"]])
@pytest.mark.parametrize("circuit", ["inner", "last_norm"])
def test_a_circuit_before_the_sum_hands_on_what_the_adapter_makes(circuit, flags):
    """The layer normalises its branch and adds the stream afterwards, so there is no sum of the adapter's own."""
    config = BottleneckConfig(circuits={"output_adapter": circuit}, **flags)
    x, h = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    norm = nn.LayerNorm(8, dtype=torch.float64)
    expected = documented(
        config.replace(original_ln_after=False), x, h, norm if circuit == "last_norm" else lambda value: value
    )
    handed = settled(config, site(), (x, h, None), norm)
    assert handed.output is None
    torch.testing.assert_close(handed.branch, expected, rtol=0, atol=1e-13)


def test_a_circuit_that_the_site_does_not_have_is_refused():
    adapters = inarch.attach(tiny("vit"))
    adapters.add("a", "seq_bn[circuits={'output_adapter':'last_norm'}]", unsound="allow")
    with pytest.raises(SiteError, match="needs one at the end of that branch; got none at site `image0.1.mlp`"):
        adapters.activate("a")
    config = AdapterConfig((BottleneckConfig(circuits={"output_adapter": "inner"}),))
    with pytest.raises(SiteError, match="on the last projection of a branch needs one that can be hooked; got 0"):
        formula(site(), "a", {"a": config})


@pytest.mark.parametrize(
    ("circuit", "changes", "text"),
    [
        ("own", {"post_norm": "n"}, "LN(x + h + A(h))"),
        ("exchanged", {"post_norm": "n"}, "LN(x + h + A(x))"),
        ("joined", {"shared_sum": True}, "x + h + g + A(h)"),
    ],
)
def test_the_proof_sees_the_circuit(circuit, changes, text):
    config = AdapterConfig((BottleneckConfig(circuits={"output_adapter": circuit}),))
    found = formula(site(**changes), "a", {"a": config})
    assert sorted(str(found.adapted).strip("LN()").split(" + ")) == sorted(text.strip("LN()").split(" + "))
    assert found.at_zero == found.pretrained


def test_the_proof_of_an_adapter_that_reads_a_joined_stream_names_the_other_branch():
    config = AdapterConfig((BottleneckConfig(circuits={"output_adapter": "joined"}, is_parallel=True),))
    found = formula(site(shared_sum=True), "a", {"a": config})
    assert found.reads_others and found.reads_stream and found.adapted.mentions("A")


def test_adapters_that_take_different_things_do_not_stack():
    adapters = inarch.attach(tiny("bert"))
    adapters.add("a", "seq_bn")
    adapters.add("b", "seq_bn[circuits={'output_adapter':'exchanged'}]", unsound="allow")
    adapters.activate("b")
    with pytest.raises(inarch.SetupError, match=r"must take the same.*`a` \(own\) and `b` \(exchanged\) at site"):
        adapters.activate(inarch.Stack("a", "b"))


def test_a_circuit_of_no_field_is_refused():
    with pytest.raises(inarch.ConfigError, match="keys of `BottleneckConfig.circuits` are.*got 'mlp'"):
        BottleneckConfig(circuits={"mlp": "joined"})
    with pytest.raises(inarch.ConfigError, match="circuits"):
        BottleneckConfig(circuits={"output_adapter": "crossed"})


# A joined stream in a model


def gptj():
    torch.manual_seed(0)
    config = GPTJConfig(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, rotary_dim=4, vocab_size=40, bos_token_id=1, eos_token_id=2
    )
    return GPTJModel(config).eval()


def awake(adapters, name):
    with torch.no_grad():
        for parameter in adapters[name].values():
            parameter.add_(torch.randn(parameter.shape) * 0.3)


JOINED = BottleneckConfig(
    mh_adapter=True, original_ln_before=True, reduction_factor=4, circuits={"output_adapter": "joined"}
)


def test_a_joined_adapter_reads_what_the_other_branch_hands_to_the_sum():
    """By hand: z = mlp + (x + attention + A_attention)."""
    model, ids = gptj(), torch.arange(6)[None]
    adapters = inarch.attach(model)
    adapters.add("a", JOINED)
    awake(adapters, "a")
    adapters.activate("a")
    seen, block = {}, model.h[0]
    block.ln_1.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    handle = block.attn.register_forward_hook(lambda _, _args, output: seen.update(attention=output[0]), prepend=True)
    block.mlp.register_forward_hook(lambda _, _args, output: seen.update(mlp=output), prepend=True)
    block.register_forward_hook(
        lambda _, _args, output: seen.update(y=output[0] if isinstance(output, tuple) else output)
    )
    model(ids)
    handle.remove()
    branches = {site.kind: module(model, site) for site in adapters.sites if site.layer == 0}
    first = seen["x"] + seen["attention"] + branches["self_attention"].branch(seen["x"] + seen["attention"])
    expected = first + seen["mlp"] + branches["mlp"].branch(first + seen["mlp"])
    torch.testing.assert_close(seen["y"], expected, rtol=0, atol=1e-5)


def test_a_joined_adapter_without_the_other_branch_says_so():
    model = gptj()
    adapters = inarch.attach(model)
    adapters.add("a", JOINED)
    adapters.activate("a")
    block, x = model.h[1], torch.randn(1, 6, 16)
    block.ln_1(x)  # where the stream is held
    with pytest.raises(SiteError, match=r"runs after them; got none before the output of site `text0\.1\.mlp`"):
        block.mlp(x)


def test_a_joined_adapter_reads_nothing_of_a_forward_that_did_not_end():
    model, ids = gptj(), torch.arange(6)[None]
    adapters = inarch.attach(model)
    adapters.add("a", JOINED)
    awake(adapters, "a")
    adapters.activate("a")
    expected = model(ids).last_hidden_state

    def stop(*_):
        raise RuntimeError("stop")

    handle = model.h[0].mlp.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        model(ids + 1)
    handle.remove()
    assert torch.equal(model(ids).last_hidden_state, expected)


def test_a_joined_stream_from_a_module_that_is_called_often_is_refused():
    model = gptj()
    sites = inarch.probe(model)
    counted = [
        dataclasses.replace(place, output=dataclasses.replace(place.output, call=1, since="ln_1"))
        if place.kind == "self_attention"
        else place
        for place in sites
    ]
    adapters = inarch.attach(model, layout=dataclasses.replace(sites, sites=tuple(counted)))
    adapters.add("a", JOINED)
    with pytest.raises(SiteError, match="needs each of them at a module that its layer calls once; got `attn`"):
        adapters.activate("a")
    assert adapters.setup is None


def module(model, place):
    from inarch.attach import modules_at, slot_of

    return modules_at(slot_of(model, place), "a").find("bottleneck")


@pytest.mark.parametrize("build", [gptj, lambda: tiny("beit")], ids=["joined", "counted"])
def test_copies_and_compiled_models_hold_their_own(build):
    model = build()
    inputs = tiny_inputs("beit") if not isinstance(model, GPTJModel) else {"input_ids": torch.arange(6)[None]}
    adapters = inarch.attach(model, example_inputs=inputs)
    adapters.add("a", JOINED if isinstance(model, GPTJModel) else "double_seq_bn")
    awake(adapters, "a")
    base = model(**inputs).last_hidden_state
    adapters.activate("a")
    expected = model(**inputs).last_hidden_state
    assert not torch.allclose(base, expected, atol=1e-3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        awake(inarch.attach(other), "a")
        assert not torch.allclose(other(**inputs).last_hidden_state, expected, atol=1e-3)
        assert torch.equal(model(**inputs).last_hidden_state, expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(**inputs)


# Outputs told by counting calls


def test_an_adapter_comes_after_a_dropout_that_branches_share():
    """A constant branch adds its constant everywhere: nothing of it is dropped."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        hidden_dropout_prob=0.5,
    )  # fmt: skip
    model = ViTModel(config)
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn[leave_out=[0]]")
    for key, parameter in adapters["a"].items():
        torch.nn.init.constant_(parameter, 1.0 if key.endswith("up.bias") else 0.0)
    model.train()
    ends = []
    layer = model.get_submodule(adapters.sites["image0.1.mlp"].layer_path)
    layer.register_forward_hook(lambda _, _args, output: ends.append(output))
    for setup in (None, "a"):
        torch.manual_seed(1)
        with adapters.using(setup):
            model(pixel_values=torch.ones(2, 3, 16, 16))
    torch.testing.assert_close(ends[1] - ends[0], torch.ones_like(ends[0]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_counted_calls_survive_gradient_checkpointing(reentrant):
    model = tiny("beit")
    adapters = inarch.attach(model)
    adapters.add("a", "double_seq_bn")
    awake(adapters, "a")
    adapters.train("a")
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model.zero_grad(set_to_none=True)
        inputs = tiny_inputs("beit")
        inputs["pixel_values"].requires_grad_()  # a re-entrant checkpoint is differentiated only if its input is
        model(**inputs).last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in adapters["a"].values()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_a_layout_with_counted_calls_is_read_back():
    model = tiny("beit")
    sites = inarch.probe(model)
    assert inarch.probe(model, layout=sites.to_dict()).sites == sites.sites
    for since, message in ((None, "`call` and `since` go together"), ("nothing", "`since of output` names a module")):
        data = sites.to_dict()
        data["sites"][0]["output"]["since"] = since
        with pytest.raises(inarch.SiteError, match=message):
            inarch.probe(model, layout=data)
