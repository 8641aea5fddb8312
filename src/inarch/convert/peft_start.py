"""What PEFT takes out of a base where LoRA starts from it: PiSSA and OLoRA train beside W - s · B0 A0.

    pissa    W = U S V^T    A0 = sqrt(S_r / s) V_r^T    B0 = U_r sqrt(S_r / s)        Meng et al. 2024
    olora    W = Q R        A0 = R_r                    B0 = Q_r                      Büyükakyüz 2024

PEFT changes the base each time it loads such an adapter, and so does not save these. Here they are computed again from
the base, which stays as it is, and kept beside the trained factors. PiSSA by a randomised decomposition
(`pissa_niter_4`) starts from numbers that no folder keeps, and is refused with what starts from data.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import StateError
from ..frozen import Base
from ..methods import Placement
from .peft_source import Source

FROM_BASE = ("pissa", "olora")


def kind_of(record: Mapping[str, Any]) -> str:
    """How LoRA of a folder starts from its base; empty where it does not."""
    start = str(record.get("init_lora_weights", "")).lower()
    return start if start in FROM_BASE else ""


def start_of(source: Source, place: Placement, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) of the whole module that a projection is of."""
    projection = place.projection
    if projection.transposed and kind_of(source.record) == "olora":
        raise StateError(
            f"OLoRA is read where PEFT starts it from the weight of a map; got `{place.projection_key}`, whose weight "
            f"it takes the other way round, at `{source.folder}`. Use PEFT."
        )
    path = place.site.absolute(projection.path)
    module = source.model.get_submodule(path)
    return factors(source.record, Base(module, replace(projection, rows=None), path).read().weight, rank, scale)


@torch.no_grad()
def factors(record: Mapping[str, Any], weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 and B0 for a weight (out, in)."""
    whole = weight.float()
    if kind_of(record) == "olora":
        q, r = torch.linalg.qr(whole)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
