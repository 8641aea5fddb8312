"""Invertible adapters: an invertible map of the embedded tokens, undone before the output embeddings.

Pfeiffer et al. 2020 (MAD-X, arXiv 2005.00052), section 4.3; the coupling of Dinh et al. 2015 (NICE, arXiv 1410.8516) or
of Kingma and Dhariwal 2018 (Glow, arXiv 1807.03039), section 3.3 and table 1.

    nice:  y1 = x1 + F(x2)                      glow:  (log s, t) = F(x2),  y1 = exp(log s) · x1 + t
           y2 = x2 + G(y1)                             (log s, t) = G(y1),  y2 = exp(log s) · x2 + t
    F(u) = W_up · act(W_down · u + b_down) + b_up

Each half is transformed given the other one, in turn, so Glow's permutation between couplings is not needed; its
actnorm normalises data for a training from scratch, and has no part here. As in the paper, the last map of a Glow
coupling starts at zero, so that training starts at the base model. (`glow` of the library `adapters` 1.3.0 cannot run.)

They act where the embedding of the first stack of text ends; of an encoder and decoder, in the encoder. The inverse
acts on what the model's output embeddings get. In a `Stack` the inverses run in the opposite order.

Tensors: B batch, L tokens, D width, R bottleneck.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.config import Config, config_class, option
from ..core.site import Entry, Sites
from .method import Placement, activation, in_dtype, seed_option
from .ports_input import InputMethod, Point, text_entry


@config_class
class InvertibleConfig(Config):
    """An invertible map of the embedded tokens."""

    inv_adapter: Literal["nice", "glow"] = option("nice", "The coupling: `nice` adds, `glow` also scales.")
    inv_adapter_reduction_factor: float = option(
        2.0, "Width of what a coupling reads, half of the embedding, divided by that of its bottleneck.", more_than=0
    )
    non_linearity: str = option("relu", "Activation between the two projections, by its name in transformers.")
    init_weights_seed: int | None = seed_option()


class Invertible(InputMethod):
    """The map of one model."""

    name = "invertible"
    config_class = InvertibleConfig
    presets: ClassVar[dict[str, Config]] = {"invertible": InvertibleConfig()}
    is_invertible = True

    @classmethod
    def formula(cls, config: InvertibleConfig, placement: Placement) -> str:  # noqa: ARG003  one place for all
        return "F(x), and F⁻¹ before the output embeddings"

    @classmethod
    def placements(cls, config: InvertibleConfig, sites: Sites) -> list[Placement]:  # noqa: ARG003  one place for all
        site, entry = text_entry(cls.name, sites)
        return [Placement(site=site, port="input", entry=entry)]

    @classmethod
    def point(cls, config: InvertibleConfig, entry: Entry | None) -> Point:  # noqa: ARG003  one for all
        return "embedding"

    @classmethod
    def starts_at_base(cls, config: InvertibleConfig) -> bool:
        return config.inv_adapter == "glow"

    def __init__(self, config: InvertibleConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        self.scales = config.inv_adapter == "glow"
        width = placement.site.width if placement.entry is None else placement.entry.width
        self.split = width // 2
        rest, results = width - self.split, 2 if self.scales else 1
        factor, name = config.inv_adapter_reduction_factor, config.non_linearity
        self.F = _Net(rest, results * self.split, factor, name, generator, zero=self.scales)
        self.G = _Net(self.split, results * rest, factor, name, generator, zero=self.scales)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x1, x2 = self._halves(tokens)
        y1 = self._couple(x1, self.F(x2))
        y2 = self._couple(x2, self.G(y1))
        return in_dtype(torch.cat((y1, y2), dim=-1), tokens.dtype)

    def inverse(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        y1, y2 = self._halves(tokens)
        x2 = self._uncouple(y2, self.G(y1))
        x1 = self._uncouple(y1, self.F(x2))
        return in_dtype(torch.cat((x1, x2), dim=-1), tokens.dtype)

    def _halves(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = in_dtype(tokens, self.F.down.weight.dtype)
        return tokens[..., : self.split], tokens[..., self.split :]

    def _couple(self, x: Tensor, found: Tensor) -> Tensor:
        if not self.scales:
            return x + found
        log_scale, shift = found.chunk(2, dim=-1)
        return log_scale.exp() * x + shift

    def _uncouple(self, y: Tensor, found: Tensor) -> Tensor:
        if not self.scales:
            return y - found
        log_scale, shift = found.chunk(2, dim=-1)
        return (y - shift) * (-log_scale).exp()


class _Net(nn.Module):
    """What a coupling adds to, or does with, one half of the features, from the other half."""

    def __init__(self, width: int, out: int, factor: float, name: str, generator: Any, *, zero: bool) -> None:
        super().__init__()
        inner = max(1, int(width // factor))
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, out)
        self.activation = activation(name)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
            nn.init.zeros_(linear.bias)
        if zero:
            nn.init.zeros_(self.up.weight)

    def forward(self, u: Tensor) -> Tensor:
        found: Tensor = self.up(self.activation(self.down(u)))
        return found
