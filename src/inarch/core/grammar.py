"""The text form of an adapter configuration: `name`, `name[field=value,...]`, and several joined by `|`."""

import ast
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError

_OPEN, _CLOSE = "[({", "])}"
_DEEPEST = 20
_WORDS = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True, slots=True)
class Phrase:
    """One `name[field=value,...]`."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)


def parse(text: str) -> list[Phrase]:
    """The phrases of a configuration string.

    Values are Python literals, words need no quotes; `true`, `false`, `none` and `null` are understood in any case.
    Raises `ConfigError` that shows where the string breaks the grammar.
    """
    return [_phrase(part.strip(), text) for part in split(text, "|", text)]


def write(name: str, values: dict[str, Any]) -> str:
    """The string that `parse` reads back as this phrase."""
    if not values:
        return name
    return f"{name}[{','.join(f'{key}={_literal(value)}' for key, value in values.items())}]"


def _literal(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{item!r}" for key, item in value.items()) + "}"
    if isinstance(value, str) and value.replace("_", "").isalnum() and read_value(value) == value:
        return value
    return repr(value)


def _phrase(part: str, whole: str) -> Phrase:
    name, bracket, rest = part.partition("[")
    name = name.strip()
    if not name or not all(c.isalnum() or c in "_+-." for c in name):
        raise _broken(f"a configuration begins with a name; got {part!r}", whole)
    if not bracket:
        return Phrase(name)
    if not rest.endswith("]"):
        raise _broken(f"`[` must be closed by `]` at the end of {part!r}", whole)
    values: dict[str, Any] = {}
    for item in split(rest[:-1], ",", whole):
        if not item.strip():
            continue
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise _broken(f"each field is written `field=value`; got {item.strip()!r}", whole)
        if key in values:
            raise _broken(f"each field is given once; got `{key}` twice", whole)
        values[key] = read_value(value.strip())
    return Phrase(name, values)


def read_value(text: str) -> Any:
    """The value that a word stands for: a Python literal, `true`, `none`, a list with bare words in it, or text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        pass
    if text.startswith("[") and text.endswith("]"):  # a list with bare words in it
        return [read_value(item.strip()) for item in split(text[1:-1], ",", text) if item.strip()]
    return text


def split(text: str, separator: str, whole: str) -> list[str]:
    """Split at separators that lie outside brackets and quotes. An error shows the `whole` that `text` is a part of."""
    parts: list[str] = []
    depth: list[str] = []
    quote, start, escaped = "", 0, False
    for place, character in enumerate(text):
        if escaped:
            escaped = False
        elif quote:
            escaped = character == "\\"
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _OPEN:
            if len(depth) == _DEEPEST:
                raise _broken(f"brackets nest at most {_DEEPEST} deep; got more at position {place}", whole)
            depth.append(_CLOSE[_OPEN.index(character)])
        elif character in _CLOSE:
            if not depth or depth.pop() != character:
                raise _broken(f"`{character}` at position {place} closes nothing", whole)
        elif character == separator and not depth:
            parts.append(text[start:place])
            start = place + 1
    if quote or depth:
        raise _broken(f"`{quote or depth[-1]}` is missing at the end", whole)
    return [*parts, text[start:]]


def _broken(rule: str, whole: str) -> ConfigError:
    shown = whole if len(whole) <= 120 else f"{whole[:117]}..."
    return ConfigError(f'{rule}, in "{shown}". Write it like "seq_bn[reduction_factor=8,leave_out=[0,1]]|lora".')
