"""The optional packages of the training side, imported on first use and missed with the line that installs them."""

import importlib
from typing import Any

from ..core.errors import InarchError


def extra(module: str) -> Any:
    """The module `module` of a package that `inarch[train]` installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InarchError(missing(module, error)) from error


def missing(module: str, error: ImportError) -> str:
    """What to tell the user when `module` does not import."""
    return (
        f"Training needs the optional package `{module.partition('.')[0]}`; got `{error}` on importing it. "
        'Install it with `pip install "inarch[train]"`.'
    )
