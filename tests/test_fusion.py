"""Fusion layers: their formula, their training, their penalty; and agreement with the library `adapters`."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from little_adapters import awake, moved
from safetensors.torch import load_file
from transformers import AutoModel

import inarch
from inarch import BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from inarch.testing import tiny, tiny_inputs

FIXTURES = Path(__file__).parent / "fixtures" / "composition"
BOTTLENECK = "double_seq_bn[reduction_factor=4,original_ln_before=True,use_gating=True]"


def grafted(name, **configs):
    model = tiny(name).double()
    return model, moved(model, configs)


def inputs_of(name, batch=3):
    found = tiny_inputs(name, batch=batch)
    return {key: value.double() if value.is_floating_point() else value for key, value in found.items()}


def output(model, name, **more):
    found = model(**inputs_of(name), **more)
    return found.image_embeds if name == "clip" else found.last_hidden_state


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_compositions_agree_with_the_library_adapters(name):
    """Of its averages `svd` has another scale: it keeps alpha while it changes the rank that divides it."""
    folder = FIXTURES / name
    model = AutoModel.from_pretrained(folder / "base").eval()
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    adapters = inarch.attach(model)
    for key in "abcd":
        adapters.load(folder / key)
    setups = {
        "stack": Stack("a", "b"),
        "split": Split("a", "b", splits=[2, 3]),
        "batch_split": BatchSplit("a", "b", batch_sizes=[1, 2]),
        "parallel": Parallel("a", "b"),
        "lora_batch_split": BatchSplit("c", "d", batch_sizes=[1, 2]),
        "lora_parallel": Parallel("c", "d"),
    }
    for kind in ("dynamic", "static"):
        setups[f"fuse_{kind}"] = Fuse("a", "b", name=kind)
        assert adapters.load(folder / kind, name=kind) == kind
    for combine in ("linear", "negate_b"):
        setups[f"average_{combine}"] = combine
        adapters.average(combine, ["c", "d"], [3, -1], combine=combine)
    assert set(expected) - set(setups) == {"average_svd"}
    for case, setup in setups.items():
        if case in expected:
            with adapters.using(setup), torch.no_grad():
                found = model(**inputs).last_hidden_state
            assert torch.allclose(found, expected[case], atol=1e-5), (case, (found - expected[case]).abs().max())
    assert len(setups) - len(set(expected) & set(setups)) <= 1  # it cannot run LoRA in a `Parallel` on ViT


def test_what_fusion_layers_of_the_library_cannot_be_is_refused(tmp_path):
    adapters = inarch.attach(AutoModel.from_pretrained(FIXTURES / "bert" / "base"))
    assert adapters.load(FIXTURES / "bert" / "dynamic") == "a+b"
    assert str(adapters.config("a+b")) == "dynamic_fusion[mh_adapter=True]"
    record = json.loads((FIXTURES / "bert" / "dynamic" / "adapter_fusion_config.json").read_text())
    shutil.copytree(FIXTURES / "bert" / "dynamic", tmp_path / "bad")
    for change, message in (
        ({"config": record["config"] | {"temperature": True}}, "got `temperature` at .*, which this version does not"),
        ({"name": "a,c"}, "got `.*a,b.*`, which is at no such site of BertModel"),
        ({"name": 3}, "must hold `name`, `model_type` and `config`"),
        ({"model_type": "vit"}, "The model types of an adapter's base and of the model must agree"),
    ):
        (tmp_path / "bad" / "adapter_fusion_config.json").write_text(json.dumps(record | change))
        with pytest.raises(inarch.StateError, match=message):
            adapters.load(tmp_path / "bad", name="other")
    assert adapters.names == ("a+b",)


@pytest.mark.parametrize("name", ["vit", "gpt2", "t5", "clip", "swin", "beit"])
def test_a_fusion_is_its_formula(name):
    """In one site of the last layer, by hand: h + sum p_n V u_n with p = softmax of (Q z · K u_n)."""
    model, adapters = grafted(name, a="seq_bn", b="seq_bn[reduction_factor=4]")
    block = Fuse("a", "b")
    adapters.add_fusion(block)
    awake(adapters, "a+b")
    adapters.activate(block)
    site = [s for s in adapters.sites if s.kind == "mlp"][-1]
    seen = {}

    def note(key):
        def hook(module, args, kwargs, result):
            seen[key] = (args, kwargs, result)

        return hook

    from inarch.attach import modules_at, slot_of

    modules = {key: modules_at(slot_of(model, site), key) for key in ("a", "b", "a+b")}
    fusion = modules["a+b"].find("fusion")
    fusion.query.register_forward_hook(note("query"), with_kwargs=True)
    fusion.value.register_forward_hook(note("value"), with_kwargs=True)
    with adapters.scores() as scores, torch.no_grad():
        output(model, name)
    z = seen["query"][0][0]
    u = torch.stack([modules[key].find("bottleneck").branch(z) for key in "ab"], dim=-2)
    assert torch.allclose(seen["value"][0][0], u)
    q = z @ fusion.query.weight.T + fusion.query.bias
    k = u @ fusion.key.weight.T + fusion.key.bias
    p = torch.softmax((q.unsqueeze(-2) * k).sum(-1), dim=-1)
    assert torch.allclose(scores.fusion["a+b"][f"{site.key}.fusion"], p)
    expected = (p.unsqueeze(-1) * (u @ fusion.value.weight.T)).sum(-2)
    assert torch.allclose(fusion.fuse((z, *u.unbind(-2))), expected)


def test_fusion_layers_start_as_in_the_library_adapters():
    """Queries and keys normal 0.02, biases zero; values the identity, beside 1e-6, so that equal scores give a mean."""
    model, adapters = grafted("vit", a="seq_bn", b="seq_bn")
    block = Fuse("a", "b")
    adapters.add_fusion(block)
    own = adapters["a+b"]
    for key, value in own.items():
        if key.endswith("value.weight"):
            assert torch.allclose(
                value, torch.eye(32).double() + 1e-6 * (1 - torch.eye(32).double()), rtol=0, atol=1e-12
            )
        elif key.endswith("bias"):
            assert not value.any()
    maps = torch.cat([value.flatten() for key, value in own.items() if key.endswith(("query.weight", "key.weight"))])
    assert maps.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(maps.mean()) < 1e-3
    adapters.activate(block)
    assert adapters.penalty().item() == pytest.approx(0.01 * 2 * 32 * 31 * 1e-12, rel=1e-6)
    with torch.no_grad():
        for key, value in own.items():
            if not key.endswith("value.weight"):
                value.zero_()
        fused = output(model, "vit")
        with adapters.using(inarch.Average("a", "b")):
            assert torch.allclose(output(model, "vit"), fused, rtol=0, atol=1e-3)


def test_rows_of_a_fusion_do_not_touch_each_other_and_blocks_hold_it():
    model, adapters = grafted("bert", a=BOTTLENECK, b=BOTTLENECK, c="lora[init_weights=bert]")
    fuse = Fuse("a", "b")
    adapters.add_fusion(fuse)
    awake(adapters, "a+b")
    with torch.no_grad():
        with adapters.using(Stack("c", fuse)):
            fused = output(model, "bert")
        with adapters.using("a"):
            alone = output(model, "bert")
        with adapters.using(MultiTask(Stack("c"), Fuse("a", "b"), "a")):
            mixed = output(model, "bert", task_ids=torch.tensor([2, 1, 2]))
        with adapters.using(fuse):
            plain = output(model, "bert")
    assert torch.allclose(mixed, torch.stack([alone[0], plain[1], alone[2]]), atol=1e-10)
    assert not torch.allclose(fused, plain)


def test_a_stack_in_a_fusion_gives_what_its_last_adapter_adds():
    """With a first adapter that adds nothing, the stack is its second; with one that adds, it is not."""
    model, adapters = grafted("vit", a="seq_bn", b="seq_bn", c="seq_bn")
    for setup, name in ((Fuse("a", "b"), "plain"), (Fuse("a", Stack("c", "b")), "stacked")):
        adapters.add_fusion(Fuse(*setup.children, name=name))
    for key, value in adapters["stacked"].items():
        value.data = adapters["plain"][key].data
    results = []
    for zero in (False, True):
        if zero:
            for key, parameter in adapters["c"].items():
                parameter.data.mul_(0.0 if ".up." in key else 1.0)
        for setup in (Fuse("a", "b", name="plain"), Fuse("a", Stack("c", "b"), name="stacked")):
            with adapters.using(setup), torch.no_grad():
                results.append(output(model, "vit"))
    assert not torch.allclose(results[0], results[1])
    assert torch.allclose(results[2], results[3], atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "bert", "t5"])
def test_fusion_layers_alone_are_trained_and_all_of_them_are(name):
    model, adapters = grafted(name, a=BOTTLENECK, b=BOTTLENECK)
    block = Fuse("a", "b")
    adapters.add_fusion(block)
    awake(adapters, "a+b")
    adapters.train(block)
    (output(model, name).square().sum() + adapters.penalty()).backward()
    trained = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    own = {id(parameter) for parameter in adapters["a+b"].values()}
    assert all(float(gradient.abs().sum()) > 0 for key, gradient in trained.items() if "bias" not in key)
    assert {id(parameter) for _, parameter in model.named_parameters() if parameter.grad is not None} == own
    adapters.train(block, fused=True)
    assert all(p.requires_grad for key in ("a", "b", "a+b") for p in adapters[key].values())


def test_the_penalty_is_the_distance_of_the_values_from_the_identity():
    _, adapters = grafted("vit", a="seq_bn", b="seq_bn")
    assert adapters.penalty().item() == 0
    block = Fuse("a", "b")
    adapters.add_fusion(block)
    adapters.train(block)
    assert adapters.penalty().item() == pytest.approx(2 * 0.01 * 32 * 31 * 1e-12)
    awake(adapters, "a+b")
    distances = [(torch.eye(32) - p).square().sum() for key, p in adapters["a+b"].items() if ".value." in key]
    assert adapters.penalty().item() == pytest.approx(0.01 * sum(distances).item())
    adapters.add_fusion(block, "static_fusion", overwrite=True)
    adapters.train(block)
    assert adapters.penalty().item() == 0


def test_a_setup_is_saved_and_loaded_whole(tmp_path):
    model, adapters = grafted("bert", a=BOTTLENECK, b=BOTTLENECK)
    block = Fuse("a", "b", name="both")
    adapters.add_fusion(block)
    awake(adapters, "both")
    adapters.activate(block)
    expected = output(model, "bert")
    adapters.save_setup(tmp_path / "setup")
    twin = tiny("bert").double()
    loaded = inarch.attach(twin)
    setup = loaded.load_setup(tmp_path / "setup")
    assert (setup, loaded.setup, loaded.names) == (block, None, ("a", "b", "both"))
    loaded.activate(setup)
    assert torch.equal(output(twin, "bert"), expected)
    assert torch.equal(output(copy.deepcopy(model), "bert"), expected)
    with pytest.raises(inarch.SetupError, match="got `a` again"):
        loaded.load_setup(tmp_path / "setup")
    with pytest.raises(inarch.StateError, match="holds `setup.json`.*`load` reads that of one adapter"):
        loaded.load_setup(tmp_path / "setup" / "adapters" / "a")
    adapters.deactivate()
    with pytest.raises(inarch.SetupError, match="A setup is saved; got none"):
        adapters.save_setup(tmp_path / "none")
    (tmp_path / "setup" / "setup.json").write_text('{"format_version": 2, "setup": "a"}')
    with pytest.raises(inarch.StateError, match="reads setups of format 1; got 2"):
        loaded.load_setup(tmp_path / "setup", overwrite=True)


def test_a_setup_with_an_adapter_missing_changes_nothing(tmp_path):
    _, adapters = grafted("bert", a=BOTTLENECK, b=BOTTLENECK)
    adapters.save_setup(tmp_path, inarch.Stack("a", "b"))
    (tmp_path / "adapters" / "b" / "adapter.safetensors").write_bytes(b"")
    loaded = inarch.attach(tiny("bert").double())
    with pytest.raises(inarch.StateError, match=r"adapters/b"):
        loaded.load_setup(tmp_path)
    assert loaded.names == ()


def test_gates_show_how_far_they_are_open():
    model, adapters = grafted("bert", a="seq_bn[use_gating=True]|lora[use_gating=True]", b="seq_bn")
    adapters.activate(Parallel("a", "b"))
    with adapters.scores() as scores:
        output(model, "bert")
    assert scores.gates.keys() == {"a"}
    assert len(scores.gates["a"]) == 6
    assert {tuple(value.shape) for value in scores.gates["a"].values()} == {(3,)}
    assert all(0 < float(value.min()) <= float(value.max()) < 1 for value in scores.gates["a"].values())
    before = dict(scores.gates["a"])
    output(model, "bert")
    assert all(scores.gates["a"][key] is value for key, value in before.items())


def test_a_fusion_is_proved():
    """F of nothing is nothing: the layers have no constant, so with adapters that are zero nothing is added."""
    model, adapters = grafted("vit", a="seq_bn", b="seq_bn")
    adapters.add("bad", "bottleneck[original_ln_after=False]", unsound="allow")
    block = Fuse("a", "b")
    adapters.add_fusion(block)
    adapters.activate(block)
    assert "y = x + h + F(A1(x + h) + A2(x + h))" in str(adapters.check())
    assert adapters.check().sound
    for key in "ab":
        for name, parameter in adapters[key].items():
            if ".up." in name:
                parameter.data.zero_()
    found = output(model, "vit")
    adapters.deactivate()
    assert torch.equal(output(model, "vit"), found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a: a.activate(Fuse("a", "b")),
            r"has fusion layers of its own; got none named `a\+b`.*`add_fusion\(Fuse",
        ),
        (lambda a: a.add_fusion(Fuse("a", "c")), "are at the same sites; got `image0.0.self_attention` for only one"),
        (lambda a: a.add_fusion(Fuse("a", "d")), r"combine bottlenecks; got dynamic_fusion for `d` \(lora\)"),
        (lambda a: a.add_fusion(Fuse("d", "a")), r"combines what bottlenecks add to a sum; got `lora` of `d`"),
        (lambda a: a.add_fusion(Fuse("a", "x")), "must be added before it is used; got `x`"),
        (
            lambda a: a.add("f", "seq_bn|dynamic_fusion"),
            r"for the adapters that they combine; got `seq_bn\|dynamic_fusion` by itself.*`add_fusion\(Fuse\('a'",
        ),
        (lambda a: a.add_fusion(Fuse("a", "b"), "lora"), "have a configuration such as `dynamic_fusion`"),
        (
            lambda a: (a.add_fusion(Fuse("a", "b")), a.activate("a+b")),
            r"act where a `Fuse` combines.* got `a\+b` by itself",
        ),
    ],
)
def test_what_cannot_be_fused_is_refused(call, message):
    _, adapters = grafted("vit", a="seq_bn", b="seq_bn", c="seq_bn[mh_adapter=True]", d="lora")
    with pytest.raises(inarch.SetupError, match=message):
        call(adapters)
