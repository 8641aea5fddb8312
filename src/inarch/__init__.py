"""Graft trainable adapters onto any unmodified PyTorch Transformer."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .check import Finding as Finding
    from .check import Report as Report
    from .compose import Average as Average
    from .compose import BatchSplit as BatchSplit
    from .compose import Fuse as Fuse
    from .compose import MultiTask as MultiTask
    from .compose import Parallel as Parallel
    from .compose import Split as Split
    from .compose import Stack as Stack
    from .core.errors import ConfigError as ConfigError
    from .core.errors import DataError as DataError
    from .core.errors import InarchError as InarchError
    from .core.errors import SetupError as SetupError
    from .core.errors import SiteError as SiteError
    from .core.errors import StateError as StateError
    from .core.site import Site as Site
    from .core.site import Sites as Sites
    from .handle import Adapters as Adapters
    from .handle import attach as attach
    from .handle import check as check
    from .plan import Plan as Plan
    from .sites import probe as probe
    from .train.monitor import Monitor as Monitor
    from .train.trainer import AdapterTrainer as AdapterTrainer

_HOMES = {
    "AdapterTrainer": "train.trainer",
    "Adapters": "handle",
    "Average": "compose",
    "BatchSplit": "compose",
    "ConfigError": "core.errors",
    "DataError": "core.errors",
    "Finding": "check",
    "Fuse": "compose",
    "InarchError": "core.errors",
    "Monitor": "train.monitor",
    "MultiTask": "compose",
    "Parallel": "compose",
    "Plan": "plan",
    "Report": "check",
    "SetupError": "core.errors",
    "Site": "core.site",
    "SiteError": "core.errors",
    "Sites": "core.site",
    "Split": "compose",
    "Stack": "compose",
    "StateError": "core.errors",
    "attach": "handle",
    "check": "handle",
    "probe": "sites",
}
"""What a user may rely on, and the module that each name is loaded from when it is first asked for: the command line
says what is wrong with a command without torch, and the trainer alone brings accelerate with it."""

__all__ = [*_HOMES]  # noqa: PLE0604  the keys are text


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*_HOMES, *(name for name in globals() if name.startswith("__"))])


class _FrontDoor(ModuleType):
    """Keeps `attach` and `check` functions, whatever modules of these names are loaded meanwhile."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor
