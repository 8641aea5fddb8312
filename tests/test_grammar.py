"""The text form of configurations."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inarch.core import grammar
from inarch.core.errors import ConfigError
from inarch.methods import methods, presets, read_config

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=4))
def test_what_is_written_is_read_back(name, values):
    (phrase,) = grammar.parse(grammar.write(name, values))
    assert phrase == grammar.Phrase(name, values)


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3))
def test_phrases_are_joined_by_bars(phrases):
    text = "|".join(grammar.write(name, values) for name, values in phrases)
    assert [(p.name, p.values) for p in grammar.parse(text)] == phrases


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_by_name(text):
    with contextlib.suppress(ConfigError):
        assert read_config(text).parts


def test_words_need_no_quotes():
    (phrase,) = grammar.parse("lora[attn_matrices=[q, v],use_gating=TRUE,init_weights=bert,seed=None]")
    assert phrase.values == {"attn_matrices": ["q", "v"], "use_gating": True, "init_weights": "bert", "seed": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with a name; got ''"),
        ("seq_bn[", r"`\]` is missing at the end"),
        ("seq_bn]", r"`\]` at position 6 closes nothing"),
        ("seq_bn[a=1]b", "must be closed"),
        ("seq_bn[a]", "each field is written `field=value`; got 'a'"),
        ("seq_bn[a=1,a=2]", "given once; got `a` twice"),
        ("seq_bn['a", "is missing at the end"),
        ("seq_bn||lora", "begins with a name"),
        ("seq_bm", "Did you mean `seq_bn`"),
        ("seq_bn[reduction_facto=8]", "Did you mean `reduction_factor`"),
        ("lora|lora", "must differ; got `lora` twice"),
        ("missing.json", "A configuration file must be there; got nothing at `missing.json`. Give a preset"),
    ],
)
def test_a_broken_string_is_refused_with_the_place(text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(text)


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_is_its_own_shortest_text(name):
    config = read_config(name)
    assert read_config(str(config)) == config
    assert "[" not in str(config)


def test_a_configuration_file_is_read(tmp_path):
    import json

    config = read_config("seq_bn[reduction_factor={'0':8,'default':16}]|lora[r=4]")
    file = tmp_path / "adapter.json"
    file.write_text(json.dumps(config.to_dict()))
    assert read_config(file) == config == read_config(str(file))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"methods": "x"}, "has the form"),
        ({"methods": [{"method": "lorra"}]}, "Did you mean `lora`"),
        ({"methods": []}, "at least one method"),
        ({"methods": [{"method": "lora", "rank": 3}]}, "has no field `rank`"),
    ],
)
def test_a_wrong_mapping_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        read_config(data)


def test_a_method_is_named_like_its_file_and_has_a_preset():
    for name, method in methods().items():
        assert method.__module__.rsplit(".", 1)[-1] == name
        assert name in method.presets or method.presets
