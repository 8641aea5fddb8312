"""The errors a user can meet.

    InarchError
    ├── ConfigError   an adapter configuration or a recipe that cannot mean anything
    ├── SiteError     a model in which a residual branch cannot be found, reached or trusted
    ├── SetupError    an adapter name or a composition that does not fit the model
    ├── StateError    an adapter folder that is missing, damaged or made for something else
    └── DataError     a data set that cannot be read or does not fit the task

Every message has the form `{rule that was broken}; got {value} at {place}. {what to do}.`
"""

import difflib
from collections.abc import Iterable


class InarchError(Exception):
    """Any error inarch raises on purpose."""


class ConfigError(InarchError, ValueError):
    """A configuration breaks a rule; the message lists every broken rule, each with its path."""


class SiteError(InarchError, RuntimeError):
    """A residual site of the model is missing, ambiguous or unreachable."""


class SetupError(InarchError, ValueError):
    """An adapter name or a composition of adapters does not fit the model."""


class StateError(InarchError, RuntimeError):
    """An adapter folder is missing, damaged, or belongs to another base model."""


class DataError(InarchError, ValueError):
    """Data for training, evaluation or prediction cannot be used."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word closest to `word`, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word[:100], names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{close[0]}`?"
    return f"Known: {', '.join(f'`{name}`' for name in names)}." if names else "None is known."


def join_problems(problems: list[str]) -> str:
    """One message out of all that is wrong, so that nobody mends an input one error at a time."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)
