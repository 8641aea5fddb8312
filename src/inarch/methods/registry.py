"""Finds the methods, and reads what a user may write for a configuration.

Every module of this folder that defines a leaf class of `AbstractMethod` is a method; nothing else has to be edited.
"""

import importlib
import inspect
import json
import os
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..core import grammar
from ..core.config import Config, field_problems, shown, thaw
from ..core.errors import ConfigError, join_problems, nearest
from ..core.places import nearest_place
from ..core.site import Sites
from .method import AbstractMethod, LinearMethod, Placement
from .unions import JOINING, OLDER_NAMES, UNIONS, spread


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The configuration of one adapter: one or more method configurations, each of another method."""

    parts: tuple[Config, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple | list):
            raise ConfigError(
                f"`AdapterConfig.parts` is a list of method configurations; got {shown(self.parts)}. "
                "Use `read_config`, which reads whatever describes an adapter."
            )
        object.__setattr__(self, "parts", tuple(self.parts))
        names = [method_of(part).name for part in self.parts]
        if not names:
            raise ConfigError("An adapter consists of at least one method; got none. Write for example `seq_bn`.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"The methods of one adapter must differ; got {', '.join(f'`{n}`' for n in twice)} twice. "
                "Join both into one configuration, or add two adapters and activate a `Stack` of them."
            )

    def replace(self, **changes: Any) -> "AdapterConfig":
        """A copy with changed fields, in every method that has them. Raises `ConfigError` for a field of none."""
        return AdapterConfig(spread(str(self), self.parts, changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, read back by `read_config`."""
        return {"methods": [{"method": method_of(part).name, **part.to_dict()} for part in self.parts]}

    def __str__(self) -> str:
        return "|".join(_part_text(part) for part in self.parts)


def _part_text(part: Config, other: Mapping[str, Any] = MappingProxyType({})) -> str:
    """The preset that needs the fewest changes, with those changes. `other` has values to write in place of its own."""
    values = part.to_dict() | dict(other)
    choices = []
    for name, preset in method_of(part).presets.items():
        defaults = preset.to_dict()
        changes = {key: value for key, value in values.items() if value != defaults[key]}
        choices.append((len(changes), name, changes))
    _, name, changes = min(choices, key=lambda choice: choice[0])
    return grammar.write(name, changes)


def placements(part: Config, sites: Sites) -> list[Placement]:
    """Every module a method's configuration asks for, through the port that each place has.

    Raises `ConfigError` for a wish that matches nothing, and for a projection whose method cannot act on its weight
    alone.
    """
    return [
        _through_its_port(method_of(part), part, placement) for placement in method_of(part).placements(part, sites)
    ]


def _through_its_port(method: type[AbstractMethod], part: Config, placement: Placement) -> Placement:
    if placement.port != "linear":
        return placement
    site = placement.site
    projection = placement.projection
    if not projection.weight:
        return placement
    assert issubclass(method, LinearMethod)
    obstacle = method.obstacle_on_weight(part)
    if obstacle:
        raise ConfigError(
            f"Where a module applies a weight itself, only the weight can be changed; got {obstacle} for "
            f"`{placement.role}` of `{site.key}`, which is `{projection.weight}` of `{site.absolute(projection.path)}` "
            f"({site.layer_class}). Change that setting, or leave the projection out."
        )
    return replace(placement, port="weight")


@cache
def methods() -> dict[str, type[AbstractMethod]]:
    """Every method by name. Raises `TypeError` if two files claim one name."""
    found: dict[str, type[AbstractMethod]] = {}
    for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        for value in vars(importlib.import_module(f"{__package__}.{module.name}")).values():
            if not inspect.isclass(value) or not issubclass(value, AbstractMethod) or inspect.isabstract(value):
                continue
            if found.setdefault(value.name, value) is not value:
                raise TypeError(f"Two methods are called `{value.name}`: {found[value.name]} and {value}.")
    return found


@cache
def presets() -> dict[str, Config]:
    """Every preset by name, older names included. Raises `TypeError` if two methods claim one name."""
    found: dict[str, Config] = {}
    for method in methods().values():
        named = method.presets | {old: method.presets[new] for old, new in method.aliases.items()}
        clash = found.keys() & named.keys()
        if clash:
            raise TypeError(f"The presets {sorted(clash)} of `{method.name}` are taken by another method.")
        found |= named
    return found


def preset_names() -> frozenset[str]:
    """Every name with which a configuration may begin."""
    return frozenset({*presets(), *UNIONS, *OLDER_NAMES})


def method_of(config: Config) -> type[AbstractMethod]:
    """The method a configuration configures."""
    for method in methods().values():
        if isinstance(config, method.config_class):
            return method
    raise ConfigError(
        f"A configuration must be of a known method; got {shown(config)}. "
        f"Known: {', '.join(f'`{method.config_class.__name__}`' for method in methods().values())}."
    )


ConfigLike = str | Config | AdapterConfig | Mapping[str, Any] | os.PathLike[str]


def read_config(config: ConfigLike) -> AdapterConfig:
    """An adapter configuration from whatever describes one.

    Arguments: `config` is a string such as `"seq_bn[reduction_factor=8]|lora"`, a method's configuration, an
    `AdapterConfig`, a mapping as made by `AdapterConfig.to_dict`, or the path of a JSON file with such a mapping.

    Raises `ConfigError` that lists all that is wrong, with the nearest valid names.
    """
    if isinstance(config, AdapterConfig):
        return config
    if isinstance(config, Config):
        return AdapterConfig((config,))
    return AdapterConfig(_collect(_items(config), _from_item))


@dataclass(frozen=True, slots=True)
class OutOfRange:
    """A number that a setting cannot take, and what stands in its place."""

    method: str
    field: str
    value: int | float
    instead: Any
    problem: str
    """What `read_config` says of it."""


def as_asked(config: AdapterConfig, wrong: Sequence[OutOfRange]) -> str:
    """A configuration of `read_settings` as text, with the numbers that were asked for."""
    asked: dict[str, dict[str, Any]] = {}
    for one in wrong:
        asked.setdefault(one.method, {})[one.field] = one.value
    return "|".join(_part_text(part, asked.get(method_of(part).name, {})) for part in config.parts)


def read_settings(config: ConfigLike) -> tuple[AdapterConfig, tuple[OutOfRange, ...]]:
    """As `read_config`, with what the preset has in the place of every number that is out of range.

    Raises `ConfigError` for all else that `read_config` refuses.
    """
    try:
        return read_config(config), ()
    except ConfigError as error:
        if isinstance(config, AdapterConfig | Config):
            raise
        parts: list[Config] = []
        found: list[OutOfRange] = []
        try:
            for item in _items(config):
                given = item.values if isinstance(item, grammar.Phrase) else item
                numbers = {key: value for key, value in given.items() if type(value) in (int, float)}
                wrong = [
                    OutOfRange(method_of(part).name, field, value, thaw(getattr(part, field)), problems[0])
                    for part in _from_item(_without(item, numbers))
                    for field, value in numbers.items()
                    if hasattr(part, field) and (problems := field_problems(type(part), field, value))
                ]
                parts += _from_item(_without(item, {one.field for one in wrong}))
                found += wrong
            whole = AdapterConfig(tuple(parts))
        except ConfigError:
            raise error from None
        if not found:
            raise
        return whole, tuple(found)


def _without(item: Any, fields: Collection[str]) -> Any:
    if isinstance(item, grammar.Phrase):
        return grammar.Phrase(item.name, {key: value for key, value in item.values.items() if key not in fields})
    return {key: value for key, value in item.items() if key not in fields}


def _items(config: Any) -> list[grammar.Phrase] | list[Mapping[str, Any]]:
    """The methods that a text, a file or a mapping names, as they are written there."""
    if isinstance(config, Mapping):
        return _rows(config)
    if isinstance(config, os.PathLike):
        config = os.fspath(config)
    if not isinstance(config, str):
        raise ConfigError(
            f"A configuration is text, a mapping, a file or a method's configuration; got {shown(config)}. "
            "Write for example `seq_bn[reduction_factor=8]`."
        )
    if config.endswith(".json"):
        if not Path(config).exists():
            raise ConfigError(
                f"A configuration file must be there; got nothing at `{config}`. "
                f"{nearest_place(config) or 'Give a preset such as `seq_bn`, or the path of such a file.'}"
            )
        try:
            data = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"A configuration file must be readable JSON; got `{config}`: {error}. Give a preset such as `seq_bn`, "
                "or the path of such a file."
            ) from None
        return _rows(data)
    return grammar.parse(config)


def _collect(items: Sequence[Any], read: Callable[[Any], tuple[Config, ...]]) -> tuple[Config, ...]:
    parts: list[Config] = []
    problems = []
    for item in items:
        try:
            parts += read(item)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(join_problems(problems))
    return tuple(parts)


def _from_item(item: grammar.Phrase | Mapping[str, Any]) -> tuple[Config, ...]:
    return _from_phrase(item) if isinstance(item, grammar.Phrase) else _from_row(item)


def _from_phrase(phrase: grammar.Phrase) -> tuple[Config, ...]:
    known, name = presets(), OLDER_NAMES.get(phrase.name, phrase.name)
    if name in UNIONS:
        return spread(name, _collect(grammar.parse(UNIONS[name]), _from_phrase), phrase.values)
    if name not in known:
        raise ConfigError(
            f"A configuration begins with a preset or a method; got `{name}`. {nearest(name, [*known, *UNIONS])}"
        )
    preset = known[name]
    joined = {JOINING[key] for key in phrase.values if key in JOINING and not hasattr(preset, key)}
    if not joined:
        return (preset.replace(**phrase.values),)
    shared = preset.to_dict()
    others = [known[other] for other in sorted(joined)]
    others = [other.replace(**{k: v for k, v in shared.items() if k in other.to_dict()}) for other in others]
    return spread(name, (preset, *others), phrase.values)


def _rows(data: Any) -> list[Mapping[str, Any]]:
    rows = data.get("methods") if isinstance(data, Mapping) else None
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(
            "A configuration mapping has the form {'methods': [{'method': 'bottleneck', ...}]}; got "
            f"{shown(data)}. Make one with `read_config('seq_bn').to_dict()`."
        )
    return list(rows)


def _from_row(row: Mapping[str, Any]) -> tuple[Config, ...]:
    values = dict(row)
    name = values.pop("method", None)
    if not isinstance(name, str) or name not in methods():
        raise ConfigError(
            f"`method` must name a method; got {shown(name)}. "
            f"{nearest(name if isinstance(name, str) else '', methods())}"
        )
    return (methods()[name].config_class.from_dict(values),)
