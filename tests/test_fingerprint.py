"""Another base is noticed, wherever it differs; the same base is recognised, whatever its dtype, names and task."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import inarch
from inarch import StateError, fingerprint
from inarch.fingerprint import compare_bases, describe_sites
from inarch.state import FORMAT_VERSION
from inarch.testing import PlainTransformer, tiny, tiny_inputs

FIXTURE = Path(__file__).parent / "fixtures" / "vit_transformers_5_5"


def record_of(model, sites, heads=()):
    """What an adapter file would say of its base, after a round trip through JSON."""
    found = {"sites": describe_sites(sites), "base": {"fingerprint": fingerprint.fingerprint(model, sites, heads)}}
    return json.loads(json.dumps(found))


def by_values(model, shape=None, kind=None):
    """The first parameter in a module of a kind, or of a shape."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if (kind is None or isinstance(module, kind)) and (shape is None or parameter.dim() == shape):
                return parameter
    raise AssertionError("no such parameter")


def at(key, part, leaf):
    """Finds a parameter of a site: of the projection in a role, or of a norm. Its modules are called otherwise in
    other releases of transformers."""

    def find(model):
        site = inarch.probe(model)[key]
        path = site.projections[part][0].path if part in site.projections else getattr(site, part)
        return getattr(model.get_submodule(site.absolute(path)), leaf)

    return find


def named(part):
    """Finds the first parameter whose name has that part."""
    return lambda model: next(tensor for name, tensor in model.named_parameters() if part in name)


PLACES = {
    "embeddings": ("bert", lambda m: m.embeddings.word_embeddings.weight, r"at shape \(99, 32\) outside the layers of"),
    "patches": ("vit", lambda m: by_values(m, kind=nn.Conv2d), "outside the layers of `image0`"),
    "class token": ("vit", lambda m: m.embeddings.cls_token, r"at shape \(32,\) outside the layers"),
    "last norm": ("vit", lambda m: m.layernorm.bias, r"at shape \(32,\) outside the layers"),
    "norm of a layer": (
        "vit",
        at("image0.1.self_attention", "pre_norm", "bias"),
        "image0.1.self_attention.pre_norm.bias",
    ),
    "norm after a sum": ("bert", at("text0.0.mlp", "post_norm", "weight"), "text0.0.mlp.post_norm.weight"),
    "bias": ("vit", at("image0.0.mlp", "up", "bias"), "`image0.0.mlp.up.bias`"),
    "fused bias": ("gpt2", at("text0.1.self_attention", "q", "bias"), "`text0.1.self_attention.[qkv].bias`"),
    "layer scale": ("dinov2", named("layer_scale1"), "`image0.0.vectors`"),
    "table of positions": (
        "swin",
        named("relative_position_bias_table"),
        "`image0.0.matrices`",
    ),
    "between the layers": ("swin", named("downsample.reduction.weight"), "outside the layers"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_base_that_differs_in_one_value_of_one_tensor_is_noticed(place):
    name, find, message = PLACES[place]
    model = tiny(name)
    sites = inarch.probe(model)
    record = record_of(model, sites)
    assert not compare_bases(record, sites, model)
    with torch.no_grad():
        find(model).view(-1)[-1] += 0.01
    found = compare_bases(record, sites, model)
    assert found.startswith("the weights of an adapter's base and of the model must agree; got others at ")
    assert re.search(message, found)


def test_every_single_value_of_a_matrix_counts():
    model = tiny("vit")
    sites = inarch.probe(model)
    record = record_of(model, sites)
    weight = at("image0.0.mlp", "up", "weight")(model)
    for place in range(0, weight.numel(), 97):
        with torch.no_grad():
            weight.view(-1)[place] += 0.01
            assert "image0.0.mlp.up.weight" in compare_bases(record, sites, model)
            weight.view(-1)[place] -= 0.01


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama", "t5", "beit", "dinov2", "swin", "clip", "whisper"])
def test_the_same_weights_in_another_precision_are_the_same_base(name):
    model = tiny(name)
    sites = inarch.probe(model)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = copy.deepcopy(model).to(dtype)
        assert not compare_bases(record_of(model, sites), sites, other)
        assert not compare_bases(record_of(other, sites), sites, model)


def test_values_that_half_precision_cannot_hold_are_no_difference():
    """All of a vector may be rounded the same way, and to zero."""
    model = tiny("dinov2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(0.1 if "1.layer_scale" in name else 1e-5)
            elif "norm1.bias" in name:
                parameter.fill_(1e-9)
    sites = inarch.probe(model)
    for dtype in (torch.bfloat16, torch.float16):
        assert not compare_bases(record_of(model, sites), sites, copy.deepcopy(model).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "change"), [(torch.float32, 1e-3), (torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)]
)
def test_a_base_that_was_tuned_a_little_is_another_base(dtype, change):
    model = tiny("bert")
    sites = inarch.probe(model)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + change * torch.randn_like(parameter))
    assert "weights of an adapter's base" in compare_bases(record_of(model, sites), sites, tuned.to(dtype))


def test_what_a_task_adds_is_no_part_of_the_base(tmp_path):
    """A base model's pooler and a task's own dense layer have one shape and are not the same thing."""
    from transformers import BertForMaskedLM, BertForTokenClassification

    base = tiny("bert")
    adapters = inarch.attach(base)
    adapters.add("a", "seq_bn")
    adapters.save("a", tmp_path / "a")
    for task in (BertForMaskedLM, BertForTokenClassification):
        model = task(base.config).eval()
        weights = {k: v for k, v in base.state_dict().items() if "inarch" not in k and not k.startswith("pooler")}
        model.bert.load_state_dict(weights)
        assert inarch.attach(model).load(tmp_path / "a") == "a"


def test_a_head_that_only_the_user_knows_is_no_part_of_the_base(tmp_path):
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(32, 32)
            self.body = PlainTransformer()

        def forward(self, x):
            return self.body(self.head(x))

    model, inputs = HeadFirst().eval(), {"x": torch.randn(2, 4, 32)}
    adapters = inarch.attach(model, example_inputs=inputs)
    adapters.add("a", "lora")
    adapters.train("a", head=["head"])
    torch.nn.init.normal_(model.head.weight)
    adapters.save("a", tmp_path / "a")
    other = HeadFirst().eval()
    other.body.load_state_dict({k: v for k, v in model.body.state_dict().items() if "inarch" not in k})
    assert inarch.attach(other, example_inputs=inputs).load(tmp_path / "a") == "a"


def test_what_cannot_be_read_is_unknown_and_no_difference():
    model = tiny("vit")
    sites = inarch.probe(model)
    record = record_of(model, sites)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert fingerprint.fingerprint(empty, sites) == "unknown"
    assert not compare_bases(record, sites, empty)
    assert not compare_bases(record_of(empty, sites), sites, model)


def test_a_large_tensor_is_read_in_equally_spaced_rows(monkeypatch):
    monkeypatch.setattr(fingerprint, "_WHOLE", 300)
    model = tiny("vit")
    sites = inarch.probe(model)
    record = record_of(model, sites)
    assert not compare_bases(record, sites, copy.deepcopy(model).half())
    with torch.no_grad():
        at("image0.0.mlp", "up", "weight")(model).mul_(1.01)
    assert "mlp.up.weight" in compare_bases(record, sites, model)


def test_a_fingerprint_made_under_another_release_is_compared():
    """It was made under transformers 5.5, whose modules have other names."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(FIXTURE / "base").eval()
    adapters = inarch.attach(model)
    source = FIXTURE / f"adapter_format_{FORMAT_VERSION}"
    adapters.load(source, name="same")
    site = adapters.sites["image0.0.self_attention"]
    with torch.no_grad():
        model.get_submodule(site.absolute(site.projections["k"][0].path)).weight.mul_(1.1)
    with pytest.raises(StateError, match="got others at `image0.0.self_attention.k"):
        adapters.load(source, name="other")


# Towers


def test_an_adapter_for_one_tower_loads_into_that_tower_alone(tmp_path):
    model, inputs = tiny("clip"), tiny_inputs("clip")
    adapters = inarch.attach(model)
    # The image tower runs first, so its layers are 0 and 1.
    adapters.add("a", "seq_bn[reduction_factor={'2':4,'default':8},leave_out=[0,1]]")
    _move(adapters["a"])
    adapters.activate("a")
    expected = model.get_text_features(input_ids=inputs["input_ids"])
    expected = getattr(expected, "pooler_output", expected)
    adapters.save("a", tmp_path / "a")

    text = tiny("clip")
    handle = inarch.attach(text.text_model)
    handle.load(tmp_path / "a")
    assert str(handle.config("a")) == "seq_bn[reduction_factor={'0':4.0,'default':8.0}]".replace(".0", "")
    handle.activate("a")
    found = text.text_projection(text.text_model(input_ids=inputs["input_ids"]).pooler_output)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(StateError, match="first `text0.0.self_attention`: .* absent in"):
        inarch.attach(text.vision_model).load(tmp_path / "a")


def test_an_adapter_for_a_bare_tower_loads_where_there_are_more(tmp_path):
    bare = tiny("clip").text_model
    adapters = inarch.attach(bare)
    adapters.add("a", "seq_bn[leave_out=[1]]|lora[r=2]")
    _move(adapters["a"])
    adapters.save("a", tmp_path / "a")
    model = tiny("clip")
    handle = inarch.attach(model)
    handle.load(tmp_path / "a")
    assert handle["a"].keys() == adapters["a"].keys()
    assert str(handle.config("a")) == "seq_bn[leave_out=[0,1,3]]|lora[r=2,leave_out=[0,1]]"
    inputs = tiny_inputs("clip")
    handle.activate("a")
    adapters.activate("a")
    ids = {"input_ids": inputs["input_ids"]}
    assert torch.equal(model.text_model(**ids).pooler_output, bare(**ids).pooler_output)
    handle.save("a", tmp_path / "again")
    assert inarch.attach(tiny("clip").text_model).load(tmp_path / "again") == "a"


@pytest.mark.parametrize(
    ("config", "whole"), [("loreft", "loreft[layers=[2,3]]"), ("loreft[layers=[1]]", "loreft[layers=[3]]")]
)
def test_layers_that_are_named_are_those_of_the_tower(tmp_path, config, whole):
    """Methods that name the layers they are at follow as those do that name the ones they are not at."""
    bare = inarch.attach(tiny("clip").text_model)
    bare.add("a", config)
    bare.save("a", tmp_path / "bare")
    handle = inarch.attach(tiny("clip"))
    handle.load(tmp_path / "bare")
    assert str(handle.config("a")) == whole
    assert handle["a"].keys() == bare["a"].keys()
    handle.save("a", tmp_path / "whole")
    again = inarch.attach(tiny("clip").text_model)
    again.load(tmp_path / "whole")
    assert again["a"].keys() == bare["a"].keys()


def test_what_has_no_place_in_the_other_tower_leaves_none_of_its_layers_out(tmp_path):
    """Prompts of images cannot leave layers out, and need not."""
    bare = inarch.attach(tiny("clip").vision_model)
    bare.add("a", "vpt_shallow")
    bare.save("a", tmp_path / "bare")
    handle = inarch.attach(tiny("clip"))
    handle.load(tmp_path / "bare")
    assert str(handle.config("a")) == "vpt_shallow"
    assert handle["a"].keys() == bare["a"].keys()


def test_only_the_weights_of_the_tower_are_compared(tmp_path):
    bare = tiny("clip").text_model
    adapters = inarch.attach(bare)
    adapters.add("a", "lora")
    adapters.save("a", tmp_path / "a")
    model = tiny("clip")
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            parameter.add_(1)
    inarch.attach(model).load(tmp_path / "a")
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight.add_(1)
    with pytest.raises(StateError, match="outside the layers of `text0`"):
        inarch.attach(model).load(tmp_path / "a", name="b")


@torch.no_grad()
def _move(parameters):
    for parameter in parameters.values():
        parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("unread", ["that base", "this model"])
def test_weights_that_cannot_be_read_are_said_to_be_unknown(unread, caplog):
    model = tiny("vit")
    sites = inarch.probe(model)
    whole, absent = record_of(model, sites), record_of(copy.deepcopy(model).to("meta"), sites)
    assert absent["base"]["fingerprint"] == "unknown"
    assert not compare_bases(whole, sites, model) and not caplog.records
    if unread == "that base":
        assert not compare_bases(absent, sites, model)
    else:
        assert not compare_bases(whole, sites, model.to("meta"))
    assert f"is not known: the weights of {unread} cannot be read" in caplog.text
