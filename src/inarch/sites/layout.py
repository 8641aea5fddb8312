"""A user's own layout: sites described by hand or by an earlier probe, checked against the model."""

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import SiteError, join_problems, nearest
from ..core.site import Projection, Site, Sites, Tap
from .maps import linear_shape

Layout = Sites | Mapping[str, Any] | str | PathLike[str]


def resolve(model: nn.Module, layout: Layout) -> Sites:
    """The sites that a layout describes, for this model.

    **Arguments**: `layout` is what `Sites.to_dict` returns, the path of a JSON file that holds it, or `Sites`.

    Raises `SiteError` that names everything in the layout that the model does not have.
    """
    sites = layout if isinstance(layout, Sites) else Sites.from_dict(_read(layout))
    problems = list(_problems(model, sites))
    if problems:
        end = "\n" if len(problems) > 1 else " "
        raise SiteError(
            f"{join_problems(problems)}{end}Compare with `inarch.probe(model).to_dict()` of {type(model).__name__}."
        )
    return replace(sites, source="layout", model_class=type(model).__name__)


def _read(layout: Mapping[str, Any] | str | PathLike[str]) -> Mapping[str, Any]:
    if isinstance(layout, Mapping):
        return layout
    try:
        data = json.loads(Path(layout).read_text(encoding="utf-8"))
    except OSError as error:
        raise SiteError(
            f"A layout is a dict, `Sites`, or the path of a JSON file; got {str(layout)!r}, which cannot be read "
            f"({error.strerror}). Write one with `json.dump(inarch.probe(model).to_dict(), file)`."
        ) from error
    except ValueError as error:
        raise SiteError(
            f"A layout file holds JSON; got {error} in {str(layout)!r}. "
            "Write one with `json.dump(inarch.probe(model).to_dict(), file)`."
        ) from error
    if not isinstance(data, dict):
        raise SiteError(
            f"A layout file holds a JSON object; got {type(data).__name__} in {str(layout)!r}. "
            "Write one with `json.dump(inarch.probe(model).to_dict(), file)`."
        )
    return data


def _problems(model: nn.Module, sites: Sites) -> Iterator[str]:
    if not sites.sites:
        yield f"a layout describes at least one site; got none for {type(model).__name__}."
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, count in Counter(site.key for site in sites).items():
        if count > 1:
            yield f"a site has a key of its own; got {count} times `{key}`. Number the roles of a layer: `mlp_2`."
    for site in sites:
        yield from _problems_of_site(site, modules)


def _problems_of_site(site: Site, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    if site.layer_path not in modules:
        yield _missing(site, "layer_path", site.layer_path, modules)
        return
    for name, tap in (("output", site.output), ("stream", site.stream)):
        if tap is not None:
            yield from _problems_of_tap(site, name, tap, modules)
    for name in ("pre_norm", "post_norm", "branch_norm"):
        path = getattr(site, name)
        if path is not None:
            yield from _problems_of_norm(site, name, path, modules)
    for role, projections in site.projections.items():
        for projection in projections:
            yield from _problems_of_projection(site, role, projection, modules)


def _missing(site: Site, what: str, path: str, modules: Mapping[str, nn.Module]) -> str:
    hint = nearest(path, modules) if path else ""
    if hint.startswith("Known"):
        hint = "Name a module of `model.named_modules()`."
    return f"`{what}` names a module of the model; got `{path}` at {site.key}. {hint}"


def _problems_of_tap(site: Site, name: str, tap: Tap, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    path = site.absolute(tap.path)
    if path not in modules:
        yield _missing(site, name, path, modules)
    elif tap.since is not None and site.absolute(tap.since) not in modules:
        yield _missing(site, f"since of {name}", site.absolute(tap.since), modules)
    elif tap.side == "in" and not tap.key:
        yield (
            f"`{name}` on the side `in` has the position or the name of an argument as `key`; got none at {site.key}. "
            "Give `[0]` for the first."
        )
    elif tap.side == "in" and not _takes(modules[path], tap.key[0]):
        yield (
            f"`{name}` names an argument of `{path}`; got {tap.key[0]!r} at {site.key}. "
            f"Its forward is `{inspect.signature(modules[path].forward)}`."
        )
    elif tap.side not in ("in", "out"):
        yield f"`side` of `{name}` is `in` or `out`; got {tap.side!r} at {site.key}. Give the one that is meant."


def _takes(module: nn.Module, argument: int | str) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    if isinstance(argument, str):
        return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return argument < len(positional) or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _problems_of_norm(site: Site, name: str, path: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    norm = modules.get(site.absolute(path))
    if norm is None:
        yield _missing(site, name, site.absolute(path), modules)
        return
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.dim() == 1 and len(weight) != site.width:
        yield (
            f"`{name}` normalises the width of its site; got {len(weight)} features in `{site.absolute(path)}` "
            f"where {site.key} has {site.width}. Give the norm next to the sum, or mend `width`."
        )


def _problems_of_projection(
    site: Site, role: str, projection: Projection, modules: Mapping[str, nn.Module]
) -> Iterator[str]:
    path = site.absolute(projection.path)
    if path not in modules:
        yield _missing(site, f"projections.{role}", path, modules)
        return
    described = (projection.in_features, projection.out_features, projection.transposed)
    real = _weight_shape(modules[path], projection) if projection.weight else linear_shape(modules[path])
    if real is None and projection.weight:
        yield (
            f"`weight` of `projections.{role}` names a matrix among the parameters of `{path}`; got "
            f"`{projection.weight}` at {site.key}. {nearest(projection.weight, _matrices(modules[path]))}"
        )
    elif real is None:
        yield (
            f"`projections.{role}` names a linear module; got {type(modules[path]).__name__} at `{path}` of "
            f"{site.key}. Name a linear module or leave the role out."
        )
    elif real != described:
        yield (
            f"`projections.{role}` has the features of its module; got (in, out, transposed) {described} where "
            f"`{path}` of {site.key} has {real}. Copy those."
        )
    elif projection.rows is not None and not _are_rows(projection.rows, projection.out_features):
        yield (
            f"`rows` of `projections.{role}` are rising half-open ranges below {projection.out_features}; got "
            f"{list(projection.rows)} at {site.key}. Give ranges such as `[[0, {projection.out_features}]]`."
        )


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.dim() in (2, 3)}


def _weight_shape(module: nn.Module, projection: Projection) -> tuple[int, int, bool] | None:
    matrix = _matrices(module).get(projection.weight)
    if matrix is None or matrix.shape[:-2] != ((projection.experts,) if projection.experts else ()):
        return None
    outputs, inputs = reversed(matrix.shape[-2:]) if projection.transposed else matrix.shape[-2:]
    return inputs, outputs, projection.transposed


def _are_rows(rows: tuple[tuple[int, int], ...], stop: int) -> bool:
    bounds = [0, *(bound for row in rows for bound in row), stop]
    return bool(rows) and bounds == sorted(bounds) and all(start < end for start, end in rows)
