"""Prefix tuning: learned keys and values before those of every attention.

Li and Liang 2021 (arXiv 2101.00190), sections 4.2 and 4.3; gates as in UniPELT (Mao et al. 2022), section 3:

    y = softmax(q [g P_K; K]ᵀ / √d) [g P_V; V]        [P_K; P_V] = W₂ act(W₁ E + b₁) + b₂        g = 1 or mean σ(W_g x)

E is a table of P vectors; it and W₁ are one for all attentions of a kind in a stack, W₂ is each attention's own. With
`flat`, P_K and P_V are parameters themselves. A prefix has no position: no rotary embedding turns its keys, no relative
bias is added to its scores, no window hides it. It starts at random keys and values, as in the paper, not at the base.

Tensors: B batch, L tokens, P length of the prefix, D width; K and V features of all heads of a key and of a value.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import Config, config_class, option
from ..core.errors import ConfigError, SiteError
from ..core.site import Site, Sites
from .method import Placement, PrefixMethod, activation, in_dtype, seed_option, sequence_gate
from .places import check_layers, check_roles, layer_number


@config_class
class PrefixConfig(Config):
    """Learned keys and values before those of the attentions of every layer."""

    encoder_prefix: bool = option(True, "Prefixes in the self-attentions of an encoder that a decoder looks at.")
    cross_prefix: bool = option(True, "Prefixes in the cross-attentions.")
    flat: bool = option(False, "Learn keys and values themselves, not an MLP that makes them.")
    prefix_length: int = option(30, "Keys and values of a prefix.", at_least=1, at_most=2**20)
    bottleneck_size: int = option(512, "Width of the MLP that makes keys and values.", at_least=1, at_most=2**20)
    non_linearity: str = option("tanh", "Activation of the MLP that makes keys and values.")
    dropout: float = option(0.0, "Dropout probability on keys and values.", at_least=0, less_than=1)
    use_gating: bool = option(
        False, "A learned gate, one number per sequence, the mean over all its tokens, times keys and values."
    )
    shared_gating: bool = option(True, "One gate for keys and values, not one for each.")
    init_weights_seed: int | None = seed_option()
    leave_out: tuple[int, ...] = option((), "Numbers of the layers without prefixes, counted from 0.")
    leave_out_roles: tuple[str, ...] = option((), "Sites without prefixes in any layer, such as `cross_attention`.")

    def problems(self) -> list[str]:
        activation(self.non_linearity)
        return []


class Prefix(PrefixMethod):
    """The prefix of one attention."""

    name = "prefix"
    config_class = PrefixConfig
    presets: ClassVar[dict[str, Config]] = {
        "prefix_tuning": PrefixConfig(),
        "prefix_tuning_flat": PrefixConfig(flat=True),
    }

    @classmethod
    def formula(cls, config: PrefixConfig, placement: Placement) -> str:  # noqa: ARG003  the same for all
        gate = "g " if config.use_gating else ""
        return f"softmax(q [{gate}P_K; K]ᵀ / √d) [{gate}P_V; V], {config.prefix_length} learned"

    @classmethod
    def placements(cls, config: PrefixConfig, sites: Sites) -> list[Placement]:
        check_layers("leave_out", config.leave_out, sites)
        check_roles("leave_out_roles", config.leave_out_roles, sites)
        found: list[Placement] = []
        for site in sites:
            if _is_wanted(config, site, sites):
                _check_projections(config, site, sites)
                is_first = all((one.site.stack, one.site.role) != (site.stack, site.role) for one in found)
                found.append(Placement(site=site, port="prefix", part=0 if is_first else 1))
        if not found:
            raise ConfigError(
                f"Prefixes must reach at least one attention; got none from {config} for {sites.model_class}. Leave "
                "fewer layers out, or use another method on a model without attention."
            )
        return found

    def __init__(self, config: PrefixConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        site = placement.site
        self._features = [site.projections[role][0].num_rows for role in ("k", "v")]
        self._group = (site.stack, site.role)
        self.dropout, self.reads_input = nn.Dropout(config.dropout), config.use_gating
        if config.flat:
            self.keys, self.values = (
                nn.Parameter(torch.empty(config.prefix_length, features).normal_(generator=generator))
                for features in self._features
            )
        else:
            self.source = _Source(site.width, config, generator) if placement.part == 0 else None
            self.out = _linear(config.bottleneck_size, sum(self._features), generator)
        if config.use_gating:
            self.gate = nn.Linear(site.projections["q"][0].in_features, 1 if config.shared_gating else 2)
            nn.init.normal_(self.gate.weight, std=0.02, generator=generator)
            nn.init.zeros_(self.gate.bias)
        self._config, self._placement, self._flat = config, placement, config.flat
        self._shared: tuple[_Source, ...] = ()

    def share(self, known: dict[Any, Any]) -> None:
        """The first attention of a kind in a stack holds E and W₁ for those after it."""
        if not self._flat:
            # In a tuple, so that it is no child of this module: the first one saves, trains and counts it.
            source = known.setdefault(self._group, self.source)
            assert source is not None, "the first attention of a kind comes first"
            self._shared = (source,)

    def flattened(self) -> tuple[Tensor, Tensor]:
        """Keys and values without dropout and gates, (P, K) and (P, V)."""
        if self._flat:
            return self.keys, self.values
        weight, (source,) = self.out.weight, self._shared
        if self.source is None and hasattr(source.embedding, "full_tensor"):
            raise SiteError(
                "The MLP that makes prefixes is whole in every layer; got one that is spread over processes with the "
                f"layer that keeps it, for `{self._placement.site.key}`. Train `prefix_tuning_flat`, or without "
                "`fully_shard`."
            )
        made = in_dtype(source(), weight.dtype)
        made = made if weight.is_meta else made.to(weight.device)  # accelerate moves it where it brings weights in
        keys, values = self.out(made).split(self._features, -1)
        return keys, values

    @torch.no_grad()
    def ejected(self) -> "Prefix":
        """The same prefix without the MLP that makes it."""
        keys, values = self.flattened()
        made = Prefix(self._config.replace(flat=True), self._placement, 0).to(keys.device, keys.dtype)
        made.load_state_dict({"keys": keys, "values": values}, strict=False)
        if self.reads_input:
            made.gate.load_state_dict(self.gate.state_dict())
        is_trained = any(parameter.requires_grad for parameter in self.parameters())
        return made.requires_grad_(is_trained).train(self.training)

    def forward(self, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        keys, values = (self.dropout(part).unsqueeze(0) for part in self.flattened())
        if self.reads_input:
            assert inputs is not None
            gates = sequence_gate(self.gate, in_dtype(inputs, self.gate.weight.dtype), 0)  # (B, 1, 1 or 2)
            return keys * gates[..., :1], values * gates[..., -1:]
        return keys, values


class _Source(nn.Module):
    """act(W₁ E + b₁), which all attentions of a kind in a stack share."""

    def __init__(self, width: int, config: PrefixConfig, generator: Any) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.prefix_length, width).normal_(generator=generator))
        self.hidden = _linear(width, config.bottleneck_size, generator)
        self._activation = activation(config.non_linearity)

    def forward(self) -> Tensor:
        result: Tensor = self._activation(self.hidden(self.embedding))
        return result


def _linear(width: int, features: int, generator: Any) -> nn.Linear:
    """A linear map with torch's own initial weights, drawn from a generator."""
    linear = nn.Linear(width, features)
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
    return linear


def _is_wanted(config: PrefixConfig, site: Site, sites: Sites) -> bool:
    if site.kind not in ("self_attention", "cross_attention") or site.role in config.leave_out_roles:
        return False
    if layer_number(site, sites) in config.leave_out:
        return False
    if site.kind == "cross_attention":
        return config.cross_prefix
    looking = {other.stack for other in sites if other.kind == "cross_attention"}
    return config.encoder_prefix or not looking or site.stack in looking


def _check_projections(config: PrefixConfig, site: Site, sites: Sites) -> None:
    """Raise `ConfigError` for an attention whose keys and values have no known number of features, or whose queries
    have no known input."""
    roles = ("k", "v", "q") if config.use_gating else ("k", "v")
    missing = [role for role in roles if len(site.projections.get(role, ())) != 1]
    if missing:
        raise ConfigError(
            "A prefix goes to an attention that makes queries, keys and values in one projection each; got "
            f"{len(site.projections.get(missing[0], ()))} of `{missing[0]}` at `{site.key}` ({site.layer_class}) of "
            f"{sites.model_class}. Leave the site out with `leave_out_roles`, or use another method."
        )
