"""The optional packages, imported on first use and missed with the line that installs them."""

import importlib
from typing import Any

from ..core.errors import InarchError

_NEEDED_BY = {
    "jinja2": ("A report", "report"),
    "markupsafe": ("A report", "report"),
    "optuna": ("A sweep", "sweep"),
    "psycopg": ("A study in PostgreSQL", "postgresql"),
    "vl_convert": ("A report", "report"),
}
"""By package: who needs it, where that is not training, and the extra of inarch that installs it."""


def extra(module: str) -> Any:
    """The module `module` of a package that an extra of inarch installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InarchError(missing(module, error)) from error


def missing(module: str, error: ImportError) -> str:
    """What to tell the user when `module` does not import."""
    package = module.partition(".")[0]
    who, name = _NEEDED_BY.get(package, ("Training", "train"))
    return (
        f"{who} needs the optional package `{package}`; got `{error}` on importing it. "
        f'Install it with `pip install "inarch[{name}]"`.'
    )
