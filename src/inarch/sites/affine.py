"""The vectors that norms and projections of the sites apply, read off a model's modules.

Norms at a sum have a place there. Other norms, inside a branch (on queries and keys) or outside the layers (behind the
embeddings, behind the last layer), are known by what they compute: what they give does not depend on the size of what
they get. Each vector is found once, at the first site that has it.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from ..core.site import Affine, Projection, Site, Sites

_AT_SUMS = ("pre_norm", "post_norm", "branch_norm")


def with_affine(model: nn.Module, sites: Sites) -> Sites:
    """The sites of a model with the vectors of their norms and projections."""
    taken: set[nn.Module] = set()
    known: dict[tuple[object, ...], bool] = {}
    found: dict[str, dict[str, Affine]] = {site.key: {} for site in sites}
    for site in sites:
        for role in _AT_SUMS:
            path = getattr(site, role)
            module = None if path is None else model.get_submodule(site.absolute(path))
            if module is not None and module not in taken:
                taken.add(module)
                if (vectors := _of_norm(module, path)) is not None:
                    found[site.key][role] = vectors
        for role, projections in site.projections.items():
            for part, projection in enumerate(projections):
                if (bias := _of_projection(model, site, projection)) is not None:
                    found[site.key][f"{role}{part or ''}"] = bias
    for role, site, path in _other_norms(model, sites, taken, known):
        vectors = _of_norm(model.get_submodule(site.absolute(path)), path)
        assert vectors is not None
        number = sum(name.startswith(role) for name in found[site.key])
        found[site.key][f"{role}{number or ''}"] = vectors
    return replace(sites, sites=tuple(replace(site, affine=found[site.key]) for site in sites))


def _of_norm(module: nn.Module, path: str) -> Affine | None:
    """The vectors of a norm; None where it has none that is called `weight` or `bias`."""
    own = {leaf: module._parameters.get(leaf) for leaf in ("weight", "bias")}
    vectors = {leaf: value for leaf, value in own.items() if value is not None and value.dim() == 1}
    if not vectors or len({len(value) for value in vectors.values()}) > 1:
        return None
    size = len(next(iter(vectors.values())))
    return Affine(path=path, size=size, is_norm=True, **{leaf: leaf for leaf in vectors})  # type: ignore[arg-type]


def _of_projection(model: nn.Module, site: Site, projection: Projection) -> Affine | None:
    """The bias of a projection, of a module that is called or of one that applies it itself; None without one."""
    holder_path, _, leaf = projection.weight.rpartition(".")
    name = leaf.replace("weight", "bias") if projection.weight else "bias"
    module = model.get_submodule(site.absolute(projection.path))
    bias = module.get_submodule(holder_path)._parameters.get(name) if name != leaf else None
    if bias is None or bias.shape != (projection.out_features,):
        return None
    full = f"{holder_path}.{name}" if holder_path else name
    return Affine(path=projection.path, size=projection.num_rows, bias=full, rows=projection.rows)


def _other_norms(
    model: nn.Module, sites: Sites, taken: set[nn.Module], known: dict[tuple[object, ...], bool]
) -> Iterator[tuple[str, Site, str]]:
    """Norms without a place at a sum: `inner_norm` or `outer_norm`, the site that they are counted to, their path."""
    layers: dict[str, list[Site]] = {}
    for site in sites:
        layers.setdefault(site.layer_path, []).append(site)
    shared = {path for path, members in layers.items() if len({(site.stack, site.layer) for site in members}) > 1}
    base = str(getattr(model, "base_model_prefix", "") or "")
    base = base if base and isinstance(getattr(model, base, None), nn.Module) else ""
    for path, module in model.named_modules():
        if module in taken or (base and not f"{path}.".startswith(f"{base}.")) or not _normalises(module, known):
            continue
        around = max(
            (layer for layer in layers if f"{path}.".startswith(f"{layer}." if layer else "")), key=len, default=None
        )
        if around in shared:
            continue
        taken.add(module)
        if around is not None:
            inside = path[len(around) + 1 :] if around else path
            yield "inner_norm", max(layers[around], key=lambda site: _closeness(site, inside)), inside
        else:
            first = max(_first_sites(sites), key=lambda site: _common(site.layer_path, path))
            yield "outer_norm", first, f"/{path}"


def _first_sites(sites: Sites) -> list[Site]:
    """The first site of each stack."""
    firsts: dict[str, Site] = {}
    for site in sites:
        firsts.setdefault(site.stack, site)
    return list(firsts.values())


def _closeness(site: Site, path: str) -> int:
    """How many names a path has in common with a projection of a site."""
    return max((_common(p.path, path) for parts in site.projections.values() for p in parts), default=0)


def _common(first: str, second: str) -> int:
    count = 0
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count


def _normalises(module: nn.Module, known: dict[tuple[object, ...], bool]) -> bool:
    """Whether a module has a weight, or a weight and a bias, that are vectors, and gives the same for 2x as for x."""
    own: Mapping[str, nn.Parameter | None] = module._parameters
    weight = own.get("weight")
    if (
        weight is None
        or weight.dim() != 1
        or len(weight) < 2
        or [*module.children()]
        or not {*own} <= {"weight", "bias"}
    ):
        return False
    kind = (type(module), tuple(weight.shape), own.get("bias") is None)
    if kind not in known:
        memo = {id(p): nn.Parameter(torch.ones(p.shape), requires_grad=False) for p in own.values() if p is not None}
        x = torch.linspace(-1.0, 2.0, len(weight)).expand(2, -1)
        try:
            twin = copy.deepcopy(module, memo).eval()
            with torch.no_grad():
                # Not by calling it: whoever put hooks on the module, or a forward of their own, is no part of it.
                small, large = (type(module).forward(twin, x * factor) for factor in (2.0**8, 2.0**9))
            known[kind] = bool(torch.allclose(small, large, rtol=1e-3)) and not torch.allclose(small, small.flip(-1))
        except Exception:  # noqa: BLE001  a module may refuse such an input in any way
            known[kind] = False
    return known[kind]
