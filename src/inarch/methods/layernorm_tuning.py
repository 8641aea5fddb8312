"""LayerNorm tuning: only the weights and biases of norms are trained.

Zhao et al. 2023 (arXiv 2312.11420), section 2:

    w -> w + d_w,  b -> b + d_b        zero at the start; a norm without a bias has none

What is kept and trained is the difference from the pre-trained vectors, so training starts at the base model, adapters
add up, and merging is the same sum. The paper trains the norms of the layers, `layernorm_tuning[outer_norms=False]`;
by default those behind the embeddings and behind the last layer are trained too, as in PEFT. These count to the first
site of their stack. Left out are norms whose vectors are not called `weight` and `bias`, and those of the task head,
which is trained anyway.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import Config, config_class, option
from ..core.site import Sites
from .method import Placement, in_dtype
from .parameters import ParameterMethod, plain_role, vector_placements


@config_class
class LayerNormTuningConfig(Config):
    """Differences of the vectors of norms in every layer."""

    weight: bool = option(True, "Train the weights of norms.")
    bias: bool = option(True, "Train the biases of norms that have one.")
    outer_norms: bool = option(True, "Train the norms outside the layers too.")
    roles: tuple[str, ...] = option(
        (),
        "The norms that are trained, by role: pre_norm, post_norm, branch_norm, inner_norm, outer_norm; none named "
        "means all there are.",
    )
    leave_out: tuple[int, ...] = option((), "Numbers of the layers whose norms stay as they are, counted from 0.")
    leave_out_roles: tuple[str, ...] = option(
        (), "Sites whose norms stay as they are in any layer, by their role, such as `mlp_2`."
    )

    def problems(self) -> list[str]:
        found = []
        if not (self.weight or self.bias):
            found.append(
                "At least one of `weight` and `bias` must be true; got none at `LayerNormTuningConfig`. "
                "Set `weight=True`."
            )
        if "outer_norm" in self.roles and not self.outer_norms:
            found.append(
                "What `roles` names is trained; got `outer_norm` with `outer_norms=False` at `LayerNormTuningConfig`. "
                "Leave one of the two out."
            )
        return found

    def leaves(self) -> tuple[str, ...]:
        """The vectors that are trained."""
        return tuple(leaf for leaf in ("weight", "bias") if getattr(self, leaf))


class LayerNormTuning(ParameterMethod):
    """The differences of the vectors of one norm."""

    name = "layernorm_tuning"
    config_class = LayerNormTuningConfig
    presets: ClassVar[dict[str, Config]] = {"layernorm_tuning": LayerNormTuningConfig()}
    always_starts_at_base = True

    @classmethod
    def placements(cls, config: LayerNormTuningConfig, sites: Sites) -> list[Placement]:
        found = vector_placements(
            config.roles,
            config.leaves(),
            norms_only=True,
            leave_out=config.leave_out,
            leave_out_roles=config.leave_out_roles,
            sites=sites,
        )
        return [place for place in found if config.outer_norms or plain_role(place.role) != "outer_norm"]

    @classmethod
    def formula(cls, config: LayerNormTuningConfig, placement: Placement) -> str:
        return ", ".join(f"{leaf[0]} + d" for leaf in config.leaves() if leaf in placement.vectors.names)

    def __init__(
        self,
        config: LayerNormTuningConfig,
        placement: Placement,
        layer: int,
        generator: Any = None,
    ) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        for leaf in config.leaves():
            if leaf in placement.vectors.names:
                setattr(self, leaf, nn.Parameter(torch.zeros(placement.vectors.size)))

    def effective(self, leaf: str, value: Tensor) -> Tensor:
        """w + d, (size,) -> (size,)."""
        return value + in_dtype(getattr(self, leaf), value.dtype)
