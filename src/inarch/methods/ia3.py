"""(IA)³: learned vectors that scale keys, values and the inner activations of the MLPs.

Liu et al. 2022 (arXiv 2205.05638), section 3.3:

    K <- l_k · K        V <- l_v · V        MLP: W_down (l_ff · f(W_up x))

A projection's output y = W x + b becomes y · l; the vector of the MLP scales the input of its down-projection. The
library `adapters` scales the output of the up-projection instead, before the activation f (`after_activation=False`
here); in an MLP with a gate, where f acts on the gate's output alone, both are the same function.

Tensors: (..., in) and (..., out), with B batch and L tokens in front.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.config import Config, config_class, option
from ..core.errors import ConfigError
from ..core.site import Sites
from .method import Frozen, LinearMethod, Placement, in_dtype, projection_gate
from .places import projection_placements


@config_class
class IA3Config(Config):
    """Learned scales of some projections of every layer."""

    selfattn_lora: bool = option(True, "Scale projections of the attentions, those of `attn_matrices`.")
    attn_matrices: tuple[Literal["q", "k", "v", "o"], ...] = option(
        ("k", "v"), "Which projections of an attention: query, key, value, output."
    )
    intermediate_lora: bool = option(True, "Scale the inner activations of the MLPs.")
    after_activation: bool = option(
        True,
        "Where `intermediate_lora` scales: on the way into the down-projection, as the paper does, or (false) behind "
        "the up-projection, as the library `adapters` does.",
    )
    output_lora: bool = option(False, "Scale the output of the MLPs.")
    input_matrices: tuple[Literal["q", "k", "v", "o", "up"], ...] = option(
        (), "Which of the adapted projections are scaled at their input in the place of their output."
    )
    alpha: float = option(1.0, "A constant factor on every scale.", more_than=0)
    use_gating: bool = option(
        False, "A learned gate, one number per sequence, the mean over all its tokens, in the place of alpha."
    )
    leave_out: tuple[int, ...] = option((), "Numbers of the layers without scales, counted from 0.")
    leave_out_roles: tuple[str, ...] = option((), "Sites without scales in any layer, by their role, such as `mlp_2`.")
    leave_out_projections: tuple[str, ...] = option(
        (), "Projections without a scale, by patterns such as `text0.3.self_attention.k` or `*.cross_attention.*`."
    )

    def problems(self) -> list[str]:
        found = []
        if self.selfattn_lora and not self.attn_matrices:
            found.append(
                "`IA3Config.attn_matrices` must name a projection where `selfattn_lora` is true; got an empty list. "
                "Write attn_matrices=['k','v'] or selfattn_lora=False."
            )
        if not (self.selfattn_lora or self.intermediate_lora or self.output_lora):
            found.append(
                "At least one of `selfattn_lora`, `intermediate_lora` and `output_lora` must be true; got none at "
                "`IA3Config`. Set `selfattn_lora=True`."
            )
        idle = [role for role in self.input_matrices if role not in self.roles()]
        if idle:
            found.append(
                "`IA3Config.input_matrices` must name projections that are adapted; got "
                f"{', '.join(f'`{role}`' for role in idle)}. Name them in `attn_matrices` too, or leave them out."
            )
        return found

    def roles(self) -> dict[str, str]:
        """The projections asked for by role, each with the field that asks."""
        wishes: dict[str, str] = dict.fromkeys(self.attn_matrices, "attn_matrices") if self.selfattn_lora else {}
        if self.intermediate_lora:
            wishes["down" if self.after_activation else "up"] = "intermediate_lora"
        return wishes | ({"down": "output_lora"} if self.output_lora else {})


class IA3(LinearMethod):
    """The scales at one projection, or at the rows of a fused one that play one role."""

    name = "ia3"
    config_class = IA3Config
    presets: ClassVar[dict[str, Config]] = {"ia3": IA3Config()}

    @classmethod
    def placements(cls, config: IA3Config, sites: Sites) -> list[Placement]:
        found = projection_placements(
            config.roles(), config.leave_out, config.leave_out_roles, config.leave_out_projections, sites
        )
        for placement in found:
            projection = placement.projection
            if placement.role in config.input_matrices and projection.rows is not None:
                raise ConfigError(
                    "The input of a projection is scaled where it has one role; got `input_matrices` with "
                    f"`{placement.role}` for {sites.model_class}, where `{placement.site.absolute(projection.path)}` "
                    "computes several roles from one input. Leave it out of `input_matrices`."
                )
        return found

    @classmethod
    def starts_at_base(cls, config: IA3Config) -> bool:
        return config.alpha == 1 and not config.use_gating

    @classmethod
    def changes(cls, config: IA3Config, placement: Placement) -> frozenset[str]:
        at_input = placement.role in config.input_matrices or (
            placement.role == "down" and config.intermediate_lora and config.after_activation
        )
        at_output = config.output_lora if placement.role == "down" else not at_input
        return frozenset(side for side, is_changed in (("input", at_input), ("output", at_output)) if is_changed)

    def __init__(self, config: IA3Config, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        projection = placement.projection
        changes = self.changes(config, placement)
        at_input = "input" in changes
        self.input_scale = nn.Parameter(torch.ones(projection.in_features)) if at_input else None
        self.scale = nn.Parameter(torch.ones(projection.num_rows)) if "output" in changes else None
        self.gate = nn.Linear(projection.in_features, 1) if config.use_gating else None
        self.batch_dim = placement.site.batch_dim
        self.alpha = config.alpha
        self.changes_input = at_input
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02, generator=generator)
            nn.init.zeros_(self.gate.bias)

    def prepare(self, inputs: Tensor) -> Tensor:
        return inputs if self.input_scale is None else self._scaled(inputs, self.input_scale, inputs)

    def forward(self, inputs: Tensor, output: Tensor, base: Frozen | None = None) -> Tensor:
        """(..., in), (..., rows) -> (..., rows)."""
        return output if self.scale is None else self._scaled(output, self.scale, inputs)

    @classmethod
    def formula(cls, config: IA3Config, placement: Placement) -> str:
        scale = "g(u) · l" if config.use_gating else "l" if config.alpha == 1 else f"{config.alpha:.4g} · l"
        changed = cls.changes(config, placement)
        inside = f"W ({scale} · u)" if "input" in changed else "W u"
        return f"y = {scale} · {inside}" if "output" in changed else f"y = {inside}"

    @classmethod
    def obstacle_to_merge(cls, config: IA3Config) -> str:
        return "`use_gating=True`, which reads the input," if config.use_gating else ""

    def fold(self, weight: Tensor, bias: Tensor | None, base: Frozen | None = None) -> tuple[Tensor, Tensor | None]:
        if self.input_scale is not None:
            weight = weight * (self.input_scale * self.alpha)
        if self.scale is None:
            return weight, bias
        scale = self.scale * self.alpha
        return weight * scale[:, None], None if bias is None else bias * scale

    @classmethod
    def combinations(cls, config: IA3Config) -> tuple[str, ...]:
        return () if config.use_gating else ("ties", "dare")

    def update(self) -> Tensor | None:
        """Of the scales, what they are beside one."""
        if self.gate is not None:
            return None
        return torch.cat([scale - 1 for scale in (self.input_scale, self.scale) if scale is not None])

    def put_update(self, update: Tensor) -> None:
        for scale in (self.input_scale, self.scale):
            if scale is not None:
                scale.copy_(1 + update[: len(scale)])
                update = update[len(scale) :]

    def _scaled(self, values: Tensor, scale: Tensor, inputs: Tensor) -> Tensor:
        if self.gate is not None:
            scale = scale * projection_gate(self.gate, inputs, self.batch_dim)
        elif self.alpha != 1.0:
            scale = scale * self.alpha
        return values * in_dtype(scale, values.dtype)
