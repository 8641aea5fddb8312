"""Strict configurations: frozen dataclasses that know the meaning and the legal range of every field.

A field is declared as `rank: int = option(8, "Rank of the two matrices.", at_least=1)`. The help line is required, and
the command line, the documentation and the error messages all read it, so it is written once.
"""

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from .errors import ConfigError, join_problems, nearest

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",  # noqa: A002 - the name of the thing
    *,
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    less_than: float | None = None,
) -> Any:
    """A configuration field with its help line and, for numbers, its legal range.

    A range applies to every number in the value: the elements of a list and the values of a mapping too.
    Choices are given by the annotation, as a `Literal`.
    """
    limits = {"at_least": at_least, "more_than": more_than, "at_most": at_most, "less_than": less_than}
    return dataclasses.field(
        default=default, metadata={"help": help, **{key: value for key, value in limits.items() if value is not None}}
    )


def config_class(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass; refuse, at import, a field without a help line."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        if not field.metadata.get("help"):
            raise TypeError(f"Every configuration field needs a help line; `{cls.__name__}.{field.name}` has none.")
    init = made.__init__

    @functools.wraps(init)
    def checked(self: Any, /, **values: Any) -> None:
        """The dataclass's own, with names checked first: it would raise a TypeError without a hint."""
        problems = _name_problems(made, values)
        if problems:
            raise ConfigError(join_problems(problems))
        init(self, **values)

    setattr(made, "__init__", checked)  # noqa: B010 - a type checker takes the plain assignment for an error
    return made


class Config:
    """What every configuration can do. Subclasses are made with `@config_class`."""

    __slots__ = ()

    if TYPE_CHECKING:  # made by `config_class`; types and ranges are checked when it runs

        def __init__(self, **values: Any) -> None: ...

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            problems += _field_problems(type(self), field, value)
            if not problems:
                object.__setattr__(self, field.name, freeze(value))
        problems = problems or self.problems()
        if problems:
            raise ConfigError(join_problems(problems))

    def problems(self) -> list[str]:
        """Rules that span several fields; each broken one as a sentence."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            field.name: thaw(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration these values describe.

        Raises `ConfigError` that lists every unknown, missing and ill-typed field.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"`{cls.__name__}` is read from a mapping of its fields; got {shown(values)}. "
                f"Make one with `{cls.__name__}().to_dict()`."
            )
        problems = _name_problems(cls, values)
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name in values:
                problems += _field_problems(cls, field, values[field.name])
        if problems:
            raise ConfigError(join_problems(problems))
        return cls(**values)

    def replace(self, /, **changes: Any) -> Self:
        """A copy with some fields changed, checked like any other."""
        return self.from_dict({**self.to_dict(), **changes})


@functools.cache
def hints(cls: type) -> Mapping[str, Any]:
    """The annotations of a class, which cost more to resolve than all checks of a configuration."""
    return types.MappingProxyType(typing.get_type_hints(cls))


def field_help(cls: type[Config], name: str) -> str:
    """The help line of one field."""
    return str(next(f.metadata["help"] for f in dataclasses.fields(cls) if f.name == name))  # type: ignore[arg-type]


def field_problems(cls: type[Config], name: str, value: Any) -> list[str]:
    """What is wrong with a value of one field, whatever the other fields are; each broken rule as a sentence."""
    return _field_problems(cls, next(f for f in dataclasses.fields(cls) if f.name == name), value)  # type: ignore[arg-type]


def shown(value: Any, length: int = 120) -> str:
    """A value as an error message shows it: not longer than that, whatever it is."""
    try:
        text = repr(thaw(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, a list that holds itself
        return f"a value of {type(value).__name__} that is too long to be shown"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def freeze(value: Any) -> Any:
    """Lists as tuples and mappings as read-only ones, so that a frozen configuration is frozen all through."""
    if isinstance(value, Mapping):
        return FrozenMap({str(key): freeze(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """The JSON form of a frozen value."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value


class FrozenMap(Mapping[str, Any]):
    """A hashable, read-only mapping. (`MappingProxyType` can be neither hashed, copied nor pickled.)"""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = tuple(items.items())

    def __getitem__(self, key: str) -> Any:
        for name, value in self._items:
            if name == key:
                return value
        raise KeyError(key)

    def __iter__(self) -> typing.Iterator[str]:
        return (name for name, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items))

    def __repr__(self) -> str:
        return repr(dict(self._items))


_BROKEN = {"at_least": operator.lt, "more_than": operator.le, "at_most": operator.gt, "less_than": operator.ge}


def _name_problems(cls: type, values: Mapping[Any, Any]) -> list[str]:
    """Names that are no fields, and fields that are required and not given."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = [
        f"`{cls.__name__}` has no field `{key if isinstance(key, str) else shown(key)}`; got {shown(value)}. "
        f"{nearest(str(key) if isinstance(key, str) else '', fields)}"
        for key, value in values.items()
        if not isinstance(key, str) or key not in fields
    ]
    return problems + [
        f"`{cls.__name__}.{name}` is required; got nothing. {field.metadata['help']}"
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING
    ]


def _field_problems(cls: type, field: dataclasses.Field[Any], value: Any) -> list[str]:
    place, meaning = f"`{cls.__name__}.{field.name}`", field.metadata["help"]
    annotation = hints(cls)[field.name]
    try:
        frozen = freeze(value)
    except RecursionError:
        frozen = None, value  # too deep for anything that is annotated
    if not matches(frozen, annotation):
        return [f"{place} must be {describe(annotation)}; got {shown(value)}. {meaning}"]
    problems = []
    for number in _numbers(frozen):
        if isinstance(number, float) and not math.isfinite(number):
            problems.append(f"{place} must be finite; got {number!r}. {meaning}")
        elif isinstance(number, int) and abs(number) >= 2**63:
            problems.append(f"{place} must be less than 2**63 in size; got {shown(number)}. {meaning}")
        else:
            problems += [
                f"{place} must be {rule.replace('_', ' ')} {limit:g}; got {number!r}. {meaning}"
                for rule, broken in _BROKEN.items()
                if (limit := field.metadata.get(rule)) is not None and broken(number, limit)
            ]
    return problems


def _numbers(value: Any) -> list[float]:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return []
    if isinstance(value, int | float):
        return [value]
    if isinstance(value, Mapping):
        return [number for item in value.values() for number in _numbers(item)]
    return [number for item in value for number in _numbers(item)]


def matches(value: Any, annotation: Any) -> bool:
    """Whether a frozen value is of the annotated type. An int is a float; a bool is neither."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if annotation is None or annotation is types.NoneType:
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, part) for part in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, tuple) and all(matches(item, arguments[0]) for item in value)
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return isinstance(value, Mapping) and all(matches(item, arguments[1]) for item in value.values())
    return isinstance(value, annotation)


def describe(annotation: Any) -> str:
    """An annotation in words, for error messages and help."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in arguments)
    if origin is Literal:
        return " or ".join(f"`{choice}`" if isinstance(choice, str) else str(choice) for choice in arguments)
    if origin is tuple:
        return f"a list of {describe(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping from names to {describe(arguments[1])}"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "none"}
    return words.get(annotation, str(annotation))
