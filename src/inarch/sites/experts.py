"""Experts held as parameters of three dimensions, which their module applies itself: which is which, by their shapes.

    gate and up-projection in one, or the up-projection alone    (E, k I, D) or, stored as (in, out), (E, D, k I)
    down-projection                                              (E, D, I)   or (E, I, D)

E experts, D width of the site, I inner width, k 2 or 1. Both are roles of their own, `expert_up` and `expert_down`: an
update of the weight is what a method can make there, and one for each expert.
"""

from collections.abc import Iterator
from itertools import permutations

from torch import nn

from ..core.site import Projection


def find_experts(module: nn.Module, path: str, width: int) -> dict[str, Projection]:
    """The projections of the experts that a module holds, by role; none where their shapes leave a doubt."""
    found = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    if len(found) != 2:
        return {}
    readings = [
        reading
        for (up, down) in permutations(found)
        for reading in _readings((up, found[up].shape), (down, found[down].shape), path, width)
    ]
    return readings[0] if len(readings) == 1 else {}


def _readings(
    first: tuple[str, tuple[int, ...]], second: tuple[str, tuple[int, ...]], path: str, width: int
) -> Iterator[dict[str, Projection]]:
    """The ways to read two parameters, by name and shape, as up- and down-projection."""
    (up_name, up), (down_name, down) = first, second
    for transposed in (False, True):
        rows, inputs = (up[2], up[1]) if transposed else (up[1], up[2])
        outputs, inner = (down[2], down[1]) if transposed else (down[1], down[2])
        if up[0] == down[0] and inputs == outputs == width and rows in (inner, 2 * inner):
            yield {
                role: Projection(
                    path=path,
                    in_features=taken,
                    out_features=given,
                    transposed=transposed,
                    weight=name,
                    experts=up[0],
                )
                for role, name, taken, given in (
                    ("expert_up", up_name, width, rows),
                    ("expert_down", down_name, inner, width),
                )
            }
