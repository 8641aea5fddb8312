"""Where a method goes: the sites and projections that a configuration asks for, and the numbers of layers."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from ..core.config import Config
from ..core.errors import ConfigError
from ..core.site import Kind, Site, Sites
from .method import Placement

V = TypeVar("V")

_ATTENTION = ("self_attention", "cross_attention", "mixer")
_ATTENTION_ROLES = ("q", "k", "v", "o")

KINDS: dict[str, tuple[Kind, ...]] = {
    "mh_adapter": ("self_attention", "mixer"),
    "output_adapter": ("mlp",),
    "cross_adapter": ("cross_attention",),
}
"""The kinds of site that a field of a configuration asks for."""


def asked_kinds(config: Any) -> dict[Kind, str]:
    """The kinds of site that a configuration asks for, each with the field that asks."""
    return {kind: field for field, kinds in KINDS.items() if getattr(config, field, False) for kind in kinds}


def kind_problems(config: Any) -> list[str]:
    """What is wrong with a configuration that asks for no kind of site."""
    if asked_kinds(config):
        return []
    *fields, last = [f"`{field}`" for field in KINDS if hasattr(config, field)]
    rule = f"At least one of {', '.join(fields)} and {last} must be true; got none at `{type(config).__name__}`"
    return [f"{rule}. Set `output_adapter=True`."]


def kind_placements(
    config: Any, kinds: Mapping[Kind, str], sites: Sites, port: Literal["sublayer", "fusion"] = "sublayer"
) -> list[Placement]:
    """A placement for each site of some kinds, but for layers and roles that a configuration leaves out.

    Arguments: `kinds` are the kinds of site that are asked for, each with the field that asks. Raises `ConfigError`
    where none of a kind is there, or nothing is left.
    """
    check_layers("leave_out", config.leave_out, sites)
    check_roles("leave_out_roles", config.leave_out_roles, sites)
    present = {site.kind for site in sites}
    wished = dict.fromkeys(kinds.values())
    unmet = [field for field in wished if not any(kinds.get(kind) == field for kind in present)]
    if unmet:
        shown = ", ".join(f"`{one}=True`" if getattr(config, one, None) is True else f"`{one}`" for one in unmet)
        raise ConfigError(
            f"Every kind of site a configuration asks for must exist; got {shown} for {sites.model_class}, whose "
            f"sites are {', '.join(sorted(present))}. Ask for those it has."
        )
    found = [
        Placement(site=site, port=port)
        for site in sites
        if site.kind in kinds
        and site.role not in config.leave_out_roles
        and layer_number(site, sites) not in config.leave_out
    ]
    if not found:
        raise ConfigError(
            f"A configuration must reach at least one site; got `leave_out={list(config.leave_out)}` and "
            f"`leave_out_roles={list(config.leave_out_roles)}` for {sites.model_class}. Leave fewer layers out."
        )
    return found


def check_layers(name: str, layers: tuple[int, ...], sites: Sites) -> None:
    """Raise `ConfigError` for layer numbers the model does not have."""
    total = sum(sites.num_layers.values())
    unknown = [layer for layer in layers if type(layer) is not int or not 0 <= layer < total]
    if unknown:
        raise ConfigError(
            f"`{name}` names layers of the model, 0 to {total - 1}; got {', '.join(map(str, unknown))} "
            f"for {sites.model_class}. Remove {'them' if len(unknown) > 1 else 'it'}."
        )


def check_roles(name: str, roles: tuple[str, ...], sites: Sites) -> None:
    """Raise `ConfigError` for roles of sites that the model does not have."""
    present = {site.role for site in sites}
    unknown = [role for role in roles if role not in present]
    if unknown:
        raise ConfigError(
            f"`{name}` names sites of a layer by their role; got {', '.join(f'`{role}`' for role in unknown)} for "
            f"{sites.model_class}, which has {', '.join(f'`{role}`' for role in sorted(present))}. Name those."
        )


def layer_number(site: Site, sites: Sites) -> int:
    """The layer's number through all stacks, as `leave_out` and per-layer settings count (encoder, then decoder)."""
    offset = 0
    for stack, count in sites.num_layers.items():
        if stack == site.stack:
            return offset + site.layer
        offset += count
    raise AssertionError(f"{site.key} is not a site of {sites.model_class}")


def first_match(patterns: Mapping[str, V], key: str) -> V | None:
    """The value of the first pattern that a key matches, `*` standing for anything; None where none does."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(key, pattern)), None)


def check_patterns(name: str, patterns: Iterable[str], found: Iterable[Placement], sites: Sites) -> None:
    """Raise `ConfigError` for patterns that match the key of no projection."""
    keys = [placement.projection_key for placement in found]
    idle = [pattern for pattern in patterns if not any(fnmatchcase(key, pattern) for key in keys)]
    if idle:
        raise ConfigError(
            f"Every pattern of `{name}` must match a projection that is adapted; got "
            f"{', '.join(f'`{pattern}`' for pattern in idle)} for {sites.model_class}. "
            f"Write a key such as `{keys[0]}`, with `*` for anything."
        )


def projection_placements(
    wishes: Mapping[str, str],
    leave_out: tuple[int, ...],
    leave_out_roles: tuple[str, ...],
    leave_out_projections: tuple[str, ...],
    sites: Sites,
) -> list[Placement]:
    """A placement for each projection of every layer that plays one of some roles.

    Arguments: `wishes` gives the roles, each with the configuration field that asks for it; `leave_out` numbers layers,
    `leave_out_roles` names sites and `leave_out_projections` has patterns of projections to pass over. Raises
    `ConfigError` for anything that the model does not have, or where nothing is left.
    """
    check_layers("leave_out", leave_out, sites)
    check_roles("leave_out_roles", leave_out_roles, sites)
    present = {role for site in sites for role in site.projections}
    unmet = [role for role in wishes if role not in present]
    if unmet:
        raise ConfigError(
            f"Every projection a configuration asks for must exist; got {', '.join(f'`{role}`' for role in unmet)} "
            f"from `{wishes[unmet[0]]}` for {sites.model_class}, which has "
            f"{', '.join(f'`{role}`' for role in sorted(present)) or 'no known projection'}. Ask for those it has."
        )
    found = [
        Placement(site=site, port="linear", role=role, part=part)
        for site in sites
        if layer_number(site, sites) not in leave_out and site.role not in leave_out_roles
        for role in wishes
        if (site.kind in _ATTENTION) == (role in _ATTENTION_ROLES)
        for part in range(len(site.projections.get(role, ())))
    ]
    if found:
        check_patterns("leave_out_projections", leave_out_projections, found, sites)
        found = [one for one in found if not any(fnmatchcase(one.projection_key, p) for p in leave_out_projections)]
    if not found:
        left_out = {
            "leave_out": leave_out,
            "leave_out_roles": leave_out_roles,
            "leave_out_projections": leave_out_projections,
        }
        given = " and ".join(f"`{field}={list(value)}`" for field, value in left_out.items() if value)
        raise ConfigError(
            f"A configuration must reach at least one projection; got {given or 'no site with those asked for'} "
            f"for {sites.model_class}. Leave fewer layers out."
        )
    return found


def renumber(config: Config, numbers: Mapping[int, int], others: Iterable[int]) -> Config:
    """A configuration for a model that counts the same layers otherwise.

    Arguments: `numbers` are the new numbers by the old ones, `others` those of layers to be left out besides. By
    convention a configuration names layers in `leave_out`, in `layers` (those that it is for, or `all`) and in the keys
    of mappings.
    """
    changes: dict[str, Any] = {}
    left_out = sorted(others)
    for name, value in config.to_dict().items():
        if name == "leave_out":
            changes[name] = sorted({numbers[old] for old in value if old in numbers} | set(left_out))
        elif name == "layers" and (left_out or value != "all"):
            changes[name] = sorted(new for old, new in numbers.items() if value == "all" or old in value)
        elif isinstance(value, dict):
            kept = {
                str(numbers[int(key)]): item for key, item in value.items() if key.isdigit() and int(key) in numbers
            }
            changes[name] = kept | {key: item for key, item in value.items() if not key.isdigit()}
    return config.replace(**changes)
