"""The configuration that asks for exactly the projections that a PEFT folder has tensors of."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from ..core.config import Config
from ..core.errors import ConfigError, StateError, join_problems
from ..core.site import Sites
from ..methods import Placement, layer_number, read_settings
from .peft_record import RECORD
from .peft_source import Source

ATTENTION_ROLES = ("q", "k", "v", "o")

EXPERTS = ("expert_up", "expert_down")
MLP_FIELDS = {"up": "intermediate_lora", "gate": "gate_lora", "down": "output_lora"}


def wishes(places: Sequence[Placement]) -> dict[str, Any]:
    """The fields that ask for the roles of these projections."""
    roles = {place.role for place in places}
    attention = [role for role in ATTENTION_ROLES if role in roles]
    flags = {name: role in roles for role, name in MLP_FIELDS.items()}
    flags |= {"experts_lora": True} if roles & set(EXPERTS) else {}
    return {"selfattn_lora": bool(attention), "attn_matrices": attention or ["q", "v"], **flags}


def made(source: Source, method: str, **values: Any) -> Config:
    """The configuration of a method with these values. Raises `StateError` where they are not valid.

    Where the folder is judged and not loaded, numbers out of range are told in `source.out_of_range`.
    """
    try:
        config, wrong = read_settings({"methods": [{"method": method, **values}]})
        if not wrong or source.other_base == "tell":
            source.out_of_range.extend(wrong)
            return config.parts[0]
        problem = join_problems([one.problem for one in wrong])
    except ConfigError as error:
        problem = str(error)
    raise StateError(
        f"The configuration of an adapter must be valid here too; got `{source.folder / RECORD}`: {problem}"
    )


def patterns_of(values: Iterable[tuple[str, Any]], default: Any) -> dict[str, Any]:
    """What differs from the default, by pattern: one for a role that has one value in all layers, else one for each."""
    tails: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in values:
        tails[f"*.{key.split('.', 2)[2]}"][key] = value
    found: dict[str, Any] = {}
    for tail, by_key in tails.items():
        shared = set(by_key.values())
        if len(shared) == 1:
            found |= {} if shared == {default} else {tail: shared.pop()}
        else:
            found |= {key: value for key, value in by_key.items() if value != default}
    return found


def left_out(sites: Sites, present: Sequence[Placement]) -> dict[str, Any]:
    """The layers, and the projections of others, that play one of the adapted roles and are not adapted."""
    roles = {place.role for place in present}
    roles |= set(EXPERTS) if roles & set(EXPERTS) else set()  # one field asks for both
    every = [
        Placement(site=site, port="linear", role=role, part=part)
        for site in sites
        for role, projections in site.projections.items()
        if role in roles and (site.kind == "mlp") == (role in (*MLP_FIELDS, *EXPERTS))
        for part in range(len(projections))
    ]
    keys = {place.projection_key for place in present}
    reached = {layer_number(place.site, sites) for place in present}
    layers = sorted({layer_number(place.site, sites) for place in every} - reached)
    absent = [
        (place.projection_key, place.projection_key not in keys)
        for place in every
        if layer_number(place.site, sites) in reached
    ]
    return {"leave_out": layers, "leave_out_projections": list(patterns_of(absent, False))}
