"""MTL-LoRA: updates of several tasks that share their outer matrices and have an inner one of their own.

Yang et al. 2024 (arXiv 2410.09437), and the code of its authors (`mLoRALinear`):

    y = W x + s · sum_i p_i B_i L A drop(x)        p = softmax(w / t), s = alpha / r

A (r, in) and B_i (rows, r) are those of all tasks, the matrix L (r, r), by default a diagonal, and the weights w (n,)
are those of one. Each task is an adapter: `share` ties A and B of several, and a `MultiTask` sends every sample through
the adapter of its `task_ids`. L starts at the identity and B at zero, so that training starts as that of LoRA. The w
are drawn between ±1 / sqrt(n): from equal ones, as in the library `adapters`, all B_i would get the same gradient from
every task, and stay one matrix. With n = 1 there is no w, since p would be one and w get no gradient.

Tensors: (..., in) and (..., rows), with B batch and L tokens in front; R rank.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import Config, config_class, option
from ..core.site import Sites
from .low_rank import LowRankConfig, add_scaled, dropout_on_weight
from .method import Frozen, LinearMethod, Placement, in_dtype


@config_class
class MTLLoRAConfig(LowRankConfig):
    """Low-rank updates of one of several tasks."""

    n_up_projection: int = option(1, "Number of the matrices B.", at_least=1, at_most=2**10)
    task_specific_matrix_type: Literal["singular_values", "linear"] = option(
        "singular_values", "The matrix of the task: a diagonal, or a full one."
    )
    weights_sharpness: float = option(
        0.05, "Temperature of the softmax over the matrices B; lower prefers one.", more_than=0
    )
    init_weights: Literal["lora", "bert"] = option(
        "lora", "Initial weights: Kaiming A and zero B, so that training starts at the base model; or normal 0.02."
    )


class MTLLoRA(LinearMethod):
    """The update of one projection, or of the rows of a fused one that play one role, for one task."""

    name = "mtl_lora"
    config_class = MTLLoRAConfig
    presets: ClassVar[dict[str, Config]] = {"mtl_lora": MTLLoRAConfig()}
    always_merges = True
    shareable = frozenset({"A", "B"})

    @classmethod
    def placements(cls, config: MTLLoRAConfig, sites: Sites) -> list[Placement]:
        return config.placements(sites)

    @classmethod
    def starts_at_base(cls, config: MTLLoRAConfig) -> bool:
        return config.init_weights == "lora"

    @classmethod
    def obstacle_on_weight(cls, config: MTLLoRAConfig) -> str:
        return dropout_on_weight(config)

    @classmethod
    def formula(cls, config: MTLLoRAConfig, placement: Placement) -> str:
        scale = "" if (s := config.scale(placement)) == 1 else f"{s:.4g} · "
        return f"y = W u + {scale}{'(sum p B)' if config.n_up_projection > 1 else 'B'} L A u"

    def __init__(self, config: MTLLoRAConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        projection = placement.projection
        rank, count = config.rank(placement), config.n_up_projection
        self.A = nn.Parameter(torch.zeros(rank, projection.in_features))
        self.B = nn.Parameter(torch.zeros(count, projection.num_rows, rank))
        is_full = config.task_specific_matrix_type == "linear"
        self.task = nn.Parameter(torch.eye(rank) if is_full else torch.ones(rank))
        self.weights = nn.Parameter(torch.zeros(count)) if count > 1 else None
        self.sharpness = config.weights_sharpness
        self.scaling = config.scale(placement)
        self.dropout = config.dropout
        if config.init_weights == "lora":
            nn.init.kaiming_uniform_(self.A, a=5**0.5, generator=generator)
        else:
            nn.init.normal_(self.A, std=0.02, generator=generator)
            nn.init.normal_(self.B, std=0.02, generator=generator)
        if self.weights is not None:
            nn.init.uniform_(self.weights, -(count**-0.5), count**-0.5, generator=generator)

    def forward(self, inputs: Tensor, output: Tensor, base: Frozen | None = None) -> Tensor:
        """(..., in), (..., rows) -> (..., rows)."""
        x = in_dtype(inputs, self.A.dtype)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        delta = F.linear(F.linear(x, self.A), self._outer())
        return add_scaled(output, in_dtype(delta, output.dtype), self.scaling)

    def effective(self, weight: Tensor, base: Frozen | None = None) -> Tensor:
        """W + s · (sum p B) L A, (rows, in) -> (rows, in)."""
        return add_scaled(weight, in_dtype(self._outer() @ self.A, weight.dtype), self.scaling)

    def fold(self, weight: Tensor, bias: Tensor | None, base: Frozen | None = None) -> tuple[Tensor, Tensor | None]:
        return self.effective(weight), bias

    def update(self) -> Tensor:
        return (self._outer() @ self.A) * self.scaling

    def _outer(self) -> Tensor:
        """(sum p B) L, (rows, r)."""
        outer = self.B[0]
        if self.weights is not None:
            outer = torch.einsum("n,nor->or", torch.softmax(self.weights / self.sharpness, dim=0), self.B)
        return outer @ self.task if self.task.dim() == 2 else outer * self.task
