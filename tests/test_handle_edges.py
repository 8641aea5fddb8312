"""What could leave a model half changed, or run something that was never proved."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import inarch
from inarch import ConfigError, SetupError, SiteError, Stack, StateError
from inarch.attach import slot_of
from inarch.compose import last
from inarch.core.site import Tap
from inarch.testing import PlainTransformer, tiny, tiny_inputs


@pytest.fixture
def model():
    return tiny("vit-classifier")


@pytest.fixture
def inputs():
    return tiny_inputs("vit-classifier")


def test_a_stack_that_repeats_an_adapter_is_proved_too(model):
    adapters = inarch.attach(model)
    adapters.add("p", "adapter_plus")
    with pytest.raises(SetupError, match="skip connection doubled"):
        adapters.activate(Stack("p", "p"))
    assert last(Stack("a", "b", "a")) == "a"
    assert last(Stack("a", "b")) == "b"


def test_overwriting_a_member_of_an_active_stack_is_proved_with_the_stack(model):
    adapters = inarch.attach(model)
    adapters.add("c", "seq_bn")
    adapters.add("d", "adapter_plus")
    adapters.activate(Stack("c", "d"))
    with pytest.raises(SetupError, match="skip connection doubled"):
        adapters.add("c", "adapter_plus", overwrite=True)
    assert str(adapters.config("c")) == "seq_bn" and adapters.check().sound


def test_a_refused_state_dict_leaves_the_weights_as_they_were(model):
    inarch.attach(model).add("a", "seq_bn")
    zeros = {key: torch.zeros_like(value) for key, value in model.state_dict().items() if "inarch" not in key}
    before = model.classifier.weight.clone()
    with pytest.raises(StateError, match="holds them all"):
        model.load_state_dict(zeros, strict=False)
    assert torch.equal(model.classifier.weight, before)


def test_a_missing_base_tensor_is_still_missing(model):
    """Only a checkpoint without any of the frozen base is taken as one of adapters alone."""
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.train("a")
    full = dict(model.state_dict())
    del full["vit.embeddings.cls_token"]
    with pytest.raises(RuntimeError, match="cls_token"):
        model.load_state_dict(full)
    wrapper = nn.ModuleDict({"first": nn.Linear(2, 2), "model": model})
    outer = dict(wrapper.state_dict())
    del outer["first.weight"]
    with pytest.raises(RuntimeError, match="first.weight"):
        wrapper.load_state_dict(outer)
    trained = {k: v for k, v in model.state_dict().items() if "inarch" in k or k.startswith("classifier")}
    assert not model.load_state_dict(trained, strict=False).missing_keys


def test_an_adapter_that_could_not_read_the_stream_is_never_added(model):
    sites = inarch.probe(model)
    blind = dataclasses.replace(sites, sites=tuple(dataclasses.replace(site, stream=None) for site in sites))
    adapters = inarch.attach(model, layout=blind)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SiteError, match="needs a place where the layer's stream can be read"):
        adapters.add("a", "seq_bn")
    adapters.add("a", "seq_bn[original_ln_before=False]")
    adapters.activate("a")
    with pytest.raises(SiteError, match="got none at site"):
        adapters.add("a", "par_bn", overwrite=True)
    assert adapters.setup == "a" and adapters.names == ("a",)
    assert [p.requires_grad for p in model.parameters() if p.dim()][: len(flags)] == flags


def test_a_layer_that_has_such_a_child_already_is_refused_before_any_is_changed(model):
    first, second = (model.get_submodule(inarch.probe(model)[f"image0.{n}.mlp"].layer_path) for n in (0, 1))
    second.inarch = nn.Identity()
    with pytest.raises(SiteError, match="A layer's child `inarch` belongs to inarch"):
        inarch.attach(model)
    assert not hasattr(first, "inarch")


def test_a_detached_handle_says_so_and_harms_no_other(model):
    old = inarch.attach(model)
    old.add("a", "lora")
    with old.using(None):
        old.detach()
    new = inarch.attach(model)
    new.add("a", "lora")
    assert old.detach() is model
    assert new.names == ("a",) and new["a"]
    with pytest.raises(SetupError, match="that was detached"):
        old.activate("a")
    with pytest.raises(SetupError, match="that was detached"):
        old.add("b", "lora")


def test_detach_gives_back_what_was_frozen(model):
    model.vit.embeddings.requires_grad_(False)
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.train("a")
    adapters.detach()
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == flags


def test_a_layout_for_an_attached_model_is_refused(model):
    layout = inarch.probe(model).to_dict()
    inarch.attach(model, layout=layout)
    with pytest.raises(SiteError, match="which is attached already"):
        inarch.attach(model, layout=layout)


def test_nothing_of_a_forward_is_held_after_an_exception(model, inputs):
    adapters = inarch.attach(model)
    adapters.add("a", "double_seq_bn[original_ln_before=True]")
    adapters.train("a")

    def stop(*_):
        raise RuntimeError("stop")

    site = adapters.sites["image0.1.self_attention"]
    handle = model.get_submodule(site.absolute(site.projections["q"][0].path)).register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        model(**inputs)
    handle.remove()
    assert slot_of(model, adapters.sites["image0.1.self_attention"])._held.stream is not None
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)
    adapters.deactivate()
    assert all(slot_of(model, site)._held.stream is None for site in adapters.sites)


def test_a_head_that_two_adapters_trained_is_saved_with_each_as_it_was(model, tmp_path):
    adapters = inarch.attach(model)
    adapters.add("a", "lora")
    adapters.train("a")
    nn.init.constant_(model.classifier.bias, 1.0)
    adapters.add("b", "lora")
    adapters.train("b")
    nn.init.constant_(model.classifier.bias, 2.0)
    for name, value in {"a": 1.0, "b": 2.0}.items():
        adapters.save(name, tmp_path / name)
        fresh = tiny("vit-classifier")
        inarch.attach(fresh).load(tmp_path / name)
        assert fresh.classifier.bias.tolist() == [value] * 5


@pytest.mark.parametrize("begin_anew", ["overwrite", "remove"])
def test_an_adapter_that_begins_anew_has_nothing_of_an_old_head(model, tmp_path, begin_anew):
    adapters = inarch.attach(model)
    for name in "ab":
        adapters.add(name, "lora")
        adapters.train(name)
    if begin_anew == "remove":
        adapters.remove("a")
    adapters.add("a", "lora", overwrite=True)
    adapters.save("a", tmp_path / "a")
    assert inarch.attach(tiny("vit-classifier")).load(tmp_path / "a") == "a"


def test_the_buffers_of_a_head_are_saved_with_it(tmp_path):
    def make():
        torch.manual_seed(0)
        model = PlainTransformer()
        model.head = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 3))
        return model

    model, x = make(), torch.randn(4, 5, 32)
    adapters = inarch.attach(model.eval(), example_inputs={"x": x})
    adapters.add("a", "lora")
    adapters.train("a", head=["head"])
    model.train()
    for _ in range(5):
        model(torch.randn(4, 5, 32) * 3 + 1)
    adapters.save("a", tmp_path / "a")
    other = make().eval()
    handle = inarch.attach(other, example_inputs={"x": x})
    handle.load(tmp_path / "a")
    handle.activate("a")
    assert torch.equal(other(x), model.eval()(x))


def test_labels_in_another_order_are_another_head(model, tmp_path):
    model.config.id2label = dict(enumerate("vwxyz"))
    adapters = inarch.attach(model)
    adapters.add("a", "lora")
    adapters.train("a")
    adapters.save("a", tmp_path / "a")
    other = tiny("vit-classifier")
    inarch.attach(other).load(tmp_path / "a", name="unnamed labels")
    other.config.id2label = dict(enumerate("wvxyz"))
    with pytest.raises(StateError, match="agree in order; got `v` and `w` for label 0"):
        inarch.attach(other).load(tmp_path / "a")


def test_the_head_of_a_class_without_a_base_model_is_found():
    from transformers import CLIPConfig, CLIPForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 99}, vision_config=sizes | {"image_size": 32, "patch_size": 8}, num_labels=3
    )
    model = CLIPForImageClassification(config).eval()
    adapters = inarch.attach(model)
    adapters.add("a", "lora")
    adapters.train("a")
    assert set(adapters.head("a")) == {"head.classifier.weight", "head.classifier.bias"}
    assert all(p.requires_grad for p in model.classifier.parameters())


@pytest.mark.parametrize(
    "config", ["adapter_plus", "scaled_par_bn", "seq_bn[use_gating=True]", "lora[use_gating=True]"]
)
def test_single_precision_adapters_run_on_a_half_precision_base(config):
    model = tiny("vit").to(torch.bfloat16)
    adapters = inarch.attach(model)
    adapters.add("a", config)
    adapters.activate("a")
    expected = model(pixel_values=tiny_inputs("vit")["pixel_values"].bfloat16()).last_hidden_state
    for parameter in adapters["a"].values():
        parameter.data = parameter.data.float()
    found = model(pixel_values=tiny_inputs("vit")["pixel_values"].bfloat16()).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=0.1)


def test_replicas_of_data_parallel_are_refused(model, inputs):
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.activate("a")
    for module in model.modules():
        module._is_replica = True
    with pytest.raises(SetupError, match="got a replica of `nn.DataParallel`"):
        model(**inputs)


def test_pushing_a_model_with_adapters_is_refused_before_anything_is_written(model, tmp_path):
    inarch.attach(model).add("a", "lora")
    with pytest.raises(SetupError, match="published in two parts"):
        model.push_to_hub("somebody/something")
    with pytest.raises(SetupError, match="published in two parts"):
        model.save_pretrained(tmp_path / "m", push_to_hub=True)
    assert not (tmp_path / "m").exists()


def test_layer_numbers_are_those_of_the_model_where_a_layer_has_no_site(model):
    sites = inarch.probe(model)
    second = dataclasses.replace(sites, sites=tuple(site for site in sites if site.layer == 1))
    adapters = inarch.attach(model, layout=second)
    with pytest.raises(ConfigError, match="must reach at least one site"):
        adapters.add("a", "seq_bn[leave_out=[1]]")
    adapters.add("a", "seq_bn[leave_out=[0]]")
    assert {key.split(".")[1] for key in adapters["a"]} == {"1"}


def test_where_a_scale_follows_the_tap_the_formula_says_so():
    model = tiny("beit")
    last = {"self_attention": "o", "mlp": "down"}  # the projection before the scale
    sites = [
        dataclasses.replace(
            site, output=Tap(path=site.projections[last[site.role]][0].path, side="out", key=()), exact=False
        )
        for site in inarch.probe(model)
    ]
    layout = dataclasses.replace(inarch.probe(model), sites=tuple(sites))
    text = str(inarch.check(model, "seq_bn", layout=layout))
    assert "y = x + s(h + A(x + h))" in text


def test_a_composition_that_cannot_run_has_no_plan(model):
    adapters = inarch.attach(model)
    for name in ("a", "b", "a+b"):
        adapters.add(name, "lora")
    with pytest.raises(
        SetupError, match=r"combines what bottlenecks add to a sum; got `lora` of `a` at `image0\.0\.\w+"
    ):
        adapters.plan(inarch.Fuse("a", "b"))


LAST_NORM = "seq_bn[circuits={'output_adapter':'last_norm'}]"
"""What no ViT can run: it has no norm at the end of a branch."""


def test_what_cannot_be_activated_leaves_what_is_active(model, inputs):
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn[init_weights=bert]")
    adapters.add("b", LAST_NORM, unsound="allow")
    adapters.activate("a")
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    expected = model(**inputs).logits
    for change in (adapters.activate, adapters.train, lambda name: adapters.using(name).__enter__()):
        with pytest.raises(SiteError, match="takes the norm of the last layer"):
            change("b")
        assert adapters.setup == "a" and torch.equal(model(**inputs).logits, expected)
        assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags


def test_an_active_adapter_outlives_one_that_cannot_run_in_its_place(model, inputs, tmp_path):
    """The adapter, its configuration and the head it was trained with."""
    other = inarch.attach(tiny("vit", seed=1))
    other.add("a", LAST_NORM, unsound="allow")
    other.save("a", tmp_path / "b")
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.train("a")
    tensors, config = {key: p.detach().clone() for key, p in adapters["a"].items()}, adapters.config("a")
    expected = model(**inputs).logits
    for change in (
        lambda: adapters.add("a", LAST_NORM, overwrite=True, unsound="allow"),
        lambda: adapters.load(tmp_path / "b", name="a", overwrite=True, other_base="allow"),
    ):
        with pytest.raises(SiteError, match="takes the norm of the last layer"):
            change()
        assert adapters.setup == "a" and adapters.config("a") == config and adapters.head("a")
        assert all(torch.equal(p, tensors[key]) and p.requires_grad for key, p in adapters["a"].items())
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("is_replaced", [True, False], ids=["replaced", "removed"])
def test_a_model_that_has_lost_a_layer_is_told_so_and_can_be_detached(model, is_replaced):
    keys = set(model.state_dict())
    adapters = inarch.attach(model)
    adapters.add("a", "double_seq_bn")
    adapters.activate("a")
    parent, _, number = adapters.sites["image0.1.mlp"].layer_path.rpartition(".")
    layers = model.get_submodule(parent)
    fresh = dict(tiny("vit-classifier").named_modules())[f"{parent}.{number}"]
    layers[int(number)] = fresh
    if not is_replaced:
        del layers[int(number)]
    with pytest.raises(SiteError, match=r"keeps the layers that it was attached with; got none .* `image0\.1\."):
        adapters.add("b", "seq_bn")
    adapters.detach()
    lost = f"{parent}.{number}."
    assert set(model.state_dict()) == {key for key in keys if is_replaced or not key.startswith(lost)}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert inarch.attach(model).names == ()


def test_a_configuration_is_tried_under_a_name_that_is_free(model):
    adapters = inarch.attach(model)
    for name in ("adapter", "adapter 2"):
        adapters.add(name, "lora")
    assert inarch.check(model, "seq_bn", measure=False).sound
    assert adapters.names == ("adapter", "adapter 2")


def test_a_model_that_saves_itself_in_a_way_of_its_own_is_not_written_with_adapters_in_it(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny("vit")

        def forward(self, **inputs):
            return self.inner(**inputs)

        def save_pretrained(self, path, *, note="none"):
            self.inner.save_pretrained(path)
            (path / "note").write_text(note)

    model = Wrapped()
    adapters = inarch.attach(model, example_inputs=tiny_inputs("vit"))
    model.save_pretrained(tmp_path / "base", note="one")
    assert (tmp_path / "base" / "note").read_text() == "one"
    adapters.add("a", "seq_bn")
    with pytest.raises(SetupError, match="takes a `save_directory`; got one of Wrapped with a way of its own"):
        model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()
    adapters.detach()
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "note").exists()


class _Reentrant(nn.Module):
    """Runs its layers under reentrant checkpointing, and does not say where its tokens are embedded."""

    gradient_checkpointing = True

    def __init__(self):
        super().__init__()
        self.inner = PlainTransformer()

    def gradient_checkpointing_enable(self):
        """As transformers names it."""

    def _gradient_checkpointing_func(self, *args):
        raise AssertionError

    def forward(self, x):
        return self.inner(x)


def test_a_model_that_cannot_be_attached_for_its_checkpointing_is_left_as_it_was():
    model = _Reentrant()
    before = dict(vars(model)), [*model.named_modules()]
    with pytest.raises(SetupError, match="Reentrant checkpointing trains adapters only where"):
        inarch.attach(model, example_inputs=torch.zeros(2, 5, 32))
    assert (dict(vars(model)), [*model.named_modules()]) == before
    _Reentrant.gradient_checkpointing = False
    try:
        assert inarch.attach(model, example_inputs=torch.zeros(2, 5, 32)).names == ()
    finally:
        _Reentrant.gradient_checkpointing = True


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda a: a.add("b", unsound="alow"),
            SetupError,
            "`unsound` is `refuse` or `allow`; got 'alow'. Did you mean",
        ),
        (lambda a: a.load(".", other_base="Allow"), SetupError, "`other_base` is `refuse` or `allow`; got 'Allow'"),
        (lambda a: a.activate("a", skip_layers=[0.5]), ConfigError, "`skip_layers` names layers.*0 to 1; got 0.5"),
        (lambda a: a.activate("a", skip_layers="0"), ConfigError, "`skip_layers` names layers.*0 to 1; got 0"),
        (lambda a: a.add_fusion("a"), SetupError, "layers are those of a `Fuse`; got 'a'"),
        (lambda a: a.share("a"), SetupError, "named in a list; got 'a'"),
        (lambda a: a.share([]), SetupError, "named in a list; got \\[\\]"),
        (lambda a: a.remove(None), SetupError, "must be added before it is used; got `None`. Known: `a`"),
        (lambda _: inarch.attach("vit"), SiteError, "A model is a PyTorch module.*got str"),
    ],
)
def test_what_is_no_word_of_an_argument_is_refused_by_name(model, call, error, message):
    """A misspelt word would else be one of the others in silence."""
    adapters = inarch.attach(model)
    adapters.add("a")
    with pytest.raises(error, match=message):
        call(adapters)
    assert (adapters.names, adapters.setup, adapters.skipped) == (("a",), None, ())
