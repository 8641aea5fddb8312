"""A PEFT folder beside the model that it is read into: which projections its module paths mean."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StateError
from ..methods import OutOfRange, Placement
from .peft_names import Names

LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.(?P<leaf>weight|bias)")


@dataclass(frozen=True, slots=True)
class Source:
    """What is read, and what it is read into."""

    folder: Path
    record: Mapping[str, Any]
    model: nn.Module
    names: Names
    other_base: str
    out_of_range: list[OutOfRange] = field(default_factory=list)
    """Numbers of the folder with which no adapter can be here, where that is told and not refused."""

    def find(self, paths: Iterable[str]) -> dict[str, list[Placement]]:
        """The projections of every module path. Raises `StateError` that lists those that mean none here."""
        found = {path: self.names.find(path) for path in paths}
        strange = [path for path, meant in found.items() if not meant]
        if strange:
            more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
            raise StateError(
                "Adapters are read at the projections inside the layers' branches; got modules that are none in "
                f"{type(self.model).__name__}: {', '.join(f'`{path}`' for path in strange[:6])}{more}, at "
                f"`{self.folder}`. Load it on the base model it was trained on, or train it anew without these."
            )
        twice = Counter(meant.projection_key for meanings in found.values() for meant in meanings)
        clash = next((key for key, count in twice.items() if count > 1), "")
        if clash:
            raise StateError(
                f"One update belongs to a projection; got several for `{clash}` at `{self.folder}`. "
                "Load it on the base model it was trained on."
            )
        return found


def plain(path: str) -> str:
    """A module path without the names of PEFT's wrappers."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def rows_of(placement: Placement, tensor: Tensor) -> Tensor:
    """What a tensor of the output features of a module has for one of the roles that it plays."""
    projection = placement.projection
    if projection.rows is None or len(tensor) != projection.out_features:
        return tensor.clone()
    return torch.cat([tensor[start:stop] for start, stop in projection.rows])


def own_path(path: str, model: nn.Module) -> str:
    """The path in this model of a module that was a part of another model around the same base, or of its base."""
    modules = dict(model.named_modules())
    prefix = str(getattr(model, "base_model_prefix", ""))
    choices = (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}."))
    return next((choice for choice in choices if choice in modules), path)


def check_rest(source: Source, stored: Mapping[str, Tensor]) -> None:
    """Raise `StateError` for tensors that have no meaning here and say something else than the model."""
    own = dict(source.model.state_dict())
    strange = []
    for key, tensor in stored.items():
        base = own.get(plain(key))
        if base is None or base.is_meta or base.shape != tensor.shape or not torch.equal(base.to(tensor), tensor):
            strange.append(f"`{key}`")
    if strange:
        what = " (trained biases outside of the adapted projections)" if source.record.get("bias") == "all" else ""
        more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
        raise StateError(
            f"Every tensor of an adapter must belong to a projection of a branch, or to what `modules_to_save` names; "
            f"got {', '.join(strange[:6])}{more}{what} at `{source.folder}`. Use PEFT, or train it without these."
        )
