"""Bottleneck adapters: down-projection, activation, up-projection, beside or after a residual branch.

Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2020 (arXiv 2005.00247), He et al. 2022 (parallel and scaled
parallel, arXiv 2110.04366), Steitz and Roth 2024 (Adapter+, arXiv 2406.06820), Mahabadi et al. 2021 (Compacter, arXiv
2106.04647: `phm_layer`, whose weights are sums of Kronecker products, see `phm.py`).

    A(z) = s · drop(W_up · act(W_down · z + b_down) + b_up)

`adapter_plus` is that of its authors: one adapter behind each block, y = (x + h) + A(x + h), with a scale per channel
from one, both weights from a normal distribution of 0.01 cut at 0.02, and an adapter dropped for a tenth of the
samples. A factor of 96 gives their 8 units on ViT-B; the tenth of its own blocks that they drop besides is a setting of
the base.

Tensors: B batch, L tokens, D width of the site, R bottleneck.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.config import Config, FrozenMap, config_class, option
from ..core.errors import ConfigError
from ..core.site import Kind, Site, Sites
from ..core.wiring import Carry, Circuit
from .method import Branch, Placement, SublayerMethod, activation, in_dtype, linear, seed_option, sequence_gate
from .phm import PHMLinear
from .places import asked_kinds, check_layers, kind_placements, kind_problems, layer_number

_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")
_WIDEST = 2**20


@config_class
class BottleneckConfig(Config):
    """A bottleneck adapter at some residual sites of every layer."""

    mh_adapter: bool = option(False, "Adapt the self-attention (or other token mixer) of every layer.")
    output_adapter: bool = option(True, "Adapt the MLP of every layer.")
    cross_adapter: bool = option(False, "Adapt the cross-attention of every layer that has one.")
    reduction_factor: float | Mapping[str, float] = option(
        16.0,
        "Width of the site divided by the width of the bottleneck; a mapping gives it by layer number and `default`.",
        more_than=0,
    )
    non_linearity: str = option("relu", "Activation between the two projections, by its name in transformers.")
    original_ln_before: bool = option(False, "Add the stream, and apply the layer's own norm, before the adapter.")
    original_ln_after: bool = option(True, "Let the layer add the stream, and apply its own norm, after the adapter.")
    residual_before_ln: bool | Literal["post_add"] = option(
        True,
        "The adapter's own residual where `original_ln_before` holds: true takes the branch output, false the "
        "normalised sum, `post_add` the sum itself.",
    )
    adapter_residual_before_ln: bool = option(False, "Add the adapter's own residual before `ln_after`'s norm.")
    ln_before: bool = option(False, "A new norm on the input of the adapter.")
    ln_after: bool = option(False, "A new norm on the output of the adapter.")
    is_parallel: bool = option(False, "Read the stream instead of the branch output: an adapter beside the branch.")
    scaling: float | Literal["learned", "channel"] = option(
        1.0, "Factor on the adapter's output: a number, one `learned` number, or one per `channel`, from 1."
    )
    use_gating: bool = option(
        False, "Multiply the adapter's output by a learned gate, one number per sequence, the mean over all its tokens."
    )
    dropout: float = option(0.0, "Dropout probability on the adapter's output.", at_least=0, less_than=1)
    stochastic_depth: float = option(
        0.0, "Probability of dropping the adapter for a whole sample in training.", at_least=0, less_than=1
    )
    init_weights: Literal["bert", "mam_adapter", "houlsby"] = option(
        "bert", "Initial weights: normal 0.02; Kaiming down and zero up; or truncated normal 0.01."
    )
    init_weights_seed: int | None = seed_option()
    phm_layer: bool = option(False, "Make both projections of sums of Kronecker products, as Compacter does.")
    phm_dim: int = option(4, "Number of the products; divides the width of the site and of the bottleneck.", at_least=1)
    phm_rank: int = option(1, "Rank of the second factors, where `factorized_phm_W` holds.", at_least=1)
    factorized_phm_W: bool = option(  # noqa: N815  its name in checkpoints
        True, "Make the second factors of two matrices of rank `phm_rank`."
    )
    shared_W_phm: bool = option(  # noqa: N815  its name in checkpoints
        False, "Share the second factors between all down-, and all up-projections."
    )
    shared_phm_rule: bool = option(True, "Share the first factors, the rule, between all projections of a stack.")
    factorized_phm_rule: bool = option(False, "Make the rule of two matrices of rank one.")
    learn_phm: bool = option(True, "Train the rule.")
    phm_c_init: Literal["normal", "uniform"] = option(
        "normal", "Initial rule: normal with `phm_init_range`, or uniform between -1 and 1."
    )
    phm_init_range: float = option(1e-4, "Standard deviation of the initial rule.", more_than=0)
    hypercomplex_nonlinearity: Literal["glorot-uniform", "glorot-normal", "normal"] = option(
        "glorot-uniform", "Initial second factors: Glorot's uniform or normal distribution, or normal 0.01."
    )
    phm_bias: bool = option(True, "Give both projections a bias.")
    leave_out: tuple[int, ...] = option((), "Numbers of the layers without an adapter, counted from 0.")
    leave_out_roles: tuple[str, ...] = option(
        (), "Sites without an adapter in any layer, by their role, such as `mlp_2`."
    )
    circuits: Mapping[str, Circuit] = option(
        FrozenMap({}),
        "What the adapter takes for stream, branch and norm, by `mh_adapter`, `output_adapter` or `cross_adapter`, "
        "where these are not the layer's own: set for adapters of other libraries.",
    )

    def problems(self) -> list[str]:
        found = kind_problems(self)
        if isinstance(self.reduction_factor, Mapping):
            wrong = [key for key in self.reduction_factor if key != "default" and not _LAYER.fullmatch(key)]
            if wrong:
                found.append(
                    f"The keys of `BottleneckConfig.reduction_factor` are layer numbers or `default`; got "
                    f"{', '.join(map(repr, wrong))}. Write {{'0': 8, 'default': 16}}."
                )
        if self.phm_layer and self.init_weights == "houlsby":
            found.append(
                "Sums of products have initial weights of their own, or a zero up-projection; got "
                "`init_weights='houlsby'` with `phm_layer=True` at `BottleneckConfig`. Set `bert` or `mam_adapter`."
            )
        unknown = [key for key in self.circuits if key not in ("mh_adapter", "output_adapter", "cross_adapter")]
        if unknown:
            found.append(
                "The keys of `BottleneckConfig.circuits` are `mh_adapter`, `output_adapter` and `cross_adapter`; got "
                f"{', '.join(map(repr, unknown))}. Leave the field out."
            )
        return found

    def phm_hint(self, width: int) -> str:
        """What to set so that `phm_dim` divides the width of a site and of its bottleneck."""
        if width % self.phm_dim:
            return f"Choose a `phm_dim` that divides {width}."
        return f"Set `reduction_factor={width // self.phm_dim}`, or choose another `phm_dim`."

    def bottleneck_width(self, width: int, layer: int) -> int:
        """R for a site of D `width` in the layer of that number. Raises `ConfigError` where a mapping has no entry."""
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            chosen = factor.get(str(layer), factor.get("default"))
            if chosen is None:
                raise ConfigError(
                    f"`BottleneckConfig.reduction_factor` needs an entry for every layer; got none for layer {layer}. "
                    "Add it, or a `default`."
                )
            factor = chosen
        if width / factor > _WIDEST:
            raise ConfigError(
                f"A bottleneck has at most {_WIDEST:,} dimensions; got {width / factor:.3g} from a width of {width} "
                f"and a factor of {factor:g} at `BottleneckConfig.reduction_factor`. Give a larger factor."
            )
        return max(1, int(width // factor))


class Bottleneck(SublayerMethod):
    """The adapter of one site."""

    name = "bottleneck"
    config_class = BottleneckConfig
    presets: ClassVar[dict[str, Config]] = {
        "bottleneck": BottleneckConfig(),
        "seq_bn": BottleneckConfig(original_ln_before=True),
        "double_seq_bn": BottleneckConfig(mh_adapter=True, non_linearity="swish"),
        "par_bn": BottleneckConfig(reduction_factor=2.0, init_weights="mam_adapter", is_parallel=True, scaling=4.0),
        "scaled_par_bn": BottleneckConfig(
            reduction_factor=2.0, init_weights="mam_adapter", is_parallel=True, scaling="learned"
        ),
        "compacter": BottleneckConfig(mh_adapter=True, reduction_factor=32.0, non_linearity="gelu", phm_layer=True),
        "compacter++": BottleneckConfig(
            original_ln_before=True, reduction_factor=32.0, non_linearity="gelu", phm_layer=True
        ),
        "adapter_plus": BottleneckConfig(
            original_ln_before=True,
            original_ln_after=False,
            residual_before_ln=False,
            non_linearity="gelu",
            reduction_factor=96.0,
            stochastic_depth=0.1,
            init_weights="houlsby",
            scaling="channel",
        ),
    }
    aliases: ClassVar[dict[str, str]] = {
        "pfeiffer": "seq_bn",
        "houlsby": "double_seq_bn",
        "parallel": "par_bn",
        "scaled_parallel": "scaled_par_bn",
    }

    @classmethod
    def placements(cls, config: BottleneckConfig, sites: Sites) -> list[Placement]:
        if isinstance(config.reduction_factor, Mapping):
            numbers = tuple(int(key) for key in config.reduction_factor if key != "default")
            check_layers("reduction_factor", numbers, sites)
        found = kind_placements(config, asked_kinds(config), sites)
        for placement in found:
            site = placement.site
            bottleneck = config.bottleneck_width(site.width, layer_number(site, sites))
            if config.phm_layer and (site.width % config.phm_dim or bottleneck % config.phm_dim):
                raise ConfigError(
                    "`BottleneckConfig.phm_dim` divides the width of the site and of the bottleneck; got "
                    f"{config.phm_dim} for {site.width} and {bottleneck} at `{site.key}`. {config.phm_hint(site.width)}"
                )
        return found

    @classmethod
    def starts_at_base(cls, config: BottleneckConfig) -> bool:
        is_normed = config.ln_after and config.adapter_residual_before_ln
        return config.init_weights == "mam_adapter" and not is_normed

    @staticmethod
    def fits(config: BottleneckConfig, site: Site) -> bool:
        return site.kind in asked_kinds(config) and site.role not in config.leave_out_roles

    @staticmethod
    def wire(
        config: BottleneckConfig, x: Any, h: Carry[Any], norm: Callable[[Any], Any] | None, branch: Branch[Any]
    ) -> Carry[Any]:
        if config.is_parallel:
            w = branch.branch(x)
            return Carry(h.rest + (branch.norm_branch(w) if config.ln_after else w), h.count)
        residual, z = h, h.value(x) if not config.original_ln_before else None
        if config.original_ln_before:
            summed = Carry(h.rest, h.count + 1)
            z = summed.value(x) if norm is None else norm(summed.value(x))
            if config.residual_before_ln == "post_add":
                residual = summed
            elif not config.residual_before_ln:
                residual = summed if norm is None else Carry(z)
        w = branch.branch(z)
        if config.ln_after and config.adapter_residual_before_ln:
            return Carry(branch.norm_branch(residual.value(x) + w))
        if config.ln_after:
            w = branch.norm_branch(w)
        return Carry(residual.rest + w, residual.count)

    @staticmethod
    def keeps_sum(config: BottleneckConfig) -> bool:
        return config.original_ln_after

    @staticmethod
    def circuit(config: BottleneckConfig, kind: Kind) -> Circuit:
        return config.circuits.get(asked_kinds(config).get(kind, ""), "own")

    def __init__(self, config: BottleneckConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        width = placement.site.width
        bottleneck = config.bottleneck_width(width, layer)
        self.norm_before = nn.LayerNorm(width) if config.ln_before else None
        kind = partial(PHMLinear, config, generator=generator) if config.phm_layer else nn.Linear
        self.down = kind(width, bottleneck)
        self.activation = activation(config.non_linearity)
        self.up = kind(bottleneck, width)
        self.norm_after = nn.LayerNorm(width) if config.ln_after else None
        self.gate = nn.Linear(width, 1) if config.use_gating else None
        self.scaling = config.scaling if not isinstance(config.scaling, str) else 1.0
        shape = {"learned": (1,), "channel": (width,)}.get(str(config.scaling))
        self.scale = nn.Parameter(torch.ones(shape)) if shape else None
        self.dropout = config.dropout
        self.batch_dim = placement.site.batch_dim
        self.stack = placement.site.stack
        # Of the library `adapters` only sequential adapters drop whole samples; here whoever is asked to.
        self.stochastic_depth = config.stochastic_depth
        _initialise(self, config.init_weights, generator)

    def share(self, known: dict[Any, Any]) -> None:
        for side, projection in (("down", self.down), ("up", self.up)):
            if isinstance(projection, PHMLinear):
                projection.share(known, (self.stack, side))

    def branch(self, z: Tensor) -> Tensor:
        """A(z), (B, L, D) -> (B, L, D)."""
        # Not `self.down`: to look a module up as an attribute costs as much as to add two tensors of a small model.
        modules: Mapping[str, Any] = self._modules
        u = z if self.norm_before is None else self.norm_before(in_dtype(z, self.norm_before.weight.dtype))
        w = linear(modules["up"], self.activation(linear(modules["down"], u)))
        if self.training and self.stochastic_depth:
            w = _drop_samples(w, self.stochastic_depth, self.batch_dim)
        if self.scale is not None:
            w = self(w)
        elif self.scaling != 1.0:
            w = w * self.scaling
        if self.training and self.dropout:
            w = nn.functional.dropout(w, self.dropout)
        if self.gate is not None:
            w = w * sequence_gate(self.gate, in_dtype(z, self.gate.weight.dtype), self.batch_dim)
        return in_dtype(w, z.dtype)

    def forward(self, w: Tensor) -> Tensor:
        """The scaled output of the adapter: a parameter of its own is read in a call of the module, for that is when
        accelerate brings in what it keeps elsewhere."""
        return w if self.scale is None else w * self.scale

    def norm_branch(self, w: Tensor) -> Tensor:
        """The adapter's own norm, `ln_after`."""
        assert self.norm_after is not None
        normed: Tensor = self.norm_after(in_dtype(w, self.norm_after.weight.dtype))
        return in_dtype(normed, w.dtype)


def _drop_samples(w: Tensor, probability: float, batch_dim: int) -> Tensor:
    """Stochastic depth by sample (Huang et al. 2016, arXiv 1603.09382), survivors scaled up."""
    keep = 1.0 - probability
    sizes = [size if dim == batch_dim else 1 for dim, size in enumerate(w.shape[:-1])] + [1]
    alive = torch.rand(sizes, device=w.device) < keep
    return w * alive.to(w.dtype) / keep


def _initialise(module: Bottleneck, scheme: str, generator: torch.Generator | None) -> None:
    if isinstance(module.up, PHMLinear) and scheme == "mam_adapter":
        module.up.zero()
    maps = [one for one in (module.down, module.up, module.gate) if isinstance(one, nn.Linear)]
    for one in maps:
        nn.init.zeros_(one.bias)
        if scheme == "houlsby":
            nn.init.trunc_normal_(one.weight, std=0.01, a=-0.02, b=0.02, generator=generator)
        else:
            nn.init.normal_(one.weight, std=0.02, generator=generator)
    if scheme == "mam_adapter" and isinstance(module.up, nn.Linear) and isinstance(module.down, nn.Linear):
        # LoRA's scheme: a random down-projection and a zero up-projection, so that training starts at the base model.
        nn.init.kaiming_uniform_(module.down.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(module.up.weight)
