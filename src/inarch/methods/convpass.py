"""Convpass: a convolutional bypass beside the attention and the MLP of every layer of an image model.

Jie and Deng 2022 (arXiv 2207.07039), section 3.2:

    y = x + f(LN(x)) + s * W_up drop(q(conv(q(W_down LN(x)))))        q(u) = u · sigmoid(1.702 u), 8 channels, biases

`conv` is a 3 x 3 convolution over the grid of tokens; a class token is convolved by itself, as an image of one place.
It starts from the identity, W_down from Xavier's distribution, and W_up and the biases from zero, so that training
starts at the base model. LN is the layer's norm before the branch; where none is there, the stream itself is read.

Tokens (B, L, D) are those of a square grid, row by row, behind at most one class token; registers, prompts or a
distillation token have to be counted in `prefix_tokens`, or are refused. Feature maps are their own grid.

Tensors: B batch, L tokens, P of them before the grid, H x W the grid, D width of the site, C channels.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import Config, config_class, option
from ..core.errors import ConfigError, SiteError
from ..core.site import Sites
from .beside import BesideMethod
from .method import Placement, in_dtype, seed_option
from .places import asked_kinds, kind_placements, kind_problems


@config_class
class ConvpassConfig(Config):
    """A convolutional bypass at some residual sites of every layer."""

    mh_adapter: bool = option(True, "Beside the self-attention (or other token mixer) of every layer.")
    output_adapter: bool = option(True, "Beside the MLP of every layer.")
    channels: int = option(8, "Channels of the convolution.", at_least=1, at_most=2**14)
    scale: float = option(1.0, "Factor on the output; the paper tries 0.01 to 100 for each task.", more_than=0)
    dropout: float = option(0.1, "Dropout probability before the last map.", at_least=0, less_than=1)
    prefix_tokens: int | None = option(
        None,
        "Tokens that stand before those of the grid, such as a class token with registers; none: one where that leaves "
        "a square, or no token.",
        at_least=0,
    )
    init_weights_seed: int | None = seed_option()
    leave_out: tuple[int, ...] = option((), "Numbers of the layers without a bypass, counted from 0.")
    leave_out_roles: tuple[str, ...] = option(
        (), "Sites without a bypass in any layer, by their role, such as `mlp_2`."
    )

    def problems(self) -> list[str]:
        return kind_problems(self)


class Convpass(BesideMethod):
    """The bypass of one site."""

    name = "convpass"
    config_class = ConvpassConfig
    presets: ClassVar[dict[str, Config]] = {
        "convpass": ConvpassConfig(),
        "convpass_attn": ConvpassConfig(output_adapter=False),
    }
    always_starts_at_base = True

    @classmethod
    def placements(cls, config: ConvpassConfig, sites: Sites) -> list[Placement]:
        found = kind_placements(config, asked_kinds(config), sites)
        # Of a model of nobody's library, the data may be images.
        odd = next((place.site for place in found if not place.site.stack.startswith(("image", "data"))), None)
        if odd is not None:
            raise ConfigError(
                f"A convolution over tokens needs those of an image; got `{odd.key}` of {sites.model_class}. Leave the "
                "layers of that stack out, or use `adaptformer`."
            )
        return found

    @classmethod
    def sees_whole_sequences(cls, config: ConvpassConfig) -> bool:  # noqa: ARG003  always
        return True

    @classmethod
    def obstacle_to_block(cls, config: Any, placement: Placement, block: str) -> str:
        if block == "Split":
            return "A convolution runs over whole grids, of which a `Split` has none"
        return super().obstacle_to_block(config, placement, block)

    @staticmethod
    def reads_normed(config: ConvpassConfig) -> bool:  # noqa: ARG004  always
        return True

    def __init__(self, config: ConvpassConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        width, channels = placement.site.width, config.channels
        self.down = nn.Linear(width, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.up = nn.Linear(channels, width)
        self.place = placement.site.key
        self.batch_dim = placement.site.batch_dim
        self.prefix_tokens = config.prefix_tokens
        self.scale, self.dropout = config.scale, config.dropout
        nn.init.xavier_uniform_(self.down.weight, generator=generator)
        nn.init.dirac_(self.conv.weight)
        for zero in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            assert zero is not None
            nn.init.zeros_(zero)

    def branch(self, z: Tensor) -> Tensor:
        """s * W_up drop(q(conv(q(W_down z)))), (B, L, D) or (B, H, W, D) -> the same."""
        u = _quick_gelu(self._convolved(_quick_gelu(self.down(in_dtype(z, self.down.weight.dtype)))))
        if self.training and self.dropout:
            u = F.dropout(u, self.dropout)
        return in_dtype(self.up(u) * self.scale, z.dtype)

    def _convolved(self, u: Tensor) -> Tensor:
        """Of channels (B, L, C), (L, B, C) or (B, H, W, C), the same."""
        if u.dim() == 4:
            return self._over_grid(u)
        tokens = u.movedim(self.batch_dim, 0)
        samples, length, channels = tokens.shape
        before = self._prefix(length)
        side = math.isqrt(length - before)
        # Those before it each by itself: an image of one place meets the middle of the kernel.
        alone = self._over_grid(tokens[:, :before].reshape(samples * before, 1, 1, channels))
        grid = self._over_grid(tokens[:, before:].reshape(samples, side, side, channels))
        whole = torch.cat([alone.reshape(samples, before, channels), grid.flatten(1, 2)], dim=1)
        return whole.movedim(0, self.batch_dim)

    def _over_grid(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        convolved: Tensor = self.conv(maps.movedim(-1, 1))
        return convolved.movedim(1, -1)

    def _prefix(self, length: int) -> int:
        """How many of so many tokens stand before the grid. Raises `SiteError` where the rest is none."""
        for before in (0, 1) if self.prefix_tokens is None else (self.prefix_tokens,):
            rest = length - before
            if rest > 0 and math.isqrt(rest) ** 2 == rest:
                return before
        known = "at most one" if self.prefix_tokens is None else f"`prefix_tokens={self.prefix_tokens}`"
        raise SiteError(
            f"A convolution over tokens needs a square grid of them, behind {known}; got {length} tokens at "
            f"`{self.place}`. Say with `prefix_tokens` how many stand before the grid, registers among them."
        )


def _quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(1.702 * u)
