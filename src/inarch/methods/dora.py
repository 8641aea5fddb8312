"""DoRA: a low-rank update of the direction of each row of a weight, and a learned magnitude of the row.

Liu et al. 2024 (arXiv 2402.09353), section 4, equation 5:

    y = m · (W + s B A) / ||W + s B A|| x + b [+ c]        m, c (rows,), A (r, in), B (rows, r), s = alpha / r

The norm is that of each output feature, as the authors' code has it, and m starts at ||W||. The gradient does not go
through the norm (section 4.3). The bias b of the base is not scaled, and the scale s is inside the norm, unlike in the
library `adapters`. Dropout acts on the input of the update alone. Every forward needs the norm, hence the values of
the frozen weight: on a quantised base these are read anew each time, which costs most where few tokens are computed.

Tensors: (..., in) and (..., rows), with B batch and L tokens in front; R rank.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import Config, config_class, option
from ..core.site import Sites
from .low_rank import LowRankConfig, add_scaled, dropout_on_weight
from .method import Frozen, LinearMethod, Placement, in_dtype


@config_class
class DoRAConfig(LowRankConfig):
    """Weights of some projections of every layer, taken apart into magnitudes and directions."""

    bias: bool = option(False, "A learned bias beside the update, added to the output of the projection.")


class DoRA(LinearMethod):
    """Magnitudes and update of one projection, or of the rows of a fused one that play one role."""

    name = "dora"
    config_class = DoRAConfig
    presets: ClassVar[dict[str, Config]] = {"dora": DoRAConfig()}
    always_starts_at_base = True
    always_merges = True
    reads_base = True

    @classmethod
    def placements(cls, config: DoRAConfig, sites: Sites) -> list[Placement]:
        return config.placements(sites)

    @classmethod
    def starts_from_base(cls, config: DoRAConfig) -> bool:  # noqa: ARG003  of every configuration
        return True

    @classmethod
    def obstacle_on_weight(cls, config: DoRAConfig) -> str:
        return dropout_on_weight(config) or (
            "`bias=True`, which acts on the output of the projection," if config.bias else ""
        )

    @classmethod
    def formula(cls, config: DoRAConfig, placement: Placement) -> str:
        scale = "" if (s := config.scale(placement)) == 1 else f"{s:.4g} · "
        return f"y = m · (W + {scale}B A) / ||W + {scale}B A|| u{' + c' if config.bias else ''}"

    def __init__(self, config: DoRAConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        projection = placement.projection
        rank = config.rank(placement)
        self.A = nn.Parameter(torch.zeros(rank, projection.in_features))
        self.B = nn.Parameter(torch.zeros(projection.num_rows, rank))
        self.magnitude = nn.Parameter(torch.ones(projection.num_rows))
        self.bias = nn.Parameter(torch.zeros(projection.num_rows)) if config.bias else None
        self.scaling = config.scale(placement)
        self.dropout = config.dropout
        nn.init.kaiming_uniform_(self.A, a=5**0.5, generator=generator)

    @torch.no_grad()
    def start(self, base: Frozen) -> None:
        self.magnitude.copy_(_norm(base.weight))

    def forward(self, inputs: Tensor, output: Tensor, base: Frozen | None = None) -> Tensor:
        """(..., in), (..., rows) -> (..., rows)."""
        assert base is not None
        factor = in_dtype(self.factor(base), output.dtype)
        x = in_dtype(inputs, self.A.dtype)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        delta = in_dtype(F.linear(F.linear(x, self.A), self.B), output.dtype)
        # In this form nothing is rounded where the factor is one.
        plain = output if base.bias is None else output - in_dtype(base.bias, output.dtype)
        result = add_scaled(output + (factor - 1) * plain, factor * delta, self.scaling)
        return result if self.bias is None else result + in_dtype(self.bias, output.dtype)

    def factor(self, base: Frozen) -> Tensor:
        """What the rows of W + s B A are multiplied by, (rows,)."""
        with torch.no_grad():
            # Rounded as the magnitudes are, so that they are exactly equal at the start.
            norm = in_dtype(_norm(self._moved(base.weight)), self.magnitude.dtype)
        return self.magnitude / norm

    def effective(self, weight: Tensor, base: Frozen | None = None) -> Tensor:
        assert base is not None
        return in_dtype(self.factor(base), weight.dtype)[:, None] * self._moved(weight)

    def fold(self, weight: Tensor, bias: Tensor | None, base: Frozen | None = None) -> tuple[Tensor, Tensor | None]:
        return self.effective(weight, base), bias if bias is None or self.bias is None else bias + self.bias

    def _moved(self, weight: Tensor) -> Tensor:
        return add_scaled(weight, in_dtype(self.B @ self.A, weight.dtype), self.scaling)


def _norm(weight: Tensor) -> Tensor:
    """The norm of each row, (rows, in) -> (rows,), in 32 bits at least; of a row of zeros, one."""
    norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
    return torch.where(norm == 0, torch.ones_like(norm), norm)
