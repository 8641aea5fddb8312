"""Tells whether a model is the base an adapter was made on: the same sites, the same weights.

Two numbers of every tensor are kept, its norm and its sum under fixed signs, and compared within the tolerance of the
dtype. So a change anywhere in a tensor is seen (of a very large one, in the rows that are read: `_WHOLE`), and the same
weights in half precision still agree. Tensors are known by their role at a site, or by the layer they are in; those
outside the layers (embeddings, the norm at the end) by their stack and shape. No name of a module is used. What a task
adds behind the last layer is no part of the base.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .bank import CHILD
from .core.site import Projection, Site, Sites
from .tensors import is_quantised, whole

logger = logging.getLogger(__name__)

Summary = list[float]
"""The norm of a tensor, and its sum under fixed signs where there is one."""

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""By dtype, what a summary may differ by, relative to the norm: above what sums in another order, or rounding, make."""
_FLOOR = 1e-5
"""A difference that rounding to half precision makes near zero, where it is not relative any more."""
_WHOLE = 2**22
"""Values of a tensor up to which all are read; of a larger one, equally spaced rows."""


def describe_sites(sites: Sites) -> dict[str, Any]:
    """What an adapter file keeps of the sites it was made for: enough to say how another model differs."""
    return {site.key: [site.width, site.arrangement] for site in sites}


def fingerprint(model: nn.Module, sites: Sites, heads: Iterable[str] = ()) -> dict[str, Any] | str:
    """What an adapter file keeps of the weights of its base; "unknown" for one none of which can be
    read here: quantised or offloaded. Where it is spread over processes, every process calls this.

    Arguments: `heads` are the paths of modules that do not belong to the base.

    Returns `parts`, the summaries of tensors at sites and of whole layers by their key; `outside`, by stack, shape and
    summary of tensors around its layers; and `dtype`, the coarsest of all.
    """
    seen: set[torch.dtype] = set()
    parts = {key: _summary(tensor) for key, tensor in _at_sites(model, sites, seen)}
    parts |= _layers(model, sites, seen)
    outside = {
        stack: [[_shape(tensor), *_summary(tensor)] for tensor in tensors if _is_plain(tensor, seen)]
        for stack, tensors in _around(model, sites, tuple(heads)).items()
    }
    if not parts:
        return "unknown"
    dtype = max(seen, key=lambda found: _TOLERANCE[found])
    return {"dtype": str(dtype).removeprefix("torch."), "parts": parts, "outside": outside}


def compare_bases(
    record: Mapping[str, Any],
    sites: Sites,
    model: nn.Module,
    *,
    stacks: Iterable[str] | None = None,
    heads: Iterable[str] = (),
) -> str:
    """How the base in an adapter's record differs from this model, as a sentence; empty if none is known.

    Arguments: `stacks` are those the adapter touches, by default all of its base; a base may have others.
    """
    own, theirs = describe_sites(sites), record["sites"]
    touched = {_stack(key) for key in theirs} if stacks is None else set(stacks)
    own = {key: value for key, value in own.items() if _stack(key) in touched}
    theirs = {key: value for key, value in theirs.items() if _stack(key) in touched}
    differing = [key for key in theirs if own.get(key) != theirs[key]] + [key for key in own if key not in theirs]
    if differing:
        key = differing[0]
        return (
            f"the sites of an adapter's base and of the model must agree; got {len(differing)} that differ, first "
            f"`{key}`: {theirs.get(key, 'absent')} in the adapter, {own.get(key, 'absent')} in {sites.model_class}"
        )
    before = record["base"].get("fingerprint", "unknown")
    now = fingerprint(model, sites, heads)
    if isinstance(before, str) or isinstance(now, str):
        logger.warning(
            "Whether %s is the base that an adapter was made on is not known: the weights of %s cannot be read, being "
            "quantised or offloaded.",
            sites.model_class,
            "that base" if isinstance(before, str) else "this model",
        )
        return ""
    found = _compare(before, now, touched)
    if not found:
        return ""
    return f"the weights of an adapter's base and of the model must agree; got others {found} in {sites.model_class}"


def _stack(key: str) -> str:
    return key.partition(".")[0]


# What is summarised


def _is_plain(tensor: Any, seen: set[torch.dtype]) -> bool:
    """Whether the values of a tensor can be read here: neither quantised nor offloaded."""
    if not isinstance(tensor, Tensor) or is_quantised(tensor) or tensor.is_meta:
        return False
    seen.add(tensor.dtype)
    return bool(tensor.numel())


def _at_sites(model: nn.Module, sites: Sites, seen: set[torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias of every projection and every norm of a site."""
    for site in sites:
        for role, projections in site.projections.items():
            for number, projection in enumerate(projections):
                for leaf in ("weight", "bias"):
                    tensor = _rows(_parameter(model, site, projection, leaf), projection, seen)
                    if tensor is not None:
                        yield f"{site.key}.{role}{number or ''}.{leaf}", tensor
        for place in ("pre_norm", "post_norm", "branch_norm"):
            path = getattr(site, place)
            for leaf in ("weight", "bias") if path is not None else ():
                tensor = getattr(model.get_submodule(site.absolute(path)), leaf, None)
                if isinstance(tensor, Tensor) and _is_plain(tensor, seen):
                    yield f"{site.key}.{place}.{leaf}", tensor


def _parameter(model: nn.Module, site: Site, projection: Projection, leaf: str) -> Any:
    """The `weight` or the `bias` of a projection, which may be one of a module that applies it itself; None without."""
    path, _, name = (projection.weight or "weight").rpartition(".")
    module = model.get_submodule(site.absolute(projection.path)).get_submodule(path)
    attribute = name.replace("weight", leaf)
    registered = module._parameters.get(attribute)  # a forward in another thread may have another value before it
    return getattr(module, attribute, None) if registered is None else registered


def _rows(tensor: Any, projection: Projection, seen: set[torch.dtype]) -> Tensor | None:
    """Of a weight or bias, what plays the role, with output features first."""
    if not _is_plain(tensor, seen) or tensor.dim() not in (1, 2):
        return None
    tensor = whole(tensor)
    if tensor.dim() == 2 and projection.transposed:
        tensor = tensor.T
    if len(tensor) != projection.out_features:
        return None
    if projection.rows is None:
        return tensor  # type: ignore[no-any-return]
    return torch.cat([tensor[start:stop] for start, stop in projection.rows])


def _layers(model: nn.Module, sites: Sites, seen: set[torch.dtype]) -> dict[str, Summary]:
    """Norms over all vectors and over all matrices of every layer, which cover what has no role at a site.

    Norms alone, because they stay the same where a later version of the host library fuses tensors or splits them.
    """
    found: dict[str, Summary] = {}
    for key, path in _layer_paths(sites).items():
        tensors: dict[str, list[Any]] = {"vectors": [], "matrices": []}
        for name, parameter in model.get_submodule(path).named_parameters():
            if CHILD not in name.split("."):
                tensors["vectors" if len(_shape(parameter)) < 2 else "matrices"].append(parameter)
        for kind, members in tensors.items():
            if members and all(_is_plain(tensor, seen) for tensor in members):
                found[f"{key}.{kind}"] = [_rounded(math.hypot(*(_summary(tensor)[0] for tensor in members)))]
    return found


def _layer_paths(sites: Sites) -> dict[str, str]:
    """The module of every layer that has one for itself, by stack and number."""
    paths = {f"{site.stack}.{site.layer}": site.layer_path for site in sites}
    return {
        key: path
        for key, path in paths.items()
        if path and not any(other != path and f"{other}.".startswith(f"{path}.") for other in paths.values())
    }


def _around(model: nn.Module, sites: Sites, heads: tuple[str, ...]) -> dict[str, list[nn.Parameter]]:
    """By stack, the tensors outside all layers that come with it: before its last layer, and the norm behind that.

    "Before" is the order in which a model names its parameters: embeddings, layers, then what is made of the result.
    """
    layers = {site.layer_path: site.stack for site in sites}
    width = {site.stack: site.width for site in sites}
    order: list[tuple[str, nn.Parameter]] = []
    """The stack of each parameter ("" outside the layers), and the parameter."""
    for name, parameter in model.named_parameters():
        parents = {name[:place] for place, character in enumerate(name) if character == "."}
        if not parents & set(heads) and CHILD not in name.split("."):
            order.append((next((stack for path, stack in layers.items() if path in parents), ""), parameter))
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for place, (stack, _) in enumerate(order):
        if stack:
            first.setdefault(stack, place)
            last[stack] = place
    found: dict[str, list[nn.Parameter]] = {}
    for stack, stop in last.items():
        start = max((end for end in last.values() if end < first[stack]), default=-1)
        found[stack] = [parameter for other, parameter in order[start + 1 : stop] if not other]
        for other, parameter in order[stop + 1 :]:
            if other or parameter.shape != (width[stack],):
                break
            found[stack].append(parameter)
    return found


# How


def _shape(tensor: Tensor) -> list[int]:
    """The shape without what is 1."""
    return [size for size in tensor.shape if size != 1]


def _summary(tensor: Tensor) -> Summary:
    values = whole(tensor).squeeze()
    values = values.reshape(len(values) if values.dim() > 1 else 1, -1)
    values = values[:: max(1, math.ceil(values.numel() / _WHOLE))]
    if values.dtype != torch.float64:
        values = values.float()
    rows, columns = (_signs(size).to(values) for size in values.shape)
    return [_rounded(float(values.square().sum().sqrt())), _rounded(float(((values * columns).sum(1) * rows).sum()))]


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")


@lru_cache(maxsize=64)
def _signs(count: int) -> Tensor:
    """As many signs, always the same ones, by a hash of the place. They let rounding errors cancel out."""
    hashed = torch.arange(1, count + 1, device="cpu") * 2654435761 % 2**32
    hashed = (hashed ^ (hashed >> 15)) * 2246822519 % 2**32
    return 1 - 2 * (hashed >> 31)


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], stacks: set[str]) -> str:
    """Where two fingerprints differ, in words; empty if they do not."""
    dtypes = [getattr(torch, str(found["dtype"])) for found in (before, now)]
    tolerance = max(_TOLERANCE[dtype] for dtype in dtypes)
    floor = _FLOOR if tolerance > _TOLERANCE[torch.float32] else 0.0
    off: dict[str, float] = {}
    for key in before["parts"].keys() & now["parts"].keys():
        if _stack(key) in stacks:
            off[key] = _distance(before["parts"][key], now["parts"][key], floor)
    # Rounding differs from tensor to tensor, so over many of them a smaller difference is one of the weights.
    mean = math.sqrt(sum(value**2 for value in off.values()) / max(1, len(off)))
    worst = max(off, key=lambda key: off[key], default="")
    if worst and (off[worst] > tolerance or mean > tolerance / 6):
        return _words(f"`{worst}`", before["parts"][worst], now["parts"][worst])
    for stack in sorted(stacks):
        rows = [found["outside"].get(stack, ()) for found in (before, now)]
        for shape in sorted({tuple(row[0]) for row in chain(*rows)}):
            theirs, ours = ([list(row[1:]) for row in part if tuple(row[0]) == shape] for part in rows)
            if _apart(theirs, ours, floor) > tolerance:
                return _words(f"shape {shape} outside the layers of `{stack}`", theirs[0], ours[0])
    return ""


def _apart(theirs: list[Summary], ours: list[Summary], floor: float) -> float:
    """How far summaries without a name are apart: those of the model that has fewer must all be in the other."""
    few, many = sorted((theirs, ours), key=len)
    left, worst = list(many), 0.0
    for summary in few:
        match = min(left, key=lambda other: _distance(summary, other, floor))
        worst = max(worst, _distance(summary, match, floor))
        left.remove(match)
    return worst


def _distance(a: Summary, b: Summary, floor: float) -> float:
    """How far two summaries are apart, relative to the norm."""
    off = max(abs(x - y) for x, y in zip(a, b, strict=True))
    return max(0.0, off - floor) / (max(a[0], b[0]) or 1.0)


def _words(place: str, before: Summary, now: Summary) -> str:
    return f"at {place}: {_numbers(before)} in the adapter, {_numbers(now)}"


def _numbers(summary: Summary) -> str:
    return " and ".join(f"{value:.6g}" for value in summary)
