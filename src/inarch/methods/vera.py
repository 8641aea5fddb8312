"""VeRA: trained vectors between frozen random matrices that all layers share.

Kopiczko et al. 2024 (arXiv 2310.11454), "Method formulation":

    y = W x + b · (B (d · (A x)))        d (r,), b (rows,) trained; A (r, in), B (rows, r) frozen and random

b starts at zero and d at 0.1. The matrices are shared by all projections of an adapter, in one stack of layers, that
have their number of input, or of output, features; they are kept and saved once. The library `adapters` trains dense
matrices in the place of the vectors: with them an update is plain LoRA, and is read as that.

Tensors: (..., in) and (..., rows), with B batch and L tokens in front; R rank.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import Config, config_class, option
from ..core.site import Sites
from .low_rank import ProjectionsConfig, dropout_on_weight
from .method import Frozen, LinearMethod, Placement, in_dtype


@config_class
class VeRAConfig(ProjectionsConfig):
    """Updates of some projections of every layer, of two vectors each."""

    r: int = option(256, "Rank of the random matrices, the length of the vector d.", at_least=1, at_most=2**20)
    d_initial: float = option(0.1, "What every number of the vector d is at the start; not zero.", more_than=0)
    dropout: float = option(0.0, "Dropout probability on the input of the update.", at_least=0, less_than=1)


class VeRA(LinearMethod):
    """The vectors of one projection, or of the rows of a fused one that play one role."""

    name = "vera"
    config_class = VeRAConfig
    presets: ClassVar[dict[str, Config]] = {"vera": VeRAConfig()}
    always_starts_at_base = True
    always_merges = True
    signless: ClassVar[frozenset[str]] = frozenset({"d"})

    @classmethod
    def placements(cls, config: VeRAConfig, sites: Sites) -> list[Placement]:
        return config.placements(sites)

    @classmethod
    def obstacle_on_weight(cls, config: VeRAConfig) -> str:
        return dropout_on_weight(config)

    @classmethod
    def combinations(cls, config: VeRAConfig) -> tuple[str, ...]:  # noqa: ARG003  of every configuration
        return ("negate_b",)

    @classmethod
    def formula(cls, config: VeRAConfig, placement: Placement) -> str:  # noqa: ARG003  of every configuration
        return "y = W u + b · (B (d · (A u)))"

    A: Tensor
    B: Tensor

    def __init__(self, config: VeRAConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        projection = placement.projection
        self.d = nn.Parameter(torch.full((config.r,), config.d_initial))
        self.b = nn.Parameter(torch.zeros(projection.num_rows))
        self.dropout = config.dropout
        self.stack = placement.site.stack  # so that an adapter of one tower is whole
        self.register_buffer("A", torch.empty(config.r, projection.in_features))
        self.register_buffer("B", torch.empty(projection.num_rows, config.r))
        for matrix in (self.A, self.B):
            nn.init.kaiming_uniform_(matrix, generator=generator)

    def share(self, known: dict[Any, Any]) -> None:
        self.tie("A", known, (self.stack, self.A.shape))
        self.tie("B", known, (self.stack, self.B.shape))

    def forward(self, inputs: Tensor, output: Tensor, base: Frozen | None = None) -> Tensor:
        """(..., in), (..., rows) -> (..., rows)."""
        x = in_dtype(inputs, self.d.dtype)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        delta = (
            F.linear(F.linear(x, in_dtype(self.tied("A", x), x.dtype)) * self.d, in_dtype(self.tied("B", x), x.dtype))
            * self.b
        )
        return output + in_dtype(delta, output.dtype)

    def effective(self, weight: Tensor, base: Frozen | None = None) -> Tensor:
        """W + diag(b) B diag(d) A, (rows, in) -> (rows, in)."""
        return weight + in_dtype(self.update(), weight.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None, base: Frozen | None = None) -> tuple[Tensor, Tensor | None]:
        return self.effective(weight), bias

    def update(self) -> Tensor:
        return (self.b[:, None] * self._frozen("B", self.b) * self.d) @ self._frozen("A", self.b)

    def _frozen(self, name: str, like: Tensor) -> Tensor:
        """A or B, in the type that the trained vectors may have been given since."""
        return in_dtype(self.tied(name, like), like.dtype)
