"""LoRA: a low-rank update beside a frozen linear map.

Hu et al. 2021 (arXiv 2106.09685), section 4.1:

    y = W x + s · B A drop(x) [+ c]        A (r, in), B (rows, r), c (rows,), s = alpha / r

rsLoRA (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2) has s = alpha / sqrt(r), `use_rslora`.

PiSSA (Meng et al. 2024, arXiv 2404.02948, section 3) starts from the r largest singular values of the base,
W = U S V^T: A = sqrt(S_r) V_r^T, B = U_r sqrt(S_r), and trains beside the residual W - B A. Here the base is neither
changed nor copied: the initial factors stay beside the trained ones, frozen and saved with them,

    y = W x + s · (B A - B0 A0) x          s · B0 A0 = U_r S_r V_r^T

which is the same function and the same training, and exactly the base's at the start. Of experts that a module holds in
one parameter, A is (E, r, in) and B (E, rows, r): an update for each.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import Config, config_class, option
from ..core.site import Sites
from .low_rank import LowRankConfig, add_scaled, dropout_on_weight
from .method import Frozen, LinearMethod, Placement, in_dtype, projection_gate


@config_class
class LoRAConfig(LowRankConfig):
    """Low-rank updates of some projections of every layer."""

    experts_lora: bool = option(
        False, "Adapt the projections of experts that a module holds in one parameter, with an update for each expert."
    )
    bias: bool = option(False, "A learned bias beside the update, added to the output of the projection.")
    use_gating: bool = option(
        False, "A learned gate, one number per sequence, the mean over all its tokens, in the place of alpha / r."
    )
    init_weights: Literal["lora", "bert", "pissa"] = option(
        "lora",
        "Initial weights: Kaiming A and zero B; normal 0.02, which does not start at the base model; or the principal "
        "singular vectors of the base (PiSSA).",
    )

    def problems(self) -> list[str]:
        found = LowRankConfig.problems(self) if not self.experts_lora or self.selfattn_lora else []
        if self.init_weights == "pissa" and self.use_gating:
            found.append(
                "PiSSA splits the base by a fixed scale; got `init_weights='pissa'` with `use_gating=True` at "
                "`LoRAConfig`. Set `use_gating=False`."
            )
        return found

    def roles(self) -> dict[str, str]:
        experts = dict.fromkeys(("expert_up", "expert_down"), "experts_lora") if self.experts_lora else {}
        return LowRankConfig.roles(self) | experts


class LoRA(LinearMethod):
    """The update of one projection, or of the rows of a fused one that play one role."""

    name = "lora"
    config_class = LoRAConfig
    presets: ClassVar[dict[str, Config]] = {"lora": LoRAConfig()}

    @classmethod
    def placements(cls, config: LoRAConfig, sites: Sites) -> list[Placement]:
        return config.placements(sites)

    @classmethod
    def starts_at_base(cls, config: LoRAConfig) -> bool:
        return config.init_weights != "bert"

    @classmethod
    def obstacle_on_weight(cls, config: LoRAConfig) -> str:
        if config.dropout:
            return dropout_on_weight(config)
        if config.bias:
            return "`bias=True`, which acts on the output of the projection,"
        return "`use_gating=True`, which reads the input of the projection," if config.use_gating else ""

    @classmethod
    def formula(cls, config: LoRAConfig, placement: Placement) -> str:
        scale = "g(u) · " if config.use_gating else "" if (s := config.scale(placement)) == 1 else f"{s:.4g} · "
        product = "(B A - B0 A0)" if config.init_weights == "pissa" else "B A"
        return f"y = W u + {scale}{product} u{' + c' if config.bias else ''}"

    @classmethod
    def obstacle_to_merge(cls, config: LoRAConfig) -> str:
        return "`use_gating=True`, which reads the input," if config.use_gating else ""

    @classmethod
    def combinations(cls, config: LoRAConfig) -> tuple[str, ...]:
        return ("negate_b",) if config.use_gating else ("negate_b", "cat", "svd", "ties", "dare")

    @classmethod
    def starts_from_base(cls, config: LoRAConfig) -> bool:
        return config.init_weights == "pissa"

    signless: ClassVar[frozenset[str]] = frozenset({"A"})
    additive: ClassVar[frozenset[str]] = frozenset({"bias"})

    def __init__(self, config: LoRAConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        projection = placement.projection
        rank = config.rank(placement)
        each = (projection.experts,) if projection.experts else ()
        self.A = nn.Parameter(torch.zeros(*each, rank, projection.in_features))
        self.B = nn.Parameter(torch.zeros(*each, projection.num_rows, rank))
        self.bias = nn.Parameter(torch.zeros(projection.num_rows)) if config.bias else None
        self.gate = nn.Linear(projection.in_features, 1) if config.use_gating else None
        self.batch_dim = placement.site.batch_dim
        self.scaling = config.scale(placement)
        self.dropout = config.dropout
        is_pissa = config.init_weights == "pissa"
        self.register_buffer("A0", torch.zeros_like(self.A) if is_pissa else None)
        self.register_buffer("B0", torch.zeros_like(self.B) if is_pissa else None)
        if config.init_weights == "lora":
            for matrix in self.A if each else (self.A,):
                nn.init.kaiming_uniform_(matrix, a=5**0.5, generator=generator)
        elif not is_pissa:
            nn.init.normal_(self.A, std=0.02, generator=generator)
            nn.init.normal_(self.B, std=0.02, generator=generator)
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02, generator=generator)
            nn.init.zeros_(self.gate.bias)

    A0: Tensor | None
    B0: Tensor | None

    @torch.no_grad()
    def start(self, base: Frozen) -> None:
        """The principal part of the weight, by its singular value decomposition."""
        self._decompose(base.weight)
        assert self.A0 is not None
        assert self.B0 is not None
        self.A0.copy_(self.A)
        self.B0.copy_(self.B)

    def forward(self, inputs: Tensor, output: Tensor, base: Frozen | None = None) -> Tensor:
        """(..., in), (..., rows) -> (..., rows)."""
        A = self.A
        x = in_dtype(inputs, A.dtype)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        delta = F.linear(F.linear(x, A), self.B)
        if self.A0 is not None and self.B0 is not None:
            delta = delta - F.linear(F.linear(x, self.A0), self.B0)
        if self.bias is not None:
            output = output + in_dtype(self.bias, output.dtype)
        if self.gate is None:
            return add_scaled(output, in_dtype(delta, output.dtype), self.scaling)
        gate = projection_gate(self.gate, inputs, self.batch_dim)
        return output + in_dtype(delta * gate, output.dtype)

    def effective(self, weight: Tensor, base: Frozen | None = None) -> Tensor:
        """W + s · B A, (rows, in) -> (rows, in)."""
        return add_scaled(weight, in_dtype(self._product(), weight.dtype), self.scaling)

    def fold(self, weight: Tensor, bias: Tensor | None, base: Frozen | None = None) -> tuple[Tensor, Tensor | None]:
        return self.effective(weight, base), bias if bias is None or self.bias is None else bias + self.bias

    def update(self) -> Tensor | None:
        return None if self.gate is not None else self._product() * self.scaling

    def put_update(self, update: Tensor) -> None:
        """By the singular value decomposition, cut off at the rank."""
        self._decompose(update, evenly=False)

    def put_side_by_side(self, sources: Sequence["LoRA"], weights: Sequence[float]) -> None:
        factors = [source.factors() for source in sources]
        scales = [weight * source.scaling / self.scaling for source, weight in zip(sources, weights, strict=True)]
        A = torch.cat([A for A, _ in factors], dim=-2)
        B = torch.cat([B * scale for (_, B), scale in zip(factors, scales, strict=True)], dim=-1)
        for factor in (self.A, self.B):
            factor.zero_()
        self.A[..., : A.shape[-2], :] = A
        self.B[..., : A.shape[-2]] = B

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (rows, r) of the whole update, which has twice the rank in PiSSA."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0], dim=-2), torch.cat([self.B, -self.B0], dim=-1)

    def _product(self) -> Tensor:
        product = self.B @ self.A
        return product if self.A0 is None or self.B0 is None else product - self.B0 @ self.A0

    def _decompose(self, matrix: Tensor, *, evenly: bool = True) -> None:
        """Make scale · B A the nearest matrix of the rank, singular values in B or in both factors."""
        u, s, vh = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
        kept = min(self.A.shape[-2], s.shape[-1])
        for factor in (self.A, self.B):
            factor.zero_()
        s = s[..., :kept] / self.scaling
        right = s.sqrt() if evenly else torch.ones_like(s)
        left = s / right.clamp_min(torch.finfo(s.dtype).tiny)
        self.A[..., :kept, :] = (right[..., None] * vh[..., :kept, :]).to(self.A)
        self.B[..., :kept] = (u[..., :kept] * left[..., None, :]).to(self.B)
