"""What a study varies: fields of the recipe and of the adapter's configuration, each over choices or over a range.

    reduction_factor=4,16,64        choices
    original_ln_before              all values of a field that has few: true or false, or its words
    adapter=seq_bn,lora[r=4]     whole configurations
    lora.dropout=0,0.1              a field of one method, where several have it
    learning_rate=1e-4..1e-2:log    a range, evenly in the logarithm with `:log`; of integers where the field holds them
    learning_rate=1e-4..1e-2:log:5  five points of it, which a grid needs

A field is left alone in trials whose adapter does not have it.
"""

import dataclasses
import itertools
import json
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..core.config import Config, describe, field_help, field_problems, freeze, hints, matches, shown, thaw
from ..core.errors import ConfigError, join_problems, nearest
from ..core.grammar import read_value, split
from ..methods import AdapterConfig, method_of, read_config
from ..train.recipe import Recipe

ADAPTER = "adapter"

NOT_VARIED = {
    "seed": "A study repeats its trials with `seeds`",
    "stop_early": "It says when a trial is given up, not what is tried: set it for the whole study",
    **dict.fromkeys(
        ("eval_batch_size", "save_steps", "keep_checkpoints", "workers", "device", "report_to"),
        "It changes no result: set it for the whole study",
    ),
}
"""Fields of the recipe that are no question to ask, and why."""

_RANGE = re.compile(r"\s*([^:]+?)\s*\.\.\s*([^:]+?)\s*(:\s*log)?\s*(?::\s*(\d+))?\s*")

Value = Any
"""A frozen JSON value."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool
    is_int: bool

    def points(self, number: int) -> tuple[float, ...]:
        """So many numbers that divide the range evenly."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            inner = [math.exp(low + (high - low) * place / (number - 1)) for place in range(1, number - 1)]
        else:
            inner = [self.low + (self.high - self.low) * place / (number - 1) for place in range(1, number - 1)]
        found = [self.low, *inner, self.high]
        return tuple(dict.fromkeys(round(one) if self.is_int else float(f"{one:.6g}") for one in found))


@dataclass(frozen=True, slots=True)
class Dimension:
    """One varied field."""

    name: str
    """As the study writes it: `learning_rate`, `reduction_factor`, `lora.dropout`, `adapter`."""
    kind: Literal["adapter", "recipe", "method"]
    values: tuple[Value, ...] | Range

    @property
    def field(self) -> str:
        """The name without that of the method."""
        return self.name.rpartition(".")[2]

    def fits(self, part: Config) -> bool:
        """Whether a method's configuration has the field."""
        method = self.name.rpartition(".")[0]
        return method in ("", method_of(part).name) and self.field in _names(type(part))

    def suggest(self, trial: Any) -> Value:
        """What Optuna's trial takes."""
        if isinstance(self.values, Range):
            ask = trial.suggest_int if self.values.is_int else trial.suggest_float
            return ask(self.name, self.values.low, self.values.high, log=self.values.log)
        texts = {encode(value): value for value in self.values}
        return texts[trial.suggest_categorical(self.name, list(texts))]

    def written(self) -> Any:
        """The values in the one form that a study keeps, however they were given."""
        if isinstance(self.values, Range):
            return f"{self.values.low!r}..{self.values.high!r}{':log' if self.values.log else ''}"
        return [thaw(value) for value in self.values]

    def describe(self) -> dict[str, Any]:
        """Plain JSON data."""
        if isinstance(self.values, Range):
            return {"kind": "range", "low": self.values.low, "high": self.values.high, "log": self.values.log}
        return {"kind": "choices", "choices": [thaw(value) for value in self.values]}


def encode(value: Value) -> str:
    """A choice as Optuna keeps it: text, since `1`, `1.0` and `True` would be one choice."""
    return value if isinstance(value, str) else f"={json.dumps(thaw(value))}"


@dataclass(frozen=True, slots=True)
class Space:
    """All that a study varies, beside what it leaves as it is."""

    dimensions: tuple[Dimension, ...]
    adapter: AdapterConfig
    recipe: Recipe

    @property
    def learning_rates(self) -> tuple[float, float] | None:
        """The lowest and the highest that are tried; None where the recipe's own is taken."""
        for one in self.dimensions:
            if one.kind == "recipe" and one.field == "learning_rate":
                if isinstance(one.values, Range):
                    return one.values.low, one.values.high
                rates = [self.recipe.replace(learning_rate=value).rate("adapter") for value in one.values]
                return min(rates), max(rates)
        return None

    @classmethod
    def of(cls, vary: Mapping[str, Any], adapter: AdapterConfig, recipe: Recipe) -> "Space":
        """The space that a study describes: by field, a list of values or the text after the `=`.

        Raises `ConfigError` that lists every field that is unknown and every value that the field does not take.
        """
        problems: list[str] = []
        bases = [adapter]
        dimensions = []
        if ADAPTER in vary:
            try:
                whole = Dimension(ADAPTER, "adapter", _adapters(vary[ADAPTER]))
                dimensions.append(whole)
                bases = [read_config(text) for text in whole.values]  # type: ignore[union-attr]
            except ConfigError as error:
                problems.append(str(error))
        for name, given in vary.items():
            if name != ADAPTER:
                try:
                    dimensions.append(_dimension(name, given, bases))
                except ConfigError as error:
                    problems.append(str(error))
        if not vary:
            problems.append(
                "A study varies at least one field; got none. Name one, as in `reduction_factor=4,16,64` or "
                "`learning_rate=1e-4..1e-2:log`."
            )
        if problems:
            raise ConfigError(join_problems(problems))
        return cls(tuple(dimensions), adapter, recipe)

    def assign(self, pick: Callable[[Dimension], Value]) -> dict[str, Value]:
        """A value for each field that the trial's adapter has."""
        values: dict[str, Value] = {}
        for dimension in self.dimensions:
            if dimension.kind != "method" or any(map(dimension.fits, self._base(values).parts)):
                values[dimension.name] = pick(dimension)
        return values

    def grid(self) -> list[dict[str, Value]]:
        """Every combination once. Raises `ConfigError` for a range, which has too many."""
        found: dict[str, dict[str, Value]] = {}
        for combination in itertools.product(*(_points(dimension) for dimension in self.dimensions)):
            chosen = dict(zip((one.name for one in self.dimensions), combination, strict=True))
            values = self.assign(lambda dimension, chosen=chosen: chosen[dimension.name])  # type: ignore[misc]
            found.setdefault(json.dumps({key: encode(value) for key, value in values.items()}), values)
        return list(found.values())

    def configure(self, values: Mapping[str, Value]) -> tuple[AdapterConfig, Recipe]:
        """What a trial trains, and how. Raises `ConfigError` where the values do not go together."""
        parts = []
        for part in self._base(values).parts:
            changes = {
                one.field: thaw(values[one.name])
                for one in self.dimensions
                if one.kind == "method" and one.name in values and one.fits(part)
            }
            parts.append(part.replace(**changes) if changes else part)
        changes = {
            one.field: thaw(values[one.name]) for one in self.dimensions if one.kind == "recipe" and one.name in values
        }
        return AdapterConfig(tuple(parts)), self.recipe.replace(**changes)

    def _base(self, values: Mapping[str, Value]) -> AdapterConfig:
        return read_config(values[ADAPTER]) if ADAPTER in values else self.adapter


def _points(dimension: Dimension) -> tuple[Value, ...]:
    if isinstance(dimension.values, Range):
        raise ConfigError(
            f"A grid has so many points of each field; got a range for `{dimension.name}`. Say how many, as in "
            f"`{dimension.name}={dimension.values.low:g}..{dimension.values.high:g}:5`, or take the sampler `tpe`."
        )
    return dimension.values


def _adapters(given: Any) -> tuple[str, ...]:
    """Whole configurations, in their shortest form."""
    texts = split(given, ",", given) if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not texts:
        raise ConfigError(
            f"`{ADAPTER}` is varied over configurations; got {shown(given)}. Write `adapter=seq_bn,lora[r=4]`."
        )
    return tuple(dict.fromkeys(str(read_config(text.strip() if isinstance(text, str) else text)) for text in texts))


def _dimension(name: str, given: Any, bases: list[AdapterConfig]) -> Dimension:
    method, _, field = name.rpartition(".")
    parts = {type(part): method_of(part).name for base in bases for part in base.parts}
    owners = [cls for cls, own in parts.items() if method in ("", own) and field in _names(cls)]
    if method in ("", "recipe") and field in _names(Recipe):
        owners = [Recipe, *owners]
    if not owners:
        known = {ADAPTER, *(set(_names(Recipe)) - set(NOT_VARIED)), *(n for cls in parts for n in _names(cls))}
        raise ConfigError(
            f"A study varies `adapter`, and fields of the recipe or of the adapter; got `{name}` with "
            f"{' and '.join(f'`{base}`' for base in bases)}. {nearest(field, known)}"
        )
    if owners[0] is Recipe and field in NOT_VARIED:
        raise ConfigError(f"`{field}` is not varied; got {shown(given)}. {NOT_VARIED[field]}.")
    if owners[0] is Recipe and len(owners) > 1:
        raise ConfigError(
            f"A varied field is one of the recipe or one of a method; got `{name}`, which both have. Write "
            f"`recipe.{field}` or `{parts[owners[1]]}.{field}`."
        )
    values = _values(name, given, owners)
    kind: Literal["recipe", "method"] = "recipe" if owners[0] is Recipe else "method"
    return Dimension(name, kind, values)


def _values(name: str, given: Any, owners: list[type[Config]]) -> tuple[Value, ...] | Range:
    cls, field = owners[0], name.rpartition(".")[2]
    annotation = hints(cls)[field]  # type: ignore[arg-type]  # mypy takes a dataclass for unhashable
    found = _RANGE.fullmatch(given) if isinstance(given, str) else None
    if found:
        return _range(name, found, owners)
    if given is None or given == "":
        values = _all_of(annotation)
        if values is None:
            raise ConfigError(
                f"A field without values is varied over all it has; got `{name}`, which is {describe(annotation)}. "
                f"Give some, as in `{name}=...,...`. {field_help(cls, field)}"
            )
        return values
    listed = [read_value(one.strip()) for one in split(given, ",", given)] if isinstance(given, str) else given
    if not isinstance(listed, list | tuple):
        raise ConfigError(
            f"`{name}` is varied over a list of values or the text of a range; got {shown(given)}. Write "
            f"`{name}=A,B` or `{name}=A..B`."
        )
    problems = dict.fromkeys(
        problem for value in listed for owner in owners for problem in field_problems(owner, field, value)
    )
    if problems:
        raise ConfigError(join_problems(list(problems)))
    return tuple({encode(frozen): frozen for frozen in map(freeze, listed)}.values())


def _range(name: str, found: re.Match[str], owners: list[type[Config]]) -> tuple[Value, ...] | Range:
    cls, field = owners[0], name.rpartition(".")[2]
    annotation = hints(cls)[field]  # type: ignore[arg-type]  # mypy takes a dataclass for unhashable
    ends = [read_value(found[1]), read_value(found[2])]
    is_log = found[3] is not None
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends) or not ends[0] < ends[1]:
        raise ConfigError(
            f"A range goes from a number to a larger one; got `{found[0]}` for `{name}`. Write "
            f"`{name}=A..B`, with `:log` for even steps of the logarithm."
        )
    if is_log and ends[0] <= 0:
        raise ConfigError(
            f"A range in the logarithm begins above 0; got `{found[0]}` for `{name}`. Leave out `:log`, or begin "
            "above 0."
        )
    takes_float, takes_int = matches(0.5, annotation), matches(1, annotation)
    if not takes_int:
        raise ConfigError(
            f"A range is for a field that holds numbers; got `{found[0]}` for `{name}`, which is "
            f"{describe(annotation)}. List its values."
        )
    problems = [problem for end in ends for owner in owners for problem in field_problems(owner, field, end)]
    if problems:
        raise ConfigError(join_problems(problems))
    low, high = ends
    made = Range(low, high, log=is_log, is_int=not takes_float)
    if found[4] is None:
        return made
    if int(found[4]) < 2:
        raise ConfigError(f"A range has at least 2 points; got `{found[0]}` for `{name}`. Give more, or list values.")
    return made.points(int(found[4]))


def _all_of(annotation: Any) -> tuple[Value, ...] | None:
    """All values of a field that has few; None of another."""
    if annotation is bool:
        return (True, False)
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return None


def _names(cls: type[Config]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
