"""Strict configurations: what they accept, refuse and say."""

import copy
import pickle
from collections.abc import Mapping
from typing import Literal

import pytest

from inarch.core.config import Config, FrozenMap, config_class, field_help, option
from inarch.core.errors import ConfigError


@config_class
class Example(Config):
    """A configuration with every kind of field."""

    rank: int = option(8, "Rank of the update.", at_least=1)
    rate: float = option(0.5, "A rate.", more_than=0, less_than=1)
    mode: Literal["a", "b"] | bool = option("a", "A mode.")
    layers: tuple[int, ...] = option((), "Layer numbers.", at_least=0)
    factor: float | Mapping[str, float] = option(16.0, "A factor.", more_than=0)
    name: str | None = option(None, "A name.")


@config_class
class Needy(Config):
    """A configuration with a required field."""

    size: int = option(help="The size.")


def test_a_configuration_survives_a_round_trip_through_plain_data():
    config = Example(rank=4, mode=False, layers=[1, 2], factor={"0": 2, "default": 4}, name="x")
    assert Example.from_dict(config.to_dict()) == config
    assert config.to_dict()["layers"] == [1, 2]
    assert config.to_dict()["factor"] == {"0": 2, "default": 4}


def test_a_configuration_is_frozen_hashable_and_can_be_copied():
    config = Example(factor={"default": 4})
    with pytest.raises(AttributeError):
        config.rank = 3
    with pytest.raises(TypeError):
        config.factor["default"] = 3
    assert hash(config) == hash(Example(factor={"default": 4}))
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)


def test_every_problem_is_reported_at_once_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        Example.from_dict({"rnk": 1, "rate": 2.0, "mode": "c", "layers": [-1, 2]})
    text = str(caught.value)
    assert text.startswith("4 problems:")
    assert "has no field `rnk`; got 1. Did you mean `rank`?" in text
    assert "`Example.rate` must be less than 1; got 2.0. A rate." in text
    assert "`Example.mode` must be `a` or `b` or true or false; got 'c'. A mode." in text
    assert "`Example.layers` must be at least 0; got -1. Layer numbers." in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "must be at least 1; got 0"),
        ({"rank": True}, "must be an integer; got True"),
        ({"rank": 2.0}, "must be an integer; got 2.0"),
        ({"rate": 0}, "must be more than 0; got 0"),
        ({"rate": "x"}, "must be a number; got 'x'"),
        ({"rate": float("nan")}, "must be finite; got nan"),
        ({"factor": {"0": "x"}}, "must be a number or a mapping from names to a number; got"),
        ({"factor": {"0": -2}}, "must be more than 0; got -2"),
        ({"factor": float("inf")}, "must be finite; got inf"),
        ({"layers": 3}, "must be a list of an integer; got 3"),
        ({"mode": 1}, "got 1"),
        ({"name": 3}, "must be text or none; got 3"),
    ],
)
def test_a_wrong_value_is_refused_with_the_rule_and_the_value(values, message):
    with pytest.raises(ConfigError, match=message):
        Example(**values)
    with pytest.raises(ConfigError, match=message):
        Example.from_dict(values)


def test_a_required_field_must_be_given():
    with pytest.raises(ConfigError, match="`Needy.size` is required; got nothing. The size."):
        Needy.from_dict({})


def test_replace_checks_like_any_other_way():
    assert Example().replace(rank=2).rank == 2
    with pytest.raises(ConfigError, match="at least 1"):
        Example().replace(rank=0)


def test_a_field_without_a_help_line_fails_when_the_class_is_defined():
    class Mute(Config):
        size: int = option(1)

    with pytest.raises(TypeError, match="`Mute.size` has none"):
        config_class(Mute)


def test_help_is_read_from_the_field():
    assert field_help(Example, "rank") == "Rank of the update."


def test_a_frozen_map_is_an_ordinary_mapping():
    found = FrozenMap({"a": 1, "b": 2})
    assert dict(found) == {"a": 1, "b": 2} == found
    assert "c" not in found and len(found) == 2
