"""timm beside the environment, not in it: `make venv` installs it, and a torchvision for it, into `.venv/timm-site`.

timm needs torchvision, and transformers changes what it does where it finds one. The torchvision that an index has for
a build of torch without CUDA may not load its compiled operators; timm needs none of them, only that they are declared.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

SITE = Path(__file__).parent.parent / ".venv" / "timm-site"

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor d, Tensor s, float t) -> Tensor",
)


def import_timm() -> ModuleType:
    """timm, for as long as the process lives; torchvision is taken away again, as if it were not installed."""
    if "timm" in sys.modules:
        return sys.modules["timm"]
    if not (SITE / "timm").is_dir():
        raise SystemExit("There is no `.venv/timm-site` yet; make it with: make venv")
    sys.path.append(str(SITE))
    try:
        return _import()
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _forget("timm", "torchvision")
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in _OPERATORS:
            library.define(operator)
        return _import()
    finally:
        sys.path.remove(str(SITE))
        _forget("torchvision")


def _import() -> ModuleType:
    return importlib.import_module("timm")


def _forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
