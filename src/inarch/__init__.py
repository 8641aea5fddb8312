"""Graft trainable adapters onto any unmodified PyTorch Transformer."""

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
from .version import __version__ as __version__


def __getattr__(name: str) -> object:
    """`AdapterTrainer` brings transformers and accelerate with it, so it is loaded when it is first asked for."""
    if name == "AdapterTrainer":
        from .train.trainer import AdapterTrainer

        return AdapterTrainer
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted({*globals(), "AdapterTrainer"})
