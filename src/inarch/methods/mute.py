"""Takes residual branches out of a model: y = x where the layer computes x + h.

What an ablation of a branch wants, and what adapters need that were trained beside a removed branch: the library
`adapters` deletes the language adapters of X-MOD. There is nothing to train.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from ..core.config import Config, config_class, option
from ..core.site import Site, Sites
from ..core.wiring import Carry
from .method import Branch, Placement, SublayerMethod
from .places import check_roles


@config_class
class MuteConfig(Config):
    """Residual branches to take out of every layer."""

    roles: tuple[str, ...] = option((), "The branches by their role, such as `mlp_2`.")

    def problems(self) -> list[str]:
        if self.roles:
            return []
        return ["`MuteConfig.roles` must name a branch; got an empty list. Write roles=['mlp_2']."]


class Mute(SublayerMethod):
    """The place of one branch that is taken out."""

    name = "mute"
    config_class = MuteConfig
    presets: ClassVar[dict[str, Config]] = {"mute": MuteConfig(roles=("mlp_2",))}

    @classmethod
    def placements(cls, config: MuteConfig, sites: Sites) -> list[Placement]:
        check_roles("roles", config.roles, sites)
        return [Placement(site=site, port="sublayer") for site in sites if cls.fits(config, site)]

    @staticmethod
    def fits(config: MuteConfig, site: Site) -> bool:
        return site.role in config.roles

    @staticmethod
    def wire(
        config: MuteConfig,  # noqa: ARG004
        x: Any,  # noqa: ARG004
        h: Carry[Any],
        norm: Callable[[Any], Any] | None,  # noqa: ARG004
        branch: Branch[Any],  # noqa: ARG004
    ) -> Carry[Any]:
        return Carry(h.rest * 0)

    @staticmethod
    def keeps_sum(config: MuteConfig) -> bool:  # noqa: ARG004
        return True

    def __init__(self, config: MuteConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
