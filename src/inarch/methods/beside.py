"""What methods have in common that stand beside a branch: they read what it reads, and add to what it gives."""

from collections.abc import Callable, Mapping
from typing import Any

from ..core.errors import ConfigError
from ..core.site import Kind, Site, Sites
from ..core.wiring import Carry
from .method import Branch, Placement, SublayerMethod, check_layers, check_roles, layer_number


class BesideMethod(SublayerMethod):
    """A method that adds to the branch output what it makes of the stream, y = x + h + A(x)."""

    @staticmethod
    def wire(
        config: Any,  # noqa: ARG004  there is one way
        x: Any,
        h: Carry[Any],
        norm: Callable[[Any], Any] | None,  # noqa: ARG004  the layer's own comes after the sum
        branch: Branch[Any],
    ) -> Carry[Any]:
        return Carry(h.rest + branch.branch(x), h.count)

    @staticmethod
    def keeps_sum(config: Any) -> bool:  # noqa: ARG004  always
        return True

    def norm_branch(self, w: Any) -> Any:
        """There is no norm of its own after it."""
        return w


def kind_placements(
    config: Any, kinds: Mapping[Kind, str], fits: Callable[[Any, Site], bool], sites: Sites
) -> list[Placement]:
    """A placement for each site that a configuration fits, but for layers that are left out.

    Arguments: `kinds` are the kinds of site that are asked for, each with the field that asks. Raises `ConfigError`
    where none of a kind is there, or nothing is left.
    """
    check_layers("leave_out", config.leave_out, sites)
    check_roles("leave_out_roles", config.leave_out_roles, sites)
    present = {site.kind for site in sites}
    wished = dict.fromkeys(kinds.values())
    unmet = [field for field in wished if not any(kinds.get(kind) == field for kind in present)]
    if unmet:
        raise ConfigError(
            f"Every kind of site a configuration asks for must exist; got {', '.join(f'`{field}`' for field in unmet)} "
            f"for {sites.model_class}, whose sites are {', '.join(sorted(present))}. Ask for those it has."
        )
    found = [
        Placement(site=site, port="sublayer")
        for site in sites
        if fits(config, site) and layer_number(site, sites) not in config.leave_out
    ]
    if not found:
        raise ConfigError(
            f"A configuration must reach at least one site; got `leave_out={list(config.leave_out)}` and "
            f"`leave_out_roles={list(config.leave_out_roles)}` for {sites.model_class}. Leave fewer layers out."
        )
    return found
