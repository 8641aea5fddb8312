"""torch's fused inference of `nn.TransformerEncoder` and `nn.MultiheadAttention`, which calls no module inside.

A layer of torch leaves it by itself where a module inside has a hook. The encoder around the layers does not: it turns
a padded batch into a nested tensor, which no hook and no other path of the layers can read.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unfused() -> Iterator[None]:
    """Without fused inference, in the whole process, for as long as the context lasts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Unnested:
    """Keeps an encoder from nested tensors until it is removed. (A class with `remove`, like the handle of a hook.)"""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self._encoder = encoder
        encoder.use_nested_tensor = False

    def remove(self) -> None:
        """Let the encoder use nested tensors again."""
        self._encoder.use_nested_tensor = True


def nesting_encoders(model: nn.Module, paths: list[str]) -> list[nn.TransformerEncoder]:
    """The encoders that would make nested tensors, around the modules at these paths."""
    around = {path[:stop] for path in paths for stop in range(len(path)) if not stop or path[stop] == "."}
    modules = (model.get_submodule(path) for path in sorted(around))
    return [m for m in modules if isinstance(m, nn.TransformerEncoder) and getattr(m, "use_nested_tensor", False)]
