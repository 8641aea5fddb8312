"""Reads LayerNorm tuning of PEFT: trained copies of norms, `...LayerNorm.ln_tuning_layers.weight` and `.bias`.

PEFT keeps the values of a norm; here the difference from the base's is kept, with which the base gives these values
again. Module names are those of today, with more or less in front, or older ones that end in the same word and have the
same numbers. Other modules that were copied whole, such as a task head's norm, are the adapter's task head.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..bank import module_key
from ..core.errors import StateError
from ..core.site import Sites
from ..methods import Placement, layer_number
from ..methods.layernorm_tuning import LayerNormTuning, LayerNormTuningConfig
from ..methods.parameters import plain_role
from ..tensors import kept_elsewhere, whole

_KEY = re.compile(r"(?P<path>.+)\.ln_tuning_layers(?:\.default)?\.(?P<leaf>.+)")


@dataclass(frozen=True, slots=True)
class Norms:
    """What a folder has, in our terms."""

    config: LayerNormTuningConfig
    tensors: dict[str, Tensor]
    paths: list[str]
    """Of the modules that are adapted, in the folder's words."""
    outside: dict[str, dict[str, Tensor]]
    """Other modules of the model that were copied whole: their tensors, by the folder's path."""


def read_norms(stored: dict[str, Tensor], model: nn.Module, sites: Sites, folder: Path) -> Norms:
    """Take the copies of norms out of `stored`. Raises `StateError` for norms that are none of the model."""
    copies: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in list(stored):
        if (found := _KEY.fullmatch(key)) is not None:
            copies[found["path"]][found["leaf"]] = stored.pop(key)
    places = {
        site.absolute(vectors.path): Placement(site=site, port="parameter", role=role)
        for site in sites
        for role, vectors in site.affine.items()
        if vectors.is_norm
    }
    meant = {path: own for path in copies if (own := _own(path, list(places)))}
    outside = {path: copies[path] for path in copies if path not in meant}
    if not meant or len(set(meant.values())) < len(meant):
        raise StateError(
            f"Trained norms are read at those of {type(model).__name__}, one copy for each; got "
            f"{', '.join(f'`{path}`' for path in list(copies)[:6]) or 'none'} at `{folder}`. Load it on the base model "
            "it was trained on."
        )
    tensors: dict[str, Tensor] = {}
    config = _config([places[own] for own in meant.values()], sites)
    copied = {own: copies[path] for path, own in meant.items()}
    for placement in LayerNormTuning.placements(config, sites):
        own = placement.site.absolute(placement.vectors.path)
        key = f"{placement.site.key}.{module_key(LayerNormTuning.name, placement)}"
        module = model.get_submodule(own)
        for leaf in placement.vectors.names:
            base = _value(module, leaf)
            # A norm that the folder has no copy of stays as it is.
            value = copied[own].get(leaf) if own in copied else base
            if value is None or value.shape != base.shape:
                size = None if value is None else tuple(value.shape)
                raise StateError(
                    f"A copy of a norm has its vectors, of its size; got {size} for `{leaf}` of `{own}`, which has "
                    f"{tuple(base.shape)}, at `{folder}`. Load it on the base model it was trained on."
                )
            tensors[f"{key}.{leaf}"] = value.to(base) - base
    return Norms(config, tensors, list(meant), outside)


def _value(module: nn.Module, leaf: str) -> Tensor:
    parameter = module._parameters[leaf]
    assert parameter is not None
    kept = kept_elsewhere(module, leaf) if parameter.is_meta else None
    return whole(parameter.detach() if kept is None else kept)


def _own(path: str, known: list[str]) -> str:
    """Today's path of a norm; empty where none or several are meant."""
    if path in known:
        return path
    around = [own for own in known if own.endswith(f".{path}") or path.endswith(f".{own}")]
    alike = around or [own for own in known if _word(own) == _word(path) and _numbers(own) == _numbers(path)]
    return alike[0] if len(alike) == 1 else ""


def _word(path: str) -> str:
    return path.rpartition(".")[2]


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdigit()]


def _config(present: list[Placement], sites: Sites) -> LayerNormTuningConfig:
    """The configuration that reaches these norms, and as few others as it can."""
    roles = {plain_role(place.role) for place in present}
    every: Mapping[str, Placement] = {
        place.projection_key: place for place in LayerNormTuning.placements(LayerNormTuningConfig(), sites)
    }
    layers = {layer_number(place.site, sites) for place in every.values()}
    at_sites = {place.site.role for place in every.values()}
    reached = {place.projection_key for place in present}
    if reached == set(every):
        return LayerNormTuningConfig()
    return LayerNormTuningConfig(
        outer_norms="outer_norm" in roles,
        roles=tuple(sorted(roles)),
        leave_out=tuple(sorted(layers - {layer_number(place.site, sites) for place in present})),
        leave_out_roles=tuple(sorted(at_sites - {place.site.role for place in present})),
    )
