"""ReFT: a low-rank intervention on the stream after a layer, at the first and the last tokens of a prompt.

Wu et al. 2024, "ReFT: Representation Finetuning for Language Models" (arXiv 2404.03592), section 3.2, equations 2 and
3, and for NoReFT the ablation of the authors' library:

    LoReFT   y = drop(x + Rᵀ (f(W x + b) − R x))     R Rᵀ = I
    NoReFT   y = drop(x + Rᵀ (f(W x + b) − R x))
    DiReFT   y = drop(x + Rᵀ f(W x + b))

R and W are (r, D), b is (r,); f is the identity unless `non_linearity` names another. The dropout is on the whole new
token, as in the authors' library. None of the three starts at the base model: W is random and R not W.

The rows of R are kept orthonormal without any parametrization: what is trained and saved is a free matrix, and R is the
orthonormal factor of its QR decomposition with a positive diagonal, computed in single precision at least. That is the
matrix itself where it is orthonormal, and the same in every copy, precision and process.

The positions are those of the paper: the first `prefix_positions` and the last `suffix_positions` tokens of the
prompt. Padding on either side does not count where the model is called with an `attention_mask`. A forward takes the
whole sequence for the prompt; in generation, with a cache or without, what is generated is never a suffix, and is a
prefix only where the prompt is shorter than `prefix_positions`, as in a forward of the same sequence.

The library `adapters` counts every decoded token as a prefix, and forgets `subtract_projection` in its files.

Tensors: B batch, L tokens, D width, R rank.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import Config, config_class, option
from ..core.errors import ConfigError
from ..core.site import Sites
from .method import Placement, activation, in_dtype, seed_option
from .places import check_layers, layer_number
from .ports_stream import StreamMethod, Tokens, rewritten, stream_placements


@config_class
class ReftConfig(Config):
    """Interventions on the stream after some layers."""

    layers: Literal["all"] | tuple[int, ...] = option(
        "all", "Numbers of the layers with an intervention, counted from 0 through all stacks; or `all`.", at_least=0
    )
    prefix_positions: int = option(3, "How many first tokens of a prompt are changed.", at_least=0)
    suffix_positions: int = option(0, "How many last tokens of a prompt are changed.", at_least=0)
    r: int = option(1, "Rank of the intervention.", at_least=1, at_most=2**20)
    orthogonality: bool = option(True, "Keep the rows of R orthonormal (LoReFT).")
    subtract_projection: bool = option(True, "Replace what the stream has in the subspace; false adds to it (DiReFT).")
    tied_weights: bool = option(False, "One intervention for first and last tokens, in the place of two.")
    non_linearity: str | None = option(None, "Activation f, by its name in transformers; none is the identity.")
    dropout: float = option(0.05, "Dropout probability on the changed tokens.", at_least=0, less_than=1)
    init_weights_seed: int | None = seed_option()

    def problems(self) -> list[str]:
        found = []
        if not self.prefix_positions and not self.suffix_positions:
            found.append(
                "`prefix_positions` or `suffix_positions` must be above zero; got neither at `ReftConfig`. Set "
                "`prefix_positions=3`."
            )
        if not self.layers:
            found.append("`ReftConfig.layers` must name a layer; got an empty list. Write layers='all'.")
        return found


class Reft(StreamMethod):
    """The interventions after one layer."""

    name = "reft"
    config_class = ReftConfig
    presets: ClassVar[dict[str, Config]] = {
        "loreft": ReftConfig(),
        "noreft": ReftConfig(orthogonality=False),
        "direft": ReftConfig(orthogonality=False, subtract_projection=False),
    }

    @classmethod
    def placements(cls, config: ReftConfig, sites: Sites) -> list[Placement]:
        wanted = None if config.layers == "all" else config.layers
        check_layers("layers", wanted or (), sites)
        found = stream_placements(sites)
        narrow = next((place.site for place in found if place.site.width < config.r), None)
        if config.orthogonality and narrow is not None:
            raise ConfigError(
                f"At most as many rows as the stream is wide can be orthonormal; got `r={config.r}` for a width of "
                f"{narrow.width} at `{narrow.key}`. Choose a smaller `r`, or `orthogonality=False`."
            )
        return [place for place in found if wanted is None or layer_number(place.site, sites) in wanted]

    @classmethod
    def obstacle_to_block(cls, config: ReftConfig, placement: Placement, block: str) -> str:
        if block == "Split":
            return "A `Split` gives each adapter its own tokens, an intervention has the ends of whole sequences"
        return super().obstacle_to_block(config, placement, block)

    @classmethod
    def formula(cls, config: ReftConfig, placement: Placement) -> str:  # noqa: ARG003  the same everywhere
        source = "W x + b" if config.non_linearity is None else f"{config.non_linearity}(W x + b)"
        inner = f"({source} − R x)" if config.subtract_projection else f"({source})"
        counts = {"first": config.prefix_positions, "last": config.suffix_positions}
        where = " and ".join(f"the {count} {end}" for end, count in counts.items() if count)
        return f"y = x + Rᵀ {inner} at {where} tokens"

    def __init__(self, config: ReftConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        self.counts = config.prefix_positions, config.suffix_positions
        self.minds_end = config.suffix_positions > 0
        self.token_dim = 1 - placement.site.batch_dim

        def intervention(*, wanted: bool) -> "Intervention | None":
            return Intervention(config, placement.site.width, generator) if wanted else None

        self.both = intervention(wanted=config.tied_weights)
        self.prefix = intervention(wanted=not config.tied_weights and config.prefix_positions > 0)
        self.suffix = intervention(wanted=not config.tied_weights and config.suffix_positions > 0)

    def forward(self, stream: Tensor, tokens: Tokens) -> Tensor:
        first, final = (
            (count, self._change(end)) for count, end in zip(self.counts, ("prefix", "suffix"), strict=True)
        )
        return rewritten(stream, tokens, first, final, self.token_dim)

    def _change(self, end: str) -> Any:
        return self.both if self.both is not None else getattr(self, end)


class Intervention(nn.Module):
    """One intervention: (..., D) -> (..., D)."""

    def __init__(self, config: ReftConfig, width: int, generator: Any) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.zeros(config.r, width))
        self.W = nn.Parameter(torch.zeros(config.r, width))
        self.b = nn.Parameter(torch.zeros(config.r))
        self.is_orthogonal, self.subtracts = config.orthogonality, config.subtract_projection
        self.activation = None if config.non_linearity is None else activation(config.non_linearity)
        self.dropout = config.dropout
        nn.init.kaiming_uniform_(self.W, a=5**0.5, generator=generator)
        nn.init.uniform_(self.b, -(width**-0.5), width**-0.5, generator=generator)
        if self.is_orthogonal:
            nn.init.orthogonal_(self.R, generator=generator)
        else:
            nn.init.kaiming_uniform_(self.R, a=5**0.5, generator=generator)

    def rows(self) -> Tensor:
        """R, (r, D)."""
        if not self.is_orthogonal:
            return self.R
        exact = self.R if self.R.dtype == torch.float64 else self.R.float()  # half precision has no decomposition
        columns, triangle = torch.linalg.qr(exact.T)
        return in_dtype((columns * torch.sign(triangle.diagonal())).T, self.R.dtype)

    def forward(self, x: Tensor) -> Tensor:
        # In one piece: the last bit of a product with a part of a tensor depends on whether R requires gradients.
        own = in_dtype(x, self.W.dtype).contiguous()
        R = self.rows()
        source = F.linear(own, self.W, self.b)
        if self.activation is not None:
            source = self.activation(source)
        if self.subtracts:
            source = source - F.linear(own, R)
        new = own + source @ R
        if self.training and self.dropout:
            new = F.dropout(new, self.dropout)
        return in_dtype(new, x.dtype)
