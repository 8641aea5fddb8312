"""`from adapters.context import AdapterSetup`."""

from typing import Any

from .composition import parse_composition as parse_composition
from .models import AdapterSetup as AdapterSetup
from .refused import NAMES, not_here


def __getattr__(name: str) -> Any:
    if name in NAMES:
        raise not_here(name, NAMES[name])
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
