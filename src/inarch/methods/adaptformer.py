"""AdaptFormer: a bottleneck beside the MLP of every layer, with a small fixed scale.

Chen et al. 2022 (arXiv 2205.13535), section 3.2, equations 2 and 3:

    y = x + MLP(LN(x)) + s * (W_up drop(ReLU(W_down x + b_down)) + b_up)        s = 0.1, 64 units

`x` is the stream as it enters the MLP's norm: the authors' code (`models/custom_modules.py`) reads it there, and has no
norm before the bottleneck; `normed=True` reads it behind the layer's norm. The dropout, of 0.1 in that code, is between
the two maps. W_down starts from Kaiming's distribution, W_up and both biases from zero, so that training starts at the
base model.

Tensors: B batch, L tokens, D width of the site, R bottleneck.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import Config, config_class, option
from ..core.site import Site, Sites
from .beside import BesideMethod
from .method import Placement, in_dtype, seed_option
from .places import kind_placements


@config_class
class AdaptFormerConfig(Config):
    """A bottleneck beside the MLP of every layer."""

    bottleneck: int = option(64, "Units of the bottleneck.", at_least=1, at_most=2**20)
    scale: float = option(0.1, "Factor on the output of the bottleneck.", more_than=0)
    normed: bool = option(False, "Read the stream behind the layer's norm, where one stands before the MLP.")
    dropout: float = option(0.1, "Dropout probability between the two maps.", at_least=0, less_than=1)
    init_weights_seed: int | None = seed_option()
    leave_out: tuple[int, ...] = option((), "Numbers of the layers without a bottleneck, counted from 0.")
    leave_out_roles: tuple[str, ...] = option(
        (), "Sites without a bottleneck in any layer, by their role, such as `mlp_2`."
    )


class AdaptFormer(BesideMethod):
    """The bottleneck of one site."""

    name = "adaptformer"
    config_class = AdaptFormerConfig
    presets: ClassVar[dict[str, Config]] = {"adaptformer": AdaptFormerConfig()}
    always_starts_at_base = True

    @classmethod
    def placements(cls, config: AdaptFormerConfig, sites: Sites) -> list[Placement]:
        return kind_placements(config, {"mlp": "adaptformer"}, sites)

    @staticmethod
    def fits(config: AdaptFormerConfig, site: Site) -> bool:
        return site.kind == "mlp" and site.role not in config.leave_out_roles

    @staticmethod
    def reads_normed(config: AdaptFormerConfig) -> bool:
        return config.normed

    def __init__(self, config: AdaptFormerConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        width = placement.site.width
        self.down = nn.Linear(width, config.bottleneck)
        self.up = nn.Linear(config.bottleneck, width)
        self.scale, self.dropout = config.scale, config.dropout
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def branch(self, z: Tensor) -> Tensor:
        """s * (W_up drop(ReLU(W_down z + b_down)) + b_up), (B, L, D) -> (B, L, D)."""
        u = torch.relu(self.down(in_dtype(z, self.down.weight.dtype)))
        if self.training and self.dropout:
            u = F.dropout(u, self.dropout)
        return in_dtype(self.up(u) * self.scale, z.dtype)
