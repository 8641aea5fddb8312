"""BitFit: only biases are trained, those of projections and of norms.

Ben Zaken et al. 2022 (arXiv 2106.10199), section 3:

    b -> b + d        d of the size of b, zero at the start

What is kept and trained is the difference from the pre-trained bias, so training starts at the base model, adapters
add up, and merging is the same sum. The paper trains all biases of the encoder, or, in table 4, those of the queries
and of the up-projections: `bitfit[roles=[q,up]]`. Included are the biases of all projections that play a role and of
all norms, those behind the embeddings and behind the last layer too, which count to the first site of their stack.
Left out are biases that the model has not got, and those of modules in no role, such as convolutions of patches and
poolers; the task head is trained anyway. The bias of a key cancels in a softmax, unless positions are rotated in after
it: where nothing but the softmax sees keys, `k` gets no gradient but that of rounding.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import Config, config_class, option
from ..core.site import Sites
from .method import Placement, in_dtype
from .parameters import ParameterMethod, vector_placements


@config_class
class BitFitConfig(Config):
    """Differences of biases in every layer."""

    roles: tuple[str, ...] = option(
        (),
        "The biases that are trained, by role: q, k, v, o, up, gate, down, pre_norm, post_norm, branch_norm, "
        "inner_norm, outer_norm; none named means all there are.",
    )
    leave_out: tuple[int, ...] = option((), "Numbers of the layers whose biases stay as they are, counted from 0.")
    leave_out_roles: tuple[str, ...] = option(
        (), "Sites whose biases stay as they are in any layer, by their role, such as `mlp_2`."
    )


class BitFit(ParameterMethod):
    """The difference of one bias."""

    name = "bitfit"
    config_class = BitFitConfig
    presets: ClassVar[dict[str, Config]] = {"bitfit": BitFitConfig()}
    always_starts_at_base = True

    @classmethod
    def placements(cls, config: BitFitConfig, sites: Sites) -> list[Placement]:
        return vector_placements(
            config.roles,
            ("bias",),
            norms_only=False,
            leave_out=config.leave_out,
            leave_out_roles=config.leave_out_roles,
            sites=sites,
        )

    @classmethod
    def formula(cls, config: BitFitConfig, placement: Placement) -> str:  # noqa: ARG003  the same for all
        return "b + d"

    def __init__(self, config: BitFitConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(placement.vectors.size))

    def effective(self, leaf: str, value: Tensor) -> Tensor:
        """b + d, (size,) -> (size,)."""
        return value + in_dtype(self.bias, value.dtype)
