"""What methods have in common that stand beside a branch: they read what it reads, and add to what it gives."""

from collections.abc import Callable
from typing import Any

from ..core.site import Site
from ..core.wiring import Carry
from .method import Branch, SublayerMethod
from .places import asked_kinds


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
    def fits(config: Any, site: Site) -> bool:
        return site.kind in asked_kinds(config) and site.role not in config.leave_out_roles

    @staticmethod
    def keeps_sum(config: Any) -> bool:  # noqa: ARG004  always
        return True

    def norm_branch(self, w: Any) -> Any:
        """There is no norm of its own after it."""
        return w
