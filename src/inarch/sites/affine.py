"""The vectors that norms and projections of the sites apply, read off a model's modules.

Norms at a sum have a place there. Other norms, inside a branch (on queries and keys) or outside the layers (behind the
embeddings, behind the last layer), are known by what they compute: what they give does not depend on the size of what
they get. Each vector is found once, at the first site that has it.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.site import Affine, Projection, Site, Sites

_AT_SUMS = ("pre_norm", "post_norm", "branch_norm")
_BIAS = 1.0
"""The bias that a copy of a norm is run with."""

_Known = dict[tuple[object, ...], Tensor | None]
"""What norms of a class and size gave."""


def with_affine(model: nn.Module, sites: Sites) -> Sites:
    """The sites of a model with the vectors of their norms and projections."""
    taken: set[nn.Module] = set()
    known: _Known = {}
    found: dict[str, dict[str, Affine]] = {site.key: {} for site in sites}
    for site in sites:
        for role in _AT_SUMS:
            path = getattr(site, role)
            module = None if path is None else model.get_submodule(site.absolute(path))
            if module is not None and module not in taken:
                taken.add(module)
                if (vectors := _of_norm(module, path, known)) is not None:
                    found[site.key][role] = vectors
        for role, projections in site.projections.items():
            for part, projection in enumerate(projections):
                if (bias := _of_projection(model, site, projection)) is not None:
                    found[site.key][f"{role}{part or ''}"] = bias
    for role, site, path in _other_norms(model, sites, taken, known):
        vectors = _of_norm(model.get_submodule(site.absolute(path)), path, known)
        assert vectors is not None
        number = sum(name.startswith(role) for name in found[site.key])
        found[site.key][f"{role}{number or ''}"] = vectors
    return replace(sites, sites=tuple(replace(site, affine=found[site.key]) for site in sites))


def _of_norm(module: nn.Module, path: str, known: _Known) -> Affine | None:
    """The vectors of a norm; None where it has none that is called `weight` or `bias`."""
    own = {leaf: module._parameters.get(leaf) for leaf in ("weight", "bias")}
    vectors = {leaf: value for leaf, value in own.items() if value is not None and value.dim() == 1}
    if not vectors or len({len(value) for value in vectors.values()}) > 1:
        return None
    size = len(next(iter(vectors.values())))
    weight, bias = (leaf if leaf in vectors else "" for leaf in ("weight", "bias"))
    return Affine(
        path=path, size=size, weight=weight, bias=bias, is_norm=True, offset=_offset(module, known) if weight else 0.0
    )


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
    model: nn.Module, sites: Sites, taken: set[nn.Module], known: _Known
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


def _normalises(module: nn.Module, known: _Known) -> bool:
    """Whether a module has a weight, or a weight and a bias, that are vectors, and gives the same for 2x as for x."""
    own = module._parameters
    weight = own.get("weight")
    is_vector = weight is not None and weight.dim() == 1 and len(weight) > 1
    if not is_vector or [*module.children()] or not {*own} <= {"weight", "bias"}:
        return False
    small, large = (_given(module, known, 1.0, size) for size in (2.0**8, 2.0**9))
    if small is None or large is None:
        return False
    return bool(torch.allclose(small, large, rtol=1e-3)) and not torch.allclose(small, small.flip(-1))


def _offset(module: nn.Module, known: _Known) -> float:
    """What a norm adds to its weight, which is 1 in some: with the opposite for weights, nothing of its input is left.

    Seen where it is so, and not reckoned, because a norm may apply its weight before it normalises.
    """
    bias = _BIAS * (module._parameters.get("bias") is not None)
    for offset in (0.0, 1.0):
        given = _given(module, known, -offset, 2.0**8)
        if given is not None and torch.allclose(given, torch.full_like(given, bias), atol=1e-3):
            return offset
    return 0.0


def _given(module: nn.Module, known: _Known, weight: float, size: float) -> Tensor | None:
    """What a norm without hooks gives for an input of some size, where all its weights are the same; None for none."""
    own: Mapping[str, nn.Parameter | None] = module._parameters
    shape = next((tuple(p.shape) for p in own.values() if p is not None), ())
    kind = (type(module), shape, own.get("bias") is None, weight, size)
    if kind not in known:
        memo = {
            id(p): nn.Parameter(torch.full(shape, value, dtype=torch.float32, device="cpu"), requires_grad=False)
            for p, value in ((own.get("weight"), weight), (own.get("bias"), _BIAS))
            if p is not None
        }
        try:
            twin = copy.deepcopy(module, memo).eval()
            x = torch.linspace(-size, 2 * size, shape[-1], dtype=torch.float32, device="cpu").expand(2, -1)
            with torch.no_grad():
                # Not by calling it: whoever put hooks on the module, or a forward of their own, is no part of it.
                result = type(module).forward(twin, x)
            known[kind] = result if isinstance(result, Tensor) and result.shape == x.shape else None
        except Exception:  # noqa: BLE001  a module may refuse such an input in any way
            known[kind] = None
    return known[kind]
