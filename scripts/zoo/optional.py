"""timm, for the types whose towers come from it, where it is installed beside the environment."""

import sys
from pathlib import Path

SITE = Path(__file__).parent.parent.parent / ".venv" / "timm-site"


def add_timm() -> bool:
    """Make timm importable, if it lies in its folder, before transformers looks for it."""
    if not SITE.is_dir():
        return False
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    # Its compiled operators do not fit every build of torch; timm's models use none, but torchvision names these two.
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor a, Tensor b, float c) -> Tensor",
    ):
        library.define(schema)
    _KEPT.append(library)
    sys.path.append(str(SITE))
    return True


_KEPT: list[object] = []
