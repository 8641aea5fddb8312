"""Every public name and keyword of the library `adapters` 1.3.0 works here, or is refused by name.

The list was made by `scripts/adapters_surface.py` in that library's environment.
"""

import importlib
import inspect
import json
from pathlib import Path

import pytest

import inarch
import inarch.compat as adapters
from inarch.compat import refused
from inarch.compat.configuration import FIXED
from inarch.compat.methods import ModelMethods
from inarch.core.errors import ConfigError, SetupError
from inarch.testing import tiny

SURFACE = json.loads((Path(__file__).parent / "fixtures" / "adapters_surface.json").read_text(encoding="utf-8"))
OWN = {
    "config_class", "forward", "get_output_embeddings", "gradient_checkpointing_enable", "load_state_dict",
    "prepare_inputs_for_generation", "save_pretrained", "set_output_embeddings", "tie_weights",
}  # fmt: skip
"""What the model's own class has, or `generate` needs no more."""
SHOWN = {
    "active_adapters",
    "active_embeddings",
    "active_head",
    "has_parallel_adapters",
    "loaded_embeddings",
    "model_name",
}
INSIDE = {
    "adapter_interface",
    "add_base_adapters",
    "head_types",
    "support_lora_delta_w_svd",
    "support_prompt_tuning",
    "use_pooler",
}
"""Attributes by which that library's classes tell each other apart, which no program reads."""


@pytest.fixture(scope="module")
def model():
    model = tiny("bert")
    adapters.init(model)
    model.add_adapter("a")
    model.add_tagging_head("a")
    return model


@pytest.mark.parametrize(
    ("place", "name"),
    [("", name) for name in SURFACE["exports"]]
    + [(f".{module}", name) for module, names in SURFACE["modules"].items() for name in names],
)
def test_a_name_is_there_or_refused(place, name):
    module = importlib.import_module(f"inarch.compat{place}")
    if name in refused.NAMES:
        with pytest.raises(ImportError, match=f"got `{name}` of the library `adapters`. .+"):
            getattr(module, name)
    else:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("name", SURFACE["methods"])
def test_a_method_takes_what_it_takes_there_or_is_refused(model, name):
    if name in OWN:
        assert name in adapters.METHODS or hasattr(type(model), name) or name == "prepare_inputs_for_generation"
        return
    if name in refused.METHODS:
        with pytest.raises(SetupError, match=rf"got `model\.{name}` of the library `adapters`. .+"):
            getattr(model, name)()
        return
    method = getattr(ModelMethods, f"_{name}", None) or getattr(ModelMethods, name)
    taken = inspect.signature(method).parameters
    assert name in adapters.METHODS
    assert hasattr(model, name)
    for keyword, default in SURFACE["methods"][name].items():
        if keyword not in taken:
            assert any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()), keyword
        elif default == "...":
            assert taken[keyword].default is inspect.Parameter.empty
        else:
            assert taken[keyword].default == default, keyword
    order = [keyword for keyword in SURFACE["methods"][name] if keyword in taken]
    assert order == [keyword for keyword in taken if keyword in order]


def test_attributes_are_there(model):
    assert {*SHOWN, *INSIDE} | OWN >= set(SURFACE["properties"])
    model.eval()
    assert model.active_adapters is None
    assert model.active_head == "a"
    assert model.active_embeddings == "default"
    assert list(model.loaded_embeddings) == ["default"]
    assert not model.has_parallel_adapters
    assert model.model_name == ""


HEADS = {name: kind for name, kind in SURFACE["methods"].items() if name.startswith("add_") and name.endswith("_head")}


@pytest.mark.parametrize("name", [name for name in HEADS if name not in refused.METHODS and "prediction" not in name])
def test_a_head_takes_the_arguments_that_it_takes_there(name):
    model = tiny("bart") if "seq2seq" in name else tiny("bert")
    adapters.init(model)
    given = {key: value for key, value in HEADS[name].items() if value != "..."}
    labels = {"id2label": dict(enumerate("ab"))} if "id2label" in given else {}
    getattr(model, name)("h", **given | labels)
    assert model.get_labels("h") == (["a", "b"] if labels else None)
    with pytest.raises(ConfigError, match="has no field `poetry`"):
        getattr(model, name)("g", poetry=1)


@pytest.mark.parametrize("name", SURFACE["heads"])
def test_a_head_object_is_added(name):
    model = tiny("bart") if "Seq2Seq" in name else tiny("bert")
    adapters.init(model)
    if name == "PredictionHead":
        return
    given = {key: value for key, value in SURFACE["heads"][name].items() if value != "..."}
    model.add_prediction_head(getattr(adapters, name)(model, "h", **given), set_active=False)
    assert model.active_head is None
    found = inarch.attach(model).flexible_heads["h"]
    for key in ("num_labels", "num_choices", "layers", "activation_function", "bias", "layer_norm", "shift_labels"):
        if key in given and hasattr(found, key):
            assert getattr(found, key) == given[key]


@pytest.mark.parametrize("name", SURFACE["configurations"])
def test_a_configuration_takes_the_fields_that_it_has_there(name):
    if name in refused.NAMES:
        return
    make = getattr(adapters, name)
    given = {key: value for key, value in SURFACE["configurations"][name].items() if value != "..."}
    assert make(**given) == make()
    for field, (value, _) in FIXED.get(name, {}).items():
        other = {True: False, False: True, None: 0.5, "add": "scale", "scale": "add"}.get(value, "else")
        with pytest.raises(ConfigError, match=f"got `{field}={other!r}`. "):
            make(**{field: other})
    with pytest.raises(ConfigError, match="has no field `poetry`"):
        make(poetry=1)


@pytest.mark.parametrize("name", ["save_adapter", "load_adapter", "save_adapter_setup", "push_adapter_to_hub"])
def test_a_keyword_without_meaning_is_refused(model, name):
    for keyword in refused.KEYWORDS:
        if keyword in SURFACE["methods"][name] and (keyword != "version" or name == "load_adapter_setup"):
            with pytest.raises(SetupError, match=f"`{name}` takes what .*got `{keyword}=\\[1\\]`"):
                getattr(model, name)("x", "a", **{keyword: [1]}) if name != "load_adapter" else model.load_adapter(
                    "x", **{keyword: [1]}
                )
    if name == "load_adapter":
        with pytest.raises(SetupError, match="got `proxies`. The Hub's client reads its settings"):
            model.load_adapter("x", proxies={})


def test_functions_take_what_they_take_there():
    for name, wanted in SURFACE["functions"].items():
        found = getattr(adapters, name)
        taken = inspect.signature(found.__init__ if inspect.isclass(found) else found).parameters
        assert [key for key in taken if key in wanted] == list(wanted), name
    fields = adapters.AdapterArguments.__dataclass_fields__
    assert {name: field.default for name, field in fields.items()} == SURFACE["arguments"]
    own = inspect.signature(adapters.AdapterTrainer.__init__).parameters
    theirs = inspect.signature(importlib.import_module("transformers").Trainer.__init__).parameters
    assert set(SURFACE["trainer"]) <= {*own, *theirs}
