"""Whatever is given for a configuration, it is read or refused by name, with a message of one screen."""

import contextlib
import json
import math
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import inarch
from inarch.check import report
from inarch.core.config import Config
from inarch.core.errors import ConfigError, InarchError
from inarch.methods import AdapterConfig, methods, presets, read_config
from inarch.testing import tiny

HUGE = 10**5000
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, -1, 0])
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.complex_numbers()
    | st.sampled_from([object(), int, ..., torch.zeros(2), {1, 2}, "\ud800", "x" * 10_000, "layer\n", "0", "default"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.none() | st.floats(), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted({name for preset in presets().values() for name in preset.to_dict()})
KEYS = st.sampled_from([*FIELDS, "self", "cls", "method", "methods", "reduction_facto", "", None, 3, math.nan])
MAPPINGS = st.dictionaries(KEYS, VALUES, max_size=3)

itself = []
itself.append(itself)


def refused_or(read, value):
    """What is read, or None where it was refused in a message that a person can read."""
    try:
        return read(value)
    except ConfigError as error:
        text = str(error)
        assert len(text) < 4000 and re.search(r"got .*\. [A-Z`]|problems:\n|in \".*\. Write", text, re.DOTALL), text
        return None


@given(st.sampled_from(sorted(methods())), MAPPINGS)
def test_a_mapping_is_a_configuration_or_refused(name, values):
    cls = methods()[name].config_class
    found = refused_or(cls.from_dict, values)
    assert found is None or cls.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    if all(isinstance(key, str) for key in values):
        assert refused_or(lambda given: cls(**given), values) == found
        assert refused_or(lambda given: cls().replace(**given), values) == found


@given(VALUES | st.builds(lambda rows: {"methods": rows}, VALUES | st.lists(MAPPINGS, max_size=2)))
def test_any_value_is_a_configuration_or_refused(value):
    assert refused_or(read_config, value) is None or read_config(value).parts


@given(st.lists(st.sampled_from([*"[](){}|,='\"\\ ", *FIELDS[:4], *presets(), "1", "None", "-", "\0"]), max_size=12))
def test_any_pieces_of_the_grammar_are_read_or_refused(pieces):
    refused_or(read_config, "".join(pieces))


@settings(max_examples=30)
@given(st.sampled_from(sorted(presets())), st.sampled_from(FIELDS), VALUES)
def test_what_is_read_can_be_planned_or_is_refused(preset, field, value):
    found = refused_or(lambda given: presets()[preset].replace(**{field: given}), value)
    if found is not None:
        with contextlib.suppress(InarchError):
            for module in report(_sites(), "a", {"a": AdapterConfig((found,))}).plan.modules:
                module.sketch()


@cache
def _sites():
    return inarch.probe(tiny("vit"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"is text, a mapping, a file or a method's configuration; got None\. Write"),
        (b"lora", "got b'lora'"),
        ([], r"got \[\]"),
        (3, "got 3"),
        ({}, r"has the form .* got \{\}"),
        ({"methods": [itself]}, "has the form"),
        ({"methods": [{"method": ["lora"]}]}, r"must name a method; got \['lora'\]"),
        ({"methods": [{"method": "lora", 3: 4}]}, "has no field `3`; got 4. Known:"),
        ({"methods": [{"method": "lora", None: None}]}, "has no field `None`; got None"),
        ({"methods": [{"method": "lora", "r": HUGE}]}, "in size; got a value of int that is too long to be shown"),
        ({"methods": [{"method": "lora", "r": True}]}, "`LoRAConfig.r` must be an integer; got True"),
        ({"methods": [{"method": "lora", "r": itself}]}, "must be an integer; got a value of list|got \\[\\[\\.\\.\\."),
        ({"methods": [{"method": "lora", "alpha": 10**400}]}, "in size; got"),
        ({"methods": [{"method": "lora", "alpha": math.nan}]}, "must be finite; got nan"),
        ({"methods": [{"method": "lora", "alfa": 1}]}, "Did you mean `alpha`"),
        ({"methods": [{"method": "lora", "leave_out": "x" * 9999}]}, r"got 'x{100,}\.\.\."),
        ("lora[self=1]", "`LoRAConfig` has no field `self`"),
        ("lora[r=[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]", "nest at most 20 deep; got more at position"),
        ("[" * 100_000, "nest at most 20 deep"),
        ("lora[r=" + "9" * 5000 + "]", "must be an integer; got '9{100,}"),
        ("x" * 100_000, "begins with a preset"),
        ("\0.json", "must be there; got nothing at"),
        ("lora[r=2000000]", "must be at most 1.04858e\\+06; got 2000000"),
        ("lora[init_weights_seed=-1]", "must be at least 0; got -1"),
    ],
)
def test_an_odd_value_is_refused_with_the_rule(config, message):
    with pytest.raises(ConfigError, match=message):
        read_config(config)


def test_a_misspelt_keyword_gets_the_nearest_name():
    from inarch.methods.lora import LoRAConfig

    with pytest.raises(ConfigError, match="`LoRAConfig` has no field `alfa`; got 3. Did you mean `alpha`?"):
        LoRAConfig(alfa=3)
    with pytest.raises(ConfigError, match="read from a mapping of its fields; got 'lora'"):
        LoRAConfig.from_dict("lora")
    with pytest.raises(ConfigError, match="must be of a known method; got 'lora'"):
        AdapterConfig(("lora",))
    with pytest.raises(ConfigError, match="is a list of method configurations; got None"):
        AdapterConfig(None)
    assert AdapterConfig([LoRAConfig()]) == read_config("lora")


def test_a_json_file_that_nests_without_end_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="must be readable JSON"):
        read_config(tmp_path / "a.json")


def test_a_bottleneck_that_no_memory_holds_is_refused():
    with pytest.raises(ConfigError, match="at most 1,048,576 dimensions; got 3.2e\\+13 from a width of 32"):
        inarch.attach(tiny("vit")).add("a", "seq_bn[reduction_factor=1e-12]")


def test_every_configuration_is_of_the_strict_kind():
    assert all(issubclass(method.config_class, Config) for method in methods().values())
