"""The port for vectors: the weights and biases of norms, and the biases of projections."""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError
from ..core.site import Sites
from .method import AbstractMethod, Placement
from .places import check_layers, check_roles, layer_number


class ParameterMethod(AbstractMethod):
    """A method that plugs into `WeightPort` at vectors: the weight and the bias of a norm, the bias of a projection.

    It changes those for which it has a parameter of their name, `weight` or `bias`.
    """

    always_merges = True

    @abstractmethod
    def effective(self, leaf: str, value: Tensor) -> Tensor:
        """The new `weight` or `bias` (size,), whichever `leaf` says, from the frozen one."""

    @classmethod
    @abstractmethod
    def formula(cls, config: Any, placement: Placement) -> str:
        """What becomes of a vector `w` or `b`, for people to read."""

    def changes(self, leaf: str) -> bool:
        """Whether a vector is changed."""
        return self._parameters.get(leaf) is not None


def vector_placements(
    asked: tuple[str, ...],
    leaves: tuple[str, ...],
    *,
    norms_only: bool,
    leave_out: tuple[int, ...],
    leave_out_roles: tuple[str, ...],
    sites: Sites,
) -> list[Placement]:
    """A placement for each norm and projection of every layer that has one of the vectors `leaves`.

    Arguments: `asked` are the roles that are meant, all of them where it is empty. Raises `ConfigError` for a role, a
    layer or a site that the model does not have, or where nothing is left.
    """
    every = [
        Placement(site=site, port="parameter", role=role)
        for site in sites
        for role, vectors in site.affine.items()
        if (vectors.is_norm or not norms_only) and any(leaf in vectors.names for leaf in leaves)
    ]
    what = f"{' and '.join(leaves)} of {'norms' if norms_only else 'norms and projections'}"
    return chosen(every, what, asked, leave_out=leave_out, leave_out_roles=leave_out_roles, sites=sites)


def chosen(
    every: list[Placement],
    what: str,
    asked: tuple[str, ...],
    *,
    leave_out: tuple[int, ...],
    leave_out_roles: tuple[str, ...],
    sites: Sites,
) -> list[Placement]:
    """Of all places of a kind, called `what` in messages, those in the roles that are asked for, or all; but for layers
    and sites that are left out."""
    check_layers("leave_out", leave_out, sites)
    check_roles("leave_out_roles", leave_out_roles, sites)
    known = list(dict.fromkeys(plain_role(place.role) for place in every))
    unmet = [role for role in asked if role not in known]
    if unmet or not every:
        wrong, there = (", ".join(f"`{role}`" for role in roles) or "none" for roles in (unmet, known))
        raise ConfigError(
            f"Every role a configuration asks for must exist; got {wrong} for the {what} of {sites.model_class}, "
            f"which has {there}. {'Ask for those it has.' if known else 'Use another method.'}"
        )
    found = [
        place
        for place in every
        if (not asked or plain_role(place.role) in asked)
        and layer_number(place.site, sites) not in leave_out
        and place.site.role not in leave_out_roles
    ]
    if not found:
        raise ConfigError(
            f"A configuration must reach something; got `leave_out={list(leave_out)}` and "
            f"`leave_out_roles={list(leave_out_roles)}` for the {what} of {sites.model_class}. Leave fewer layers out."
        )
    return found


def plain_role(role: str) -> str:
    """A role without the number that tells it from others of its kind."""
    return role.rstrip("0123456789")
