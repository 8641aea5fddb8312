"""The handle on a model: adding, training, activating, copying, detaching."""

import contextlib
import copy
import io
import pickle
import threading

import pytest
import torch
from little_adapters import awake
from torch import nn

import inarch
from inarch import ConfigError, SetupError, SiteError, Stack, StateError
from inarch.methods.bottleneck import Bottleneck
from inarch.testing import PlainTransformer, tiny, tiny_inputs

UNSOUND = "seq_bn[original_ln_after=False]"


@pytest.fixture
def model():
    return tiny("vit-classifier")


@pytest.fixture
def inputs():
    return tiny_inputs("vit-classifier")


def test_attaching_changes_nothing_and_gives_the_same_handle_again(model, inputs):
    before, keys = model(**inputs).logits, set(model.state_dict())
    adapters = inarch.attach(model)
    assert inarch.attach(model) is adapters
    assert torch.equal(model(**inputs).logits, before)
    adapters.add("a", "lora")
    assert torch.equal(model(**inputs).logits, before)
    assert keys <= set(model.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_wrappers_share_the_handle_of_the_model_inside(model):
    adapters = inarch.attach(model)
    assert inarch.attach(nn.DataParallel(model)) is adapters
    assert inarch.attach(torch.compile(model, backend="eager")) is adapters


def test_a_part_of_an_attached_model_has_no_handle_of_its_own(model):
    inarch.attach(model)
    with pytest.raises(SiteError, match="A model has one handle"):
        inarch.attach(model.vit)


def test_detach_gives_the_model_back(model, inputs):
    before = model(**inputs).logits
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    children = [name for name, _ in model.named_modules()]
    adapters = inarch.attach(model)
    adapters.add("a", "double_seq_bn|lora[output_lora=True]")
    adapters.train("a", head=False)
    awake(adapters, "a")
    assert not torch.equal(model(**inputs).logits, before)
    assert adapters.detach() is model
    assert torch.equal(model(**inputs).logits, before)
    assert [name for name, _ in model.named_modules()] == children
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())
    assert inarch.attach(model) is not adapters


def test_train_leaves_exactly_the_adapter_and_the_head_trainable(model, inputs):
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.add("b", "lora")
    adapters.train("a")
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in (*adapters["a"].values(), *model.classifier.parameters())}
    model(**inputs).logits.sum().backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == trainable
    adapters.train("b", head=False)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapters["b"].values()}
    adapters.train("b", head=["classifier"])
    assert all(p.requires_grad for p in model.classifier.parameters())
    assert set(adapters.head("b")) == {"head.classifier.weight", "head.classifier.bias"}


def test_activation_and_loading_never_change_what_is_trainable(model, tmp_path):
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.add("b", "lora")
    adapters.save("b", tmp_path / "b")
    adapters.train("a")
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    adapters.activate("b")
    adapters.deactivate()
    with adapters.using(Stack("a", "b")):
        pass
    adapters.load(tmp_path / "b", overwrite=True)
    after = [(name, p.requires_grad) for name, p in model.named_parameters()]
    assert before == after


def test_using_is_undone_even_by_an_error(model, inputs):
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    awake(adapters, "a")
    adapters.activate("a")
    with contextlib.suppress(RuntimeError), adapters.using(None):
        assert adapters.setup is None
        raise RuntimeError
    assert adapters.setup == "a"


def test_an_unsound_configuration_is_refused_with_formula_reason_and_fix(model):
    adapters = inarch.attach(model)
    with pytest.raises(ConfigError) as caught:
        adapters.add("a", UNSOUND)
    text = str(caught.value)
    assert "skip connection lost" in text
    assert "`y = h + A(x + h)` becomes `y = h`, the base model computes `y = x + h`" in text
    assert "Set `residual_before_ln=False` or `original_ln_after=True`" in text
    assert adapters.names == ()
    adapters.add("a", UNSOUND, unsound="allow")
    adapters.activate("a")
    assert not adapters.check().sound


def test_a_stack_that_loses_the_function_is_refused_although_its_parts_keep_it(model):
    adapters = inarch.attach(model)
    adapters.add("a", "adapter_plus")
    adapters.add("b", "adapter_plus")
    with pytest.raises(SetupError, match="skip connection doubled"):
        adapters.activate(Stack("a", "b"))
    assert adapters.setup is None
    adapters.add("c", "seq_bn")
    adapters.activate(Stack("c", "a"))
    assert adapters.setup == Stack("c", "a")


def test_check_of_a_configuration_leaves_the_model_untouched(model):
    keys = set(model.state_dict())
    report = inarch.check(model, "seq_bn[reduction_factor=2]")  # wide enough that no weights leave all of it dead
    assert report.sound and not report.findings
    assert "y = x + h + A(x + h)" in str(report)
    assert not inarch.check(model, UNSOUND).sound
    assert set(model.state_dict()) == keys
    with pytest.raises(SetupError, match="There must be something to check"):
        inarch.check(model)


@pytest.mark.parametrize("name", ["", " a", "a.b", "a/b", "a,b", "a|b", "a[b]", "a\nb", "a\0b", 3])
def test_a_name_that_cannot_be_a_key_is_refused(name, model):
    with pytest.raises(SetupError, match="An adapter's name is text without"):
        inarch.attach(model).add(name, "lora")


@pytest.mark.parametrize("name", ["keys", "forward", "my adapter", "été", "a-b_c", "adapters"])
def test_any_other_name_will_do(name, model, tmp_path):
    adapters = inarch.attach(model)
    adapters.add(name, "lora")
    adapters.activate(name)
    adapters.save(name, tmp_path / "a")
    assert adapters[name] and copy.deepcopy(model) is not model


def test_unknown_and_active_adapters_are_named(model):
    adapters = inarch.attach(model)
    adapters.add("sentiment", "lora")
    with pytest.raises(SetupError, match="got `sentimnt`. Did you mean `sentiment`"):
        adapters.activate("sentimnt")
    with pytest.raises(SetupError, match="got `sentiment` again"):
        adapters.add("sentiment", "lora")
    with pytest.raises(SetupError, match="A setup is the name of an adapter"):
        adapters.activate(["sentiment"])
    adapters.activate("sentiment")
    with pytest.raises(SetupError, match="An active adapter cannot be removed"):
        adapters.remove("sentiment")
    adapters.deactivate()
    adapters.remove("sentiment")
    assert adapters.names == () and "sentiment" not in adapters
    adapters.add("b", "lora")
    with pytest.raises(SetupError, match="`head` names modules of the model; got `classifir`.*`classifier`"):
        adapters.train("b", head=["classifir"])


def test_a_configuration_that_matches_nothing_is_refused(model):
    adapters = inarch.attach(model)
    for config, message in [
        ("seq_bn[cross_adapter=True]", r"got `cross_adapter=True` for ViTForImageClassification"),
        ("seq_bn[leave_out=[0,1]]", "must reach at least one site"),
        ("seq_bn[leave_out=[7]]", "`leave_out` names layers of the model, 0 to 1; got 7"),
        ("seq_bn[reduction_factor={'7':2,'default':4}]", "`reduction_factor` names layers"),
        ("seq_bn[reduction_factor={'0':2}]", "got none for layer 1"),
        ("lora[gate_lora=True]", "got `gate` from `gate_lora`"),
        ("seq_bn[non_linearity=rellu]", "activation by name; got 'rellu'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            adapters.add("a", config)
    assert adapters.names == () and not [key for key in model.state_dict() if "inarch" in key]


def test_overwriting_an_active_adapter_takes_effect(model, inputs):
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.activate("a")
    awake(adapters, "a")
    before = model(**inputs).logits
    adapters.add("a", "lora", overwrite=True)
    assert not torch.equal(model(**inputs).logits, before)
    assert set(adapters["a"]) == {f"image0.{i}.self_attention.lora.{r}.{m}" for i in (0, 1) for r in "qv" for m in "AB"}


@pytest.mark.parametrize(
    "config", ["lora", "prefix_tuning_flat[prefix_length=2]", "vpt_shallow"]
)  # the latter are tried
def test_an_overwritten_adapter_keeps_its_place_among_the_names(model, config, tmp_path):
    """Adapters of prefixes and prompts are tried in the model before they are stored."""
    adapters = inarch.attach(model)
    for name in ("a", "b", "c"):
        adapters.add(name, config)
    adapters.save("b", tmp_path / "b")
    adapters.add("b", config, overwrite=True)
    adapters.load(tmp_path / "b", name="a", overwrite=True)
    assert adapters.names == ("a", "b", "c")
    adapters.remove("a")
    adapters.add("a", config)
    assert adapters.names == ("b", "c", "a")


def test_a_deep_copy_has_a_handle_and_adapters_of_its_own(model, inputs):
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn|lora")
    adapters.activate("a")
    awake(adapters, "a")
    expected = model(**inputs).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(**inputs).logits, expected)
    handle = inarch.attach(other)
    assert handle is not adapters and handle.model is other and handle.setup == "a"
    awake(handle, "a")
    assert not torch.equal(other(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)
    handle.deactivate()
    assert torch.equal(model(**inputs).logits, expected)


def test_a_pickled_model_has_a_handle_that_works(model, inputs):
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn|lora")
    adapters.activate("a")
    awake(adapters, "a")
    expected = model(**inputs).logits
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(**inputs).logits, expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    third = torch.load(buffer, weights_only=False)
    inarch.attach(third).deactivate()
    assert not torch.equal(third(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)


def test_forwards_in_several_threads_do_not_mix(model):
    adapters = inarch.attach(model)
    adapters.add("a", "double_seq_bn[original_ln_before=True]|lora")
    adapters.activate("a")
    awake(adapters, "a")
    batches = [tiny_inputs("vit-classifier", seed=seed) for seed in range(8)]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        wrong = []

        def work(number):
            outputs = [model(**batches[number]).logits for _ in range(20)]
            wrong.extend(number for output in outputs if not torch.equal(output, expected[number]))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_the_summary_counts_what_there_is(model):
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn[reduction_factor=4]")
    adapters.train("a")
    count = 2 * (32 * 8 + 8 + 8 * 32 + 32)
    assert sum(p.numel() for p in adapters["a"].values()) == count
    text = str(adapters)
    assert f"{count:,}" in text and "seq_bn[reduction_factor=4]" in text
    assert adapters.plan().num_parameters == count
    assert "image0.1.mlp.bottleneck" in str(adapters.plan("a"))


def test_a_model_of_no_library_is_adapted_like_any_other():
    model = PlainTransformer().eval()
    x = torch.randn(2, 6, 32)
    before = model(x)
    adapters = inarch.attach(model, example_inputs={"x": x})
    adapters.add("a", "double_seq_bn|lora[attn_matrices=[q,k,v,o],output_lora=True]")
    adapters.train("a", head=["head"])
    awake(adapters, "a")
    assert not torch.equal(model(x), before)
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapters["a"].values())
    adapters.detach()
    assert torch.equal(model(x), before)


def test_the_save_pretrained_of_a_part_writes_its_base_and_says_what_stays(tmp_path, caplog):
    """As of the encoder in a model of one's own; a copy of the part saves itself, too."""
    outer = tiny("vit-classifier")
    base = {key: value.clone() for key, value in outer.vit.state_dict().items()}
    adapters = inarch.attach(outer)
    adapters.add("a", "seq_bn")
    for number, part in enumerate((outer.vit, copy.deepcopy(outer.vit))):
        caplog.clear()
        part.save_pretrained(tmp_path / str(number))
        assert "The base of ViTModel is saved without the 8 tensors of adapters in it" in caplog.text
        loaded, info = type(outer.vit).from_pretrained(
            tmp_path / str(number), output_loading_info=True, add_pooling_layer=False
        )
        assert not any(info.values())
        assert all(torch.equal(value, base[key]) for key, value in loaded.state_dict().items())
    adapters.detach()
    assert "save_pretrained" not in vars(outer.vit)


def test_a_model_around_an_attached_one_keeps_the_adapters_in_its_own_state(model, inputs, tmp_path):
    """It is not inarch's to divide; what it writes loads, and has all that an attached part has."""
    adapters = inarch.attach(model.vit)
    adapters.add("a", "seq_bn")
    adapters.activate("a")
    awake(adapters, "a")
    found, own = model.state_dict(), model.vit.state_dict()
    assert {key for key in found if key.startswith("vit.")} == {f"vit.{key}" for key in own}
    ours = {f"vit.{key}" for key in own if "inarch" in key}
    assert len(ours) == len(adapters["a"])

    model.save_pretrained(tmp_path / "model")
    again, told = type(model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert set(told["unexpected_keys"]) == ours and not told["missing_keys"]
    with torch.no_grad():
        with adapters.using(None):
            torch.testing.assert_close(again.eval()(**inputs).logits, model(**inputs).logits)
        handle = inarch.attach(again.vit)
        handle.add("a", "seq_bn")
        handle.activate("a")
        with pytest.raises(StateError, match=r"holds them all; got none for .* first `vit\..*inarch"):
            again.load_state_dict({key: value for key, value in found.items() if key not in ours}, strict=False)
        again.load_state_dict(found)
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_the_save_pretrained_of_a_model_with_adapters_loads_as_the_base(model, inputs, tmp_path):
    before = model(**inputs).logits
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.activate("a")
    awake(adapters, "a")
    after = model(**inputs).logits
    model.save_pretrained(tmp_path / "model")
    plain, info = type(model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(plain.eval()(**inputs).logits, before)
    handle = inarch.attach(plain)
    handle.load(tmp_path / "model" / "adapters" / "a")
    handle.activate("a")
    assert torch.equal(plain(**inputs).logits, after)


def test_a_state_dict_without_the_adapters_is_refused(model):
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    full = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(inarch.StateError, match="holds them all; got none for 8 tensors"):
        model.load_state_dict(plain, strict=False)
    assert not model.load_state_dict(full).missing_keys
    adapters.detach()
    assert not model.load_state_dict(plain).missing_keys


def test_adding_makes_every_module_once(monkeypatch):
    made = []
    init = Bottleneck.__init__
    monkeypatch.setattr(Bottleneck, "__init__", lambda self, *args: made.append(args) or init(self, *args))
    adapters = inarch.attach(tiny("vit"))
    adapters.add("a", "seq_bn")
    assert len(made) == 2
    assert adapters.check().num_parameters == sum(p.numel() for p in adapters["a"].values())


def test_a_configuration_that_no_module_can_be_made_of_is_refused_by_check_and_by_add():
    model = tiny("vit")
    checks = (inarch.check, lambda m, c: inarch.check(m, c, measure=False))
    for refuse in (*checks, lambda m, c: inarch.attach(m).add("a", c)):
        with pytest.raises(ConfigError, match="`non_linearity` must be an activation by name; got 'foo'"):
            refuse(model, "seq_bn[non_linearity=foo]")
    for check in checks:
        (finding,) = check(model, "seq_bn[reduction_factor={'0':8}]").findings
        assert (finding.code, finding.level) == ("no-such-place", "error") and "got none for layer 1" in finding.message
    with pytest.raises(ConfigError, match="got none for layer 1"):
        inarch.attach(model).add("a", "seq_bn[reduction_factor={'0':8}]")
    assert not inarch.attach(model).names


def test_a_model_of_ones_own_whose_head_is_unknown_is_told_so(caplog):
    model = PlainTransformer()
    adapters = inarch.attach(model, example_inputs=torch.randn(2, 5, 32))
    adapters.add("a", "seq_bn")
    adapters.train("a")
    assert "No task head is known in PlainTransformer" in caplog.text
    assert not model.head.weight.requires_grad
    caplog.clear()
    adapters.train("a", head=["head"])
    assert not caplog.records and model.head.weight.requires_grad
