"""SSF: a scale and a shift of every feature behind each projection and each norm.

Lian et al. 2022 (arXiv 2210.08823), section 3.2, equation 6:

    y = g * x + b        g (out,) from ones, b (out,) from zeros

The paper draws both around these values, with a deviation of 0.02 (`init_weights=normal`); from the values themselves
training starts at the base model. Scales and shifts go into the weight and the bias of their module exactly, so a
merged model costs nothing; a module without a bias has nowhere to put a shift, and needs `shift=False` to be merged.
Norms on queries and keys and outside the layers are scaled too; these last count to the first site of their stack. Left
out is what plays no role, such as the convolution of patches, which the paper scales.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.config import Config, config_class, option
from ..core.site import Sites
from .method import Frozen, LinearMethod, Placement, in_dtype, seed_option
from .parameters import chosen


@config_class
class SSFConfig(Config):
    """Scales and shifts behind the projections and norms of every layer."""

    shift: bool = option(True, "A shift beside the scale.")
    roles: tuple[str, ...] = option(
        (),
        "What is scaled, by role: q, k, v, o, up, gate, down, pre_norm, post_norm, branch_norm, inner_norm, "
        "outer_norm; none named means all there is.",
    )
    init_weights: Literal["identity", "normal"] = option(
        "identity", "Initial weights: ones and zeros, so that training starts at the base model; or normal 0.02 around."
    )
    init_weights_seed: int | None = seed_option()
    leave_out: tuple[int, ...] = option((), "Numbers of the layers without scales, counted from 0.")
    leave_out_roles: tuple[str, ...] = option((), "Sites without scales in any layer, by their role, such as `mlp_2`.")


class SSF(LinearMethod):
    """The scale and the shift behind one projection, one norm, or the part of a fused projection that plays a role."""

    name = "ssf"
    config_class = SSFConfig
    presets: ClassVar[dict[str, Config]] = {"ssf": SSFConfig()}
    always_merges = True

    @classmethod
    def placements(cls, config: SSFConfig, sites: Sites) -> list[Placement]:
        every = [
            Placement(site=site, port="linear", role=role, part=part)
            for site in sites
            for role, projections in site.projections.items()
            for part in range(len(projections))
        ]
        every += [
            Placement(site=site, port="linear", role=role)
            for site in sites
            for role, vectors in site.affine.items()
            if vectors.is_norm
        ]
        return chosen(
            every,
            "projections and norms",
            config.roles,
            leave_out=config.leave_out,
            leave_out_roles=config.leave_out_roles,
            sites=sites,
        )

    @classmethod
    def starts_at_base(cls, config: SSFConfig) -> bool:
        return config.init_weights == "identity"

    @classmethod
    def formula(cls, config: SSFConfig, placement: Placement) -> str:
        inside = "n(u)" if placement.role not in placement.site.projections else "W u"
        return f"y = g · {inside}{' + b' if config.shift else ''}"

    def __init__(self, config: SSFConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        size = placement.projection.num_rows
        is_norm = placement.role not in placement.site.projections
        self.offset = placement.vectors.offset if is_norm else 0.0
        self.scale = nn.Parameter(torch.ones(size))
        self.shift = nn.Parameter(torch.zeros(size)) if config.shift else None
        if config.init_weights == "normal":
            nn.init.normal_(self.scale, mean=1.0, std=0.02, generator=generator)
            if self.shift is not None:
                nn.init.normal_(self.shift, std=0.02, generator=generator)

    @property
    def adds_bias(self) -> bool:
        return self.shift is not None

    def forward(self, inputs: Tensor, output: Tensor, base: Frozen | None = None) -> Tensor:
        """g * x + b, (..., out) -> (..., out)."""
        scaled = output * in_dtype(self.scale, output.dtype)
        return scaled if self.shift is None else scaled + in_dtype(self.shift, output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None, base: Frozen | None = None) -> tuple[Tensor, Tensor | None]:
        # Of a norm that multiplies by 1 + w, g (1 + w) is to be 1 + the new w.
        scale = self.scale if weight.dim() == 1 else self.scale[:, None]
        scaled = (weight + self.offset) * scale - self.offset if self.offset else weight * scale
        if bias is None:
            return scaled, None
        return scaled, bias * self.scale if self.shift is None else bias * self.scale + self.shift
