"""What methods on projections share: the fields that choose projections, and those of a low rank.

Tensors: (..., in) and (..., rows), with B batch and L tokens in front; R rank.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.config import Config, FrozenMap, config_class, option
from ..core.site import Sites
from .method import Placement, seed_option
from .places import check_patterns, first_match, projection_placements

_LAST = ("init_weights", "init_weights_seed", "leave_out", "leave_out_roles", "leave_out_projections")


@config_class
class ProjectionsConfig(Config):
    """Which projections of every layer a method adapts."""

    selfattn_lora: bool = option(True, "Adapt projections of the attentions, those of `attn_matrices`.")
    attn_matrices: tuple[Literal["q", "k", "v", "o"], ...] = option(
        ("q", "v"), "Which projections of an attention: query, key, value, output."
    )
    intermediate_lora: bool = option(False, "Adapt the up-projection of the MLPs.")
    gate_lora: bool = option(False, "Adapt the gate projection of the MLPs that have one.")
    output_lora: bool = option(False, "Adapt the down-projection of the MLPs.")
    leave_out: tuple[int, ...] = option((), "Numbers of the layers without an update, counted from 0.")
    leave_out_roles: tuple[str, ...] = option(
        (), "Sites without an update in any layer, by their role, such as `mlp_2`."
    )
    leave_out_projections: tuple[str, ...] = option(
        (), "Projections without an update, by patterns such as `text0.3.self_attention.q` or `*.cross_attention.*`."
    )
    init_weights_seed: int | None = seed_option()

    def problems(self) -> list[str]:
        found, name = [], type(self).__name__
        if self.selfattn_lora and not self.attn_matrices:
            found.append(
                f"`{name}.attn_matrices` must name a projection where `selfattn_lora` is true; got an empty list. "
                "Write attn_matrices=['q','v'] or selfattn_lora=False."
            )
        if not (self.selfattn_lora or self.intermediate_lora or self.gate_lora or self.output_lora):
            found.append(
                "At least one of `selfattn_lora`, `intermediate_lora`, `gate_lora` and `output_lora` must be true; "
                f"got none at `{name}`. Set `selfattn_lora=True`."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, what is left out last, as people read it."""
        values = Config.to_dict(self)
        last = [name for name in _LAST if name in values]
        return {name: value for name, value in values.items() if name not in last} | {
            name: values[name] for name in last
        }

    def roles(self) -> dict[str, str]:
        """The projections asked for by role, each with the field that asks."""
        wishes = dict.fromkeys(self.attn_matrices, "attn_matrices") if self.selfattn_lora else {}
        flags = {"intermediate_lora": "up", "gate_lora": "gate", "output_lora": "down"}
        return wishes | {role: flag for flag, role in flags.items() if getattr(self, flag)}

    def placements(self, sites: Sites) -> list[Placement]:
        """A place for each of the projections. Raises `ConfigError` for what the model does not have."""
        return projection_placements(
            self.roles(), self.leave_out, self.leave_out_roles, self.leave_out_projections, sites
        )


@config_class
class LowRankConfig(ProjectionsConfig):
    """Low-rank updates of some projections of every layer."""

    r: int = option(8, "Rank of the update.", at_least=1, at_most=2**20)
    alpha: float = option(8.0, "The update is multiplied by alpha / r.", more_than=0)
    use_rslora: bool = option(False, "Multiply the update by alpha / sqrt(r) instead (Kalajdzievski 2023).")
    rank_pattern: Mapping[str, int] = option(
        FrozenMap({}),
        "Other ranks than `r`, by patterns of projections such as `image0.3.self_attention.q` or `*.mlp.up`; the first "
        "that matches counts.",
        at_least=1,
        at_most=2**20,
    )
    alpha_pattern: Mapping[str, float] = option(
        FrozenMap({}), "Other values than `alpha`, by patterns of projections.", more_than=0
    )
    dropout: float = option(0.0, "Dropout probability on the input of the update.", at_least=0, less_than=1)

    def rank(self, placement: Placement) -> int:
        """The rank of the update of one projection."""
        return first_match(self.rank_pattern, placement.projection_key) or self.r

    def scale(self, placement: Placement) -> float:
        """What the update of one projection is multiplied by."""
        rank = self.rank(placement)
        alpha = first_match(self.alpha_pattern, placement.projection_key) or self.alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def placements(self, sites: Sites) -> list[Placement]:
        found = ProjectionsConfig.placements(self, sites)
        check_patterns("rank_pattern", self.rank_pattern, found, sites)
        check_patterns("alpha_pattern", self.alpha_pattern, found, sites)
        return found


def dropout_on_weight(config: Any) -> str:
    """What of a dropout keeps a method from acting on a weight alone."""
    return f"`dropout={config.dropout:g}`, which acts on the input of the projection," if config.dropout else ""


def add_scaled(base: Tensor, update: Tensor, factor: float) -> Tensor:
    """base + factor · update."""
    if torch.compiler.is_compiling():
        # Inductor of torch 2.13 forgets `alpha` where it makes one operator of a matrix product and a sum.
        return base + update * factor
    return torch.add(base, update, alpha=factor)
