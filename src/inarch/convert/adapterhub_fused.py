"""Updates of fused projections: the library `adapters` takes for granted that queries, keys and values lie one below
the other, a third of the output features each.

Where a model interleaves them head by head (DeBERTa), the update it calls `q` is one of the first third of the rows,
whatever these are. It is read as what it is: each of our roles gets the rows it has of every update. For LoRA that is
one update of the rank of all together; for (IA)³ a scale of each row.

H: output features of a third; n: updates, each of rank r.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.site import Site

THIRDS = ("q", "k", "v")


def are_stacked(site: Site) -> bool:
    """Whether the roles of a fused projection lie one below the other."""
    rows = [site.projections[role][0].rows for role in THIRDS if len(site.projections.get(role, ())) == 1]
    if len(rows) != len(THIRDS):
        return False
    starts = [found[0][0] for found in rows if found is not None and len(found) == 1]
    return len(starts) == len(THIRDS) and starts == sorted(starts)


def asked_thirds(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The thirds that the LoRA or (IA)³ of a folder adapts, in the order of their tensors."""
    rows = settings["configs"] if settings.get("architecture") == "union" else [settings]
    for row in rows:
        if row.get("architecture") == "lora":
            asked = row.get("attn_matrices", ("k", "v") if row.get("composition_mode") == "scale" else ("q", "v"))
            return tuple(role for role in THIRDS if role in asked)
    return ()


def thirds_of_roles(site: Site, asked: tuple[str, ...], leaf: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the updates of some thirds, as the tensors of our roles; nothing if its shape is no such tensor's.

    Arguments: `leaf` says what it is: `lora_A` (n·r, in), `lora_B` (n·H, r), or (n·H,) for (IA)³; else `gate` (n, ...).
    """
    if not asked or len(tensor) < len(asked) or len(tensor) % len(asked):
        return {}
    size = len(tensor) // len(asked)
    if are_stacked(site):
        return dict(zip(asked, tensor.chunk(len(asked)), strict=True))
    if leaf == "lora_A":
        return dict.fromkeys(THIRDS, tensor)
    blocks = dict(zip((THIRDS.index(role) for role in asked), tensor.chunk(len(asked)), strict=True))
    return {role: _rows_of(site.projections[role][0].rows or (), blocks, size) for role in THIRDS}


def _rows_of(rows: tuple[tuple[int, int], ...], blocks: Mapping[int, Tensor], size: int) -> Tensor:
    """What the updates of some thirds have for these rows: (rows, n·r) for LoRA, (rows,) for (IA)³."""
    found = []
    numbers = list(blocks)
    some = blocks[numbers[0]]
    for row in (row for start, stop in rows for row in range(start, stop)):
        third, place = divmod(row, size)
        if some.dim() == 1:
            found.append(blocks[third][place] if third in blocks else some.new_tensor(1.0))
            continue
        wide = some.new_zeros(len(numbers), some.shape[1])
        if third in blocks:
            wide[numbers.index(third)] = blocks[third][place]
        found.append(wide.flatten())
    return torch.stack(found)


def widened(leaf: str, tensor: Tensor, rank: int) -> Tensor:
    """A tensor of an update of lower rank, filled up with zeros: (r, in) -> (rank, in), or (out, r) -> (out, rank)."""
    if leaf == "lora_A" and len(tensor) < rank:
        return torch.cat([tensor, tensor.new_zeros(rank - len(tensor), *tensor.shape[1:])])
    if leaf == "lora_B" and tensor.dim() == 2 and tensor.shape[1] < rank:
        return torch.cat([tensor, tensor.new_zeros(len(tensor), rank - tensor.shape[1])], dim=1)
    return tensor
