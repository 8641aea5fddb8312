"""Reads VeRA of PEFT: two vectors for each projection, and one pair of random matrices for all."""

import re
from collections import defaultdict

from torch import Tensor

from ..bank import module_key
from ..core.config import Config
from ..core.errors import StateError
from ..core.site import Projection
from ..methods import Placement, placements
from ..methods.vera import VeRA
from .peft_config import left_out, made, wishes
from .peft_source import Source, check_rest, plain

_VERA_KEY = re.compile(r"(?P<path>.+)\.vera_lambda_(?P<side>[bd])(?:\.default)?")

_VERA_MATRIX = re.compile(r"base_model\.vera_(?P<side>[AB])(?:\.default)?")


def read_vera(source: Source, stored: dict[str, Tensor]) -> tuple[Config, dict[str, Tensor], list[str]]:
    """The configuration, the tensors by our keys, and the paths of the adapted modules.

    PEFT has one A and one B, as large as the largest projection needs, and takes their first columns and rows.
    """
    vectors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    matrices: dict[str, Tensor] = {}
    for key in list(stored):
        if (found := _VERA_MATRIX.fullmatch(key)) is not None:
            matrices[found["side"]] = stored.pop(key)
        elif (found := _VERA_KEY.fullmatch(key)) is not None:
            vectors[plain(found["path"])][found["side"]] = stored.pop(key)
    if len(matrices) < 2 or not vectors or any(len(pair) < 2 for pair in vectors.values()):
        raise StateError(
            f"VeRA is read with its random matrices and two vectors for each projection; got a folder without, "
            f"`{source.folder}`. Save it in PEFT with `save_projection=True`."
        )
    places = source.find(vectors)
    check_rest(source, stored)
    fused = next((path for path, meant in places.items() if len(meant) > 1 or _projection(meant[0]).rows), "")
    if fused:
        raise StateError(
            f"VeRA is read where each role has a projection of its own; got the fused `{fused}`, whose roles take "
            f"other rows of the random matrix, at `{source.folder}`. Use PEFT, or train LoRA."
        )
    present = [meant[0] for meant in places.values()]
    config = made(
        source,
        VeRA.name,
        **wishes(present),
        r=len(matrices["A"]),
        dropout=float(source.record.get("vera_dropout") or 0.0),
        **left_out(source.names.sites, present),
    )
    tensors = {
        f"{meant[0].site.key}.{module_key(VeRA.name, meant[0])}.{side}": vector
        for path, meant in places.items()
        for side, vector in vectors[path].items()
    }
    seen = set()
    for placement in placements(config, source.names.sites):
        projection, key = _projection(placement), f"{placement.site.key}.{module_key(VeRA.name, placement)}"
        sizes = {"A": projection.in_features, "B": projection.num_rows}
        for side, size in sizes.items():
            if (placement.site.stack, side, size) not in seen:  # kept by the first that has it
                seen.add((placement.site.stack, side, size))
                whole = matrices[side]
                tensors[f"{key}.{side}"] = (whole[:, :size] if side == "A" else whole[:size]).clone()
    return config, tensors, list(vectors)


def _projection(placement: Placement) -> Projection:
    return placement.site.projections[placement.role][placement.part]
