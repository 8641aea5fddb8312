"""Visual prompt tuning: learned tokens in front of those of an image, for the layers alone.

Jia et al. 2022 (VPT, arXiv 2203.12119), section 3.2, equations 4 and 5 (shallow), 6 and 7 (deep).

    shallow:  [c1, Z1, E1] = L1([c0, P, E0]),    [ci, Zi, Ei] = Li([ci-1, Zi-1, Ei-1])
    deep:     [ci, _, Ei] = Li([ci-1, Pi-1, Ei-1])

Prompts have no position, and attention does not ask for an order, so they stand before the class token instead of
behind it: nothing else would be computed. Relative positions of the others stay as they are, and prompts have a bias of
zero. Behind each layer the prompts are taken off, so heads, poolers and feature maps see what they know. Initial values
are uniform in ±sqrt(6 / (F + D)), F numbers in a patch, as the authors have them: no start at the base model.

Tensors: B batch, L tokens, P prompts, D width.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import Config, config_class, option
from ..core.errors import ConfigError
from ..core.site import Entry, Site, Sites
from .method import Placement, in_dtype, seed_option
from .places import check_layers, layer_number
from .ports_input import InputMethod, Point


@config_class
class VisualPromptConfig(Config):
    """Prompts at the first layer of a Vision Transformer, or at every layer."""

    prompt_length: int = option(50, "Number of prompts.", at_least=1, at_most=2**16)
    deep: bool = option(False, "New prompts at every layer, in the place of what the layer before made of its own.")
    dropout: float = option(0.1, "Dropout probability on the prompts.", at_least=0, less_than=1)
    init_weights_seed: int | None = seed_option()
    leave_out: tuple[int, ...] = option(
        (), "Numbers of the layers without prompts of their own, counted from 0: those of the layer before go on."
    )

    def problems(self) -> list[str]:
        found = []
        if self.leave_out and not self.deep:
            found.append(
                "`VisualPromptConfig.leave_out` names layers of those that all have prompts; got "
                f"{list(self.leave_out)} with `deep=False`. Set `deep=True`."
            )
        return found


class VisualPrompt(InputMethod):
    """The prompts of one layer."""

    name = "visual_prompt"
    config_class = VisualPromptConfig
    presets: ClassVar[dict[str, Config]] = {
        "vpt_shallow": VisualPromptConfig(),
        "vpt_deep": VisualPromptConfig(deep=True),
    }

    @classmethod
    def formula(cls, config: VisualPromptConfig, placement: Placement) -> str:  # noqa: ARG003  the same for all
        return f"[P; x], {config.prompt_length} learned tokens{' of each layer' if config.deep else ''}"

    @classmethod
    def placements(cls, config: VisualPromptConfig, sites: Sites) -> list[Placement]:
        check_layers("leave_out", config.leave_out, sites)
        firsts = _layers(sites)
        chosen = firsts if config.deep else firsts[:1]
        found = [
            Placement(site=site, port="input", entry=sites.entries.get(site.stack))
            for site in chosen
            if layer_number(site, sites) not in config.leave_out
        ]
        if not found:
            raise ConfigError(
                f"Prompts stand at one layer at least; got `leave_out={list(config.leave_out)}` with every layer of "
                f"images in {sites.model_class}. Leave fewer layers out."
            )
        return found

    @classmethod
    def point(cls, config: VisualPromptConfig, entry: Entry | None) -> Point:  # noqa: ARG003  one for all
        return "layer"

    @classmethod
    def length(cls, config: VisualPromptConfig) -> int:
        return config.prompt_length

    def __init__(self, config: VisualPromptConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        width = placement.site.width
        fan_in = width if placement.entry is None else placement.entry.fan_in
        bound = (6 / (fan_in + width)) ** 0.5
        self.vectors = nn.Parameter(torch.empty(config.prompt_length, width))
        nn.init.uniform_(self.vectors, -bound, bound, generator=generator)
        self.dropout = config.dropout

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, P + L, D)."""
        prompts = self.vectors.expand(tokens.shape[0], -1, -1)
        if self.training and self.dropout:
            prompts = nn.functional.dropout(prompts, self.dropout)
        return torch.cat((in_dtype(prompts, tokens.dtype), tokens), dim=1)


def _layers(sites: Sites) -> list[Site]:
    """The first site of each layer of the first stack of images. Raises `ConfigError` where that has no sequence of
    tokens that could be longer."""
    stack = next((site.stack for site in sites if site.stack.startswith("image")), None)
    inside = [site for site in sites if site.stack == stack]
    attends = any(site.kind == "self_attention" for site in inside)
    reasons = [
        (stack is None, "no stack of layers that sees images"),
        (len({site.width for site in inside}) > 1, "stages of different widths"),
        (any(site.feature_dim != -1 for site in inside), "layers on feature maps"),
        (any(site.batch_dim for site in inside), "samples in the second dimension"),
        (any(not site.same_layout for site in inside), "windows"),
        (any(site.kind == "mixer" for site in inside) or not attends, "tokens that are mixed by fixed weights"),
    ]
    for holds, reason in reasons:
        if holds:
            raise ConfigError(
                f"Visual prompts need one sequence of tokens, of any length, through all layers; got {reason} in "
                f"{sites.model_class}. Use a plain Vision Transformer, or another method."
            )
    layers: dict[int, Site] = {}
    for site in inside:
        layers.setdefault(site.layer, site)
    return [layers[number] for number in sorted(layers)]
