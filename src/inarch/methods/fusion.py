"""Fusion layers: an attention over the outputs of several bottlenecks, at every site that they share.

Pfeiffer et al. 2021 (AdapterFusion, arXiv 2005.00247), section 3.2:

    p = softmax over n of (Q z · K u_n)        F = sum over n of p_n V u_n

z is the input of the last adapter, u_n what the branch of adapter n gives; the sum goes where the output of one adapter
would. V starts near the identity and is held there by a penalty, 0.01 · ||I - V||² for each layer.

Tensors: B batch, L tokens, N adapters, D width of the site.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import Config, config_class, option
from ..core.site import Site, Sites
from .method import AbstractMethod, Placement, in_dtype, seed_option
from .places import KINDS, asked_kinds, kind_placements, layer_number

_OFF_DIAGONAL = 1e-6


@config_class
class FusionConfig(Config):
    """Fusion layers at some residual sites of every layer: those of the bottlenecks that they combine."""

    mh_adapter: bool = option(False, "Fuse at the self-attention (or other token mixer) of every layer.")
    output_adapter: bool = option(True, "Fuse at the MLP of every layer.")
    cross_adapter: bool = option(False, "Fuse at the cross-attention of every layer that has one.")
    query: bool = option(True, "A learned map of the query, the input of the last adapter.")
    key: bool = option(True, "A learned map of the keys, the outputs of the adapters.")
    value: bool = option(True, "A learned map of the values, the outputs of the adapters; it starts near the identity.")
    regularization: float = option(
        0.01, "Factor of the penalty on the value's distance from the identity; 0 for none.", at_least=0
    )
    dropout: float = option(0.0, "Dropout probability on the attention's scores.", at_least=0, less_than=1)
    init_weights_seed: int | None = seed_option()
    leave_out: tuple[int, ...] = option((), "Numbers of the layers without fusion, counted from 0.")
    leave_out_roles: tuple[str, ...] = option((), "Sites without fusion in any layer, by their role, such as `mlp_2`.")


def fused_places(reached: Sequence[Site], sites: Sites) -> dict[str, Any]:
    """The fields of a configuration that say where fusion layers are, for those of adapters at these sites."""
    keys = {site.key for site in reached}
    kinds = {site.kind for site in reached}
    alike = [site for site in sites if site.kind in kinds]
    layers = {layer_number(site, sites) for site in reached}
    roles = {site.role for site in alike if site.key in keys}
    return {
        **{field: not kinds.isdisjoint(meant) for field, meant in KINDS.items()},
        "leave_out": sorted({layer_number(site, sites) for site in alike} - layers),
        "leave_out_roles": sorted({site.role for site in alike} - roles),
    }


class Fusion(AbstractMethod):
    """The fusion layer of one site."""

    name = "fusion"
    config_class = FusionConfig
    presets: ClassVar[dict[str, Config]] = {
        "dynamic_fusion": FusionConfig(),
        "static_fusion": FusionConfig(value=False, regularization=0.0),
    }

    @classmethod
    def placements(cls, config: FusionConfig, sites: Sites) -> list[Placement]:
        return kind_placements(config, asked_kinds(config), sites, port="fusion")

    def __init__(self, config: FusionConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        width = placement.site.width
        self.query = nn.Linear(width, width) if config.query else None
        self.key = nn.Linear(width, width) if config.key else None
        self.value = nn.Linear(width, width, bias=False) if config.value else None
        self.attention = nn.Softmax(dim=-1)
        self.dropout, self.regularization = config.dropout, config.regularization
        for linear in (self.query, self.key):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02, generator=generator)
                nn.init.zeros_(linear.bias)
        if self.value is not None:
            nn.init.constant_(self.value.weight, _OFF_DIAGONAL)
            with torch.no_grad():
                self.value.weight.fill_diagonal_(1.0)

    def fuse(self, given: tuple[Tensor, ...]) -> Tensor:
        """F from z and every u_n, (B, L, D) each -> (B, L, D)."""
        z, outputs = given[0], torch.stack(given[1:], dim=-2)  # (B, L, N, D)
        q, k, v = (
            values if linear is None else linear(in_dtype(values, linear.weight.dtype))
            for linear, values in ((self.query, z), (self.key, outputs), (self.value, outputs))
        )
        scores = (q.unsqueeze(-2) @ in_dtype(k, q.dtype).mT).squeeze(-2)
        if self.training and self.dropout:
            scores = nn.functional.dropout(scores, self.dropout)
        weights = in_dtype(self.attention(scores), v.dtype)
        return in_dtype((weights.unsqueeze(-2) @ v).squeeze(-2), z.dtype)

    def penalty(self) -> Tensor | None:
        if self.value is None or not self.regularization:
            return None
        weight = self.value.weight
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return self.regularization * (identity - weight).square().sum()
