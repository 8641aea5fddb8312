"""The recipe, and the command-line options made from it."""

import dataclasses
import inspect
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner

from inarch.cli.options import configured, made_from
from inarch.cli.sweep import sweep
from inarch.cli.train import train
from inarch.core.config import Config, config_class, option
from inarch.core.errors import ConfigError
from inarch.train.recipe import DataConfig, Recipe


def test_the_defaults_are_those_that_work_for_adapters():
    recipe = Recipe()
    assert recipe.rate("adapter") == recipe.rate("head") == 1e-3
    assert recipe.rate("full") == 1e-4
    assert Recipe(learning_rate=0.5).rate("full") == 0.5
    assert (recipe.schedule, recipe.warmup, recipe.augment) == ("cosine", 0.1, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, r"`Recipe.epochs` must be at least 1; got 0"),
        ({"learning_rate": 0.0}, r"`Recipe.learning_rate` must be more than 0; got 0"),
        ({"learning_rate": float("nan")}, r"`Recipe.learning_rate` must be finite; got nan"),
        ({"warmup": 1.0}, r"`Recipe.warmup` must be less than 1; got 1"),
        ({"schedule": "cosinus"}, r"`Recipe.schedule` must be `cosine` or `linear` or `constant`; got 'cosinus'"),
        ({"keep_checkpoints": 1}, r"`Recipe.keep_checkpoints` must be at least 2"),
        ({"accumulation": 5}, r"`Recipe.accumulation` must divide the batch size; got 5 for a batch of 32"),
        ({"augment": False, "flip": True}, r"which `Recipe.augment` turns off; got crop None, flip True"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**values)


def test_a_misspelt_field_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"no field `lerning_rate`; got 0.1. Did you mean `learning_rate`\?"):
        Recipe.from_dict({"lerning_rate": 0.1})


def test_every_field_is_an_option_with_its_help_line():
    parameters = inspect.signature(train).parameters
    for cls in (Recipe, DataConfig):
        for field in dataclasses.fields(cls):
            (made,) = parameters[field.name].annotation.__metadata__
            assert made.help.startswith(field.metadata["help"])
            assert made.default.split("/")[0] == f"--{field.name.replace('_', '-')}"


@config_class
class Small(Config):
    """One option of each sort."""

    rank: int = option(4, "Rank.", at_least=1)
    rate: float | None = option(None, "Rate.")
    is_on: bool = option(False, "Switch.")
    maybe: bool | None = option(None, "Switch of three positions.")
    kind: Literal["a", "b"] = option("a", "Kind.")


def run(*arguments, **defaults):
    seen = {}

    @configured(defaults, small=Small)
    def command(*, place: str = "here", small):
        seen.update(place=place, small=small)

    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    result = CliRunner().invoke(app, list(arguments))
    return result, seen


def test_only_options_that_are_given_reach_the_command():
    assert run()[1] == {"place": "here", "small": {}}
    given = run("--rank", "8", "--rate", "0.5", "--is-on", "--no-maybe", "--kind", "b", "--place", "there")[1]
    assert given == {
        "place": "there",
        "small": {"rank": 8, "rate": 0.5, "is_on": True, "maybe": False, "kind": "b"},
    }


def test_the_help_shows_defaults_and_choices():
    text = run("--help")[0].output
    assert "Rank. [default: 4]" in " ".join(text.split())
    assert "a|b" in text
    assert "--maybe" in text
    assert "--no-maybe" in text


def test_the_help_shows_the_defaults_of_the_command():
    text = " ".join(run("--help", is_on=True)[0].output.split())
    assert "Switch. [default: yes]" in text and "Rank. [default: 4]" in text
    assert run(is_on=True)[1] == {"place": "here", "small": {}}
    for command, word in ((train, "no"), (sweep, "yes")):
        (made,) = inspect.signature(command).parameters["stop_early"].annotation.__metadata__
        assert made.help.endswith(f"[default: {word}]")


def test_a_wrong_type_is_a_usage_error():
    assert run("--rank", "many")[0].exit_code == 2


def test_errors_name_the_options():
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*`--rank` must be at least 1; got 0.*`--kind` must be"):
        made_from(Small, {"rank": 0, "kind": "c"})


def test_a_field_that_can_be_no_option_is_refused_when_the_command_is_made():
    @config_class
    class Odd(Config):
        pair: tuple[int, ...] = option((), "Numbers.")

    with pytest.raises(TypeError, match=r"An option is made of one plain type or of choices"):
        configured(odd=Odd)(lambda **_: None)
