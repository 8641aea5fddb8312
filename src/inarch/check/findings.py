"""Findings, and the register of the rules that make them.

A rule is a small function of `Facts` with a code that stays the same from version to version. Its docstring is its
documentation: what it looks for, why it matters and where that is known from.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from .facts import Facts
from .repair import Repair

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that will go wrong in training, or may, and how to mend it."""

    code: str
    level: Level
    place: str
    message: str
    fixes: tuple[Repair, ...] = ()
    """Equally small changes of the configuration, each checked again; any one of them clears the finding."""
    advice: str = ""
    """What is to be said of the fixes together, or what to do where no change of the configuration helps."""

    def __str__(self) -> str:
        text = f"{self.level} {self.code} at {self.place}: {self.message}."
        if self.fixes:
            text += f" Set {' or '.join(f'`{fix}`' for fix in self.fixes)}."
        return f"{text} {self.advice}" if self.advice else text


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule with its code, the level of what it finds, and its documentation."""

    code: str
    level: Level
    find: Callable[[Facts], Iterator[Finding]]
    documentation: str


def rule(code: str, level: Level) -> Callable[[Callable[[Facts], Iterator[Finding]]], Rule]:
    """Make a function a rule. Raises `TypeError` where it has no documentation."""

    def make(function: Callable[[Facts], Iterator[Finding]]) -> Rule:
        if not function.__doc__:
            raise TypeError(f"A rule is documented; got none at `{function.__name__}`. Say what it finds, and why.")
        return Rule(code, level, function, inspect.cleandoc(function.__doc__))

    return make


@cache
def rules() -> tuple[Rule, ...]:
    """Every rule of the files in `rules/`, errors first. Raises `TypeError` if two have one code."""
    found: dict[str, Rule] = {}
    package = importlib.import_module(f"{__package__}.rules")
    for module in pkgutil.iter_modules(package.__path__):
        for value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
            if isinstance(value, Rule) and found.setdefault(value.code, value) is not value:
                raise TypeError(f"Two rules have the code `{value.code}`.")
    return tuple(sorted(found.values(), key=lambda item: (LEVELS.index(item.level), item.code)))


def find(facts: Facts) -> tuple[Finding, ...]:
    """What all rules find, errors first."""
    return tuple(finding for item in rules() for finding in item.find(facts))
