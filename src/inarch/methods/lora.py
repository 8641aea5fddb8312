"""LoRA: a low-rank update beside a frozen linear map.

Hu et al. 2021 (arXiv 2106.09685), section 4.1:

    y = W x + (alpha / r) · B A drop(x) [+ c]        A (r, in), B (out, r), c (out,)

Tensors: (..., in) and (..., out), with B batch and L tokens in front; R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import Config, FrozenMap, config_class, option
from ..core.site import Sites
from .method import (
    LinearMethod,
    Placement,
    check_patterns,
    first_match,
    in_dtype,
    projection_placements,
    sequence_gate,
)


@config_class
class LoRAConfig(Config):
    """Low-rank updates of some projections of every layer."""

    selfattn_lora: bool = option(True, "Adapt projections of the attentions, those of `attn_matrices`.")
    attn_matrices: tuple[Literal["q", "k", "v", "o"], ...] = option(
        ("q", "v"), "Which projections of an attention: query, key, value, output."
    )
    intermediate_lora: bool = option(False, "Adapt the up-projection of the MLPs.")
    gate_lora: bool = option(False, "Adapt the gate projection of the MLPs that have one.")
    output_lora: bool = option(False, "Adapt the down-projection of the MLPs.")
    r: int = option(8, "Rank of the update.", at_least=1, at_most=2**20)
    alpha: float = option(8.0, "The update is multiplied by alpha / r.", more_than=0)
    rank_pattern: Mapping[str, int] = option(
        FrozenMap({}),
        "Other ranks than `r`, by patterns of projections such as `image0.3.self_attention.q` or `*.mlp.up`; the first "
        "that matches counts.",
        at_least=1,
        at_most=2**20,
    )
    alpha_pattern: Mapping[str, float] = option(
        FrozenMap({}), "Other values than `alpha`, by patterns of projections.", more_than=0
    )
    bias: bool = option(False, "A learned bias beside the update, added to the output of the projection.")
    dropout: float = option(0.0, "Dropout probability on the input of the update.", at_least=0, less_than=1)
    use_gating: bool = option(
        False, "A learned gate, one number per sequence, the mean over all its tokens, in the place of alpha / r."
    )
    init_weights: Literal["lora", "bert"] = option(
        "lora", "Initial weights: Kaiming A and zero B, so that training starts at the base model; or normal 0.02."
    )
    init_weights_seed: int | None = option(
        None, "Seed of the initial weights; none takes the global generator.", at_least=0, at_most=2**32 - 1
    )
    leave_out: tuple[int, ...] = option((), "Numbers of the layers without an update, counted from 0.")
    leave_out_roles: tuple[str, ...] = option(
        (), "Sites without an update in any layer, by their role, such as `mlp_2`."
    )
    leave_out_projections: tuple[str, ...] = option(
        (), "Projections without an update, by patterns such as `text0.3.self_attention.q` or `*.cross_attention.*`."
    )

    def problems(self) -> list[str]:
        found = []
        if self.selfattn_lora and not self.attn_matrices:
            found.append(
                "`LoRAConfig.attn_matrices` must name a projection where `selfattn_lora` is true; got an empty list. "
                "Write attn_matrices=['q','v'] or selfattn_lora=False."
            )
        if not (self.selfattn_lora or self.intermediate_lora or self.gate_lora or self.output_lora):
            found.append(
                "At least one of `selfattn_lora`, `intermediate_lora`, `gate_lora` and `output_lora` must be true; "
                "got none at `LoRAConfig`. Set `selfattn_lora=True`."
            )
        return found

    def roles(self) -> dict[str, str]:
        """The projections asked for by role, each with the field that asks."""
        wishes = dict.fromkeys(self.attn_matrices, "attn_matrices") if self.selfattn_lora else {}
        flags = {"intermediate_lora": "up", "gate_lora": "gate", "output_lora": "down"}
        return wishes | {role: flag for flag, role in flags.items() if getattr(self, flag)}

    def rank(self, placement: Placement) -> int:
        """The rank of the update of one projection."""
        return first_match(self.rank_pattern, placement.projection_key) or self.r

    def scale(self, placement: Placement) -> float:
        """What the update of one projection is multiplied by."""
        return (first_match(self.alpha_pattern, placement.projection_key) or self.alpha) / self.rank(placement)


class LoRA(LinearMethod):
    """The update of one projection, or of the rows of a fused one that play one role."""

    name = "lora"
    config_class = LoRAConfig
    presets: ClassVar[dict[str, Config]] = {"lora": LoRAConfig()}

    @classmethod
    def placements(cls, config: LoRAConfig, sites: Sites) -> list[Placement]:
        found = projection_placements(
            config.roles(), config.leave_out, config.leave_out_roles, config.leave_out_projections, sites
        )
        check_patterns("rank_pattern", config.rank_pattern, found, sites)
        check_patterns("alpha_pattern", config.alpha_pattern, found, sites)
        return found

    @classmethod
    def starts_at_base(cls, config: LoRAConfig) -> bool:
        return config.init_weights == "lora"

    @classmethod
    def obstacle_on_weight(cls, config: LoRAConfig) -> str:
        if config.dropout:
            return f"`dropout={config.dropout:g}`, which acts on the input of the projection,"
        if config.bias:
            return "`bias=True`, which acts on the output of the projection,"
        return "`use_gating=True`, which reads the input of the projection," if config.use_gating else ""

    @classmethod
    def formula(cls, config: LoRAConfig, placement: Placement) -> str:
        scale = "g(u) · " if config.use_gating else "" if (s := config.scale(placement)) == 1 else f"{s:.4g} · "
        return f"y = W u + {scale}B A u{' + c' if config.bias else ''}"

    @classmethod
    def obstacle_to_merge(cls, config: LoRAConfig) -> str:
        return "`use_gating=True`, which reads the input," if config.use_gating else ""

    @classmethod
    def combinations(cls, config: LoRAConfig) -> tuple[str, ...]:
        return ("negate_b",) if config.use_gating or config.bias else ("negate_b", "cat", "svd", "ties", "dare")

    signless: ClassVar[frozenset[str]] = frozenset({"A"})
    """The parameters that a negation leaves as they are."""

    def __init__(self, config: LoRAConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        projection = placement.site.projections[placement.role][placement.part]
        rank = config.rank(placement)
        self.A = nn.Parameter(torch.zeros(rank, projection.in_features))
        self.B = nn.Parameter(torch.zeros(projection.num_rows, rank))
        self.bias = nn.Parameter(torch.zeros(projection.num_rows)) if config.bias else None
        self.gate = nn.Linear(projection.in_features, 1) if config.use_gating else None
        self.batch_dim = placement.site.batch_dim
        self.scaling = config.scale(placement)
        self.dropout = config.dropout
        if config.init_weights == "lora":
            nn.init.kaiming_uniform_(self.A, a=5**0.5, generator=generator)
        else:
            nn.init.normal_(self.A, std=0.02, generator=generator)
            nn.init.normal_(self.B, std=0.02, generator=generator)
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02, generator=generator)
            nn.init.zeros_(self.gate.bias)

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        """(..., in), (..., rows) -> (..., rows)."""
        A = self.A
        x = in_dtype(inputs, A.dtype)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        delta = F.linear(F.linear(x, A), self.B)
        if self.bias is not None:
            output = output + in_dtype(self.bias, output.dtype)
        if self.gate is None:
            return _add_scaled(output, in_dtype(delta, output.dtype), self.scaling)
        gate = sequence_gate(self.gate, in_dtype(inputs, A.dtype), self.batch_dim)
        return output + in_dtype(delta * gate, output.dtype)

    def effective(self, weight: Tensor) -> Tensor:
        """W + (alpha / r) · B A, (rows, in) -> (rows, in)."""
        return _add_scaled(weight, in_dtype(self.B @ self.A, weight.dtype), self.scaling)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.effective(weight), bias if bias is None or self.bias is None else bias + self.bias

    def update(self) -> Tensor | None:
        return None if self.gate is not None else (self.B @ self.A) * self.scaling

    def put_update(self, update: Tensor) -> None:
        """By the singular value decomposition, cut off at the rank."""
        u, s, vh = torch.linalg.svd(update.to(torch.promote_types(update.dtype, torch.float32)), full_matrices=False)
        kept = min(self.A.shape[0], len(s))
        for factor in (self.A, self.B):
            factor.zero_()
        self.A[:kept] = vh[:kept].to(self.A.dtype)
        self.B[:, :kept] = (u[:, :kept] * s[:kept] / self.scaling).to(self.B.dtype)

    def put_side_by_side(self, sources: Sequence["LoRA"], weights: Sequence[float]) -> None:
        scaled = [s.B * (weight * s.scaling / self.scaling) for s, weight in zip(sources, weights, strict=True)]
        found = torch.cat([source.A for source in sources]), torch.cat(scaled, dim=1)
        for factor in (self.A, self.B):
            factor.zero_()
        self.A[: len(found[0])] = found[0]
        self.B[:, : len(found[0])] = found[1]


def _add_scaled(base: Tensor, update: Tensor, factor: float) -> Tensor:
    if torch.compiler.is_compiling():
        # Inductor of torch 2.13 forgets `alpha` where it makes one operator of a matrix product and a sum.
        return base + update * factor
    return torch.add(base, update, alpha=factor)
