"""Finds the residual sites of a model.

The user's layout comes first; else one forward of a copy without weights is traced; a model whose Python reads the
data (which such a copy has none of) runs once for real. What cannot be found or reached is refused by name: never
does a model get half of its sites.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import nn

from ..core.errors import SiteError, join_problems
from ..core.site import Sites
from .affine import with_affine
from .entries import with_entries
from .golden import find as find_shipped
from .graph import Graph
from .inputs import Inputs, given_inputs, made_inputs, with_small_image
from .known import Known, needs_data
from .layout import Layout, resolve
from .meta import meta_copy
from .survey import survey
from .trace import trace

Source = Literal["meta", "forward"]

_REFUSES_FP32 = re.compile(r"bf16|bfloat16|grouped_mm", re.IGNORECASE)


class ProbeError(SiteError):
    """The sites of a model were found only in part. `found` is the layout of that part, to complete and pass on."""

    def __init__(self, message: str, found: dict[str, Any]) -> None:
        super().__init__(message)
        self.found = found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.found)


def probe(model: nn.Module, *, layout: Layout | None = None, example_inputs: Any = None) -> Sites:
    """The residual sites of a model, found without changing it.

    **Arguments**: `layout` describes the sites and is only checked. `example_inputs` is what the model is called with
    (a tensor, a tuple of arguments, or a dict of keyword arguments); without it, a shipped layout is taken where there
    is one for exactly this model, and else short inputs are made from the model's configuration.

    Raises `SiteError` where no inputs can be made or the model cannot run; its subclass `ProbeError`, with the layout
    found so far in `found`, where there is no residual branch, one cannot be reached, or layers disagree.
    """
    if layout is not None:
        return _completed(model, resolve(model, layout))
    shipped = find_shipped(model) if example_inputs is None else None
    return _completed(model, probe_now(model, example_inputs=example_inputs) if shipped is None else shipped)


def _completed(model: nn.Module, sites: Sites) -> Sites:
    """The sites with what is read off the modules, which no layout has."""
    return with_affine(model, with_entries(model, sites))


def probe_now(model: nn.Module, *, example_inputs: Any = None) -> Sites:
    """What `probe` finds without a layout."""
    are_given = example_inputs is not None
    candidates = [given_inputs(example_inputs)] if are_given else made_inputs(model)
    if not candidates:
        raise SiteError(
            f"A probe runs the model once, on inputs made from its configuration; got {type(model).__name__}, whose "
            "inputs cannot be told from it. Pass `example_inputs=` with what you call the model with."
        )
    _, graph, source = _run(model, candidates, are_given=are_given)
    return _sites(model, graph, source)


def synthesise(model: nn.Module) -> dict[str, Any] | None:
    """Short inputs the model can be called with, as keyword arguments; None if none can be made.

    They are on the model's device, or, for a model without memory, on the CPU: their values are known then.
    """
    candidates = made_inputs(model)
    if not candidates:
        return None
    chosen = candidates[0]
    if len(candidates) > 1:
        with suppress(SiteError):
            chosen, _, _ = _run(model, candidates, are_given=False)
    device = _device(model)
    return dict(chosen.to("cpu" if device.type == "meta" else device, _dtype(model)).kwargs)


def likely_inputs(model: nn.Module) -> Inputs | None:
    """Inputs that the model probably takes, as short as possible, on its device; None if none can be made."""
    candidates = made_inputs(model)
    if not candidates:
        return None
    first = candidates[0].to(_device(model), _dtype(model))
    return with_small_image(model, first) or first


def _sites(model: nn.Module, graph: Graph, source: Source) -> Sites:
    found = survey(graph)
    sites = Sites(
        sites=found.sites,
        model_class=type(model).__name__,
        model_type=getattr(getattr(model, "config", None), "model_type", None) or "",
        source=source,
        refused=found.refused,
    )
    if found.problems:
        end = "\n" if len(found.problems) > 1 else " "
        raise ProbeError(
            f"{join_problems(list(found.problems))}{end}Complete the layout that was found, which the error holds as "
            "`found`, and pass it: `inarch.attach(model, layout={...})`.",
            sites.to_dict(),
        )
    if not sites.sites:
        refused = f" ({'; '.join(sites.refused)})" if sites.refused else ""
        raise ProbeError(
            f"A model has residual branches: sums of a stream and of what a weight makes of it; got none in "
            f"{sites.model_class}{refused}. If it has some, describe them: `inarch.attach(model, layout={{...}})`.",
            sites.to_dict(),
        )
    return sites


# -------------------------------------------------------------------- one forward


def _run(model: nn.Module, candidates: list[Inputs], *, are_given: bool) -> tuple[Inputs, Graph, Source]:
    """The first inputs that the model accepts and the graph of its forward, without weights if possible.

    The first candidate, which reaches most of the model, is tried for real whatever it fails of without weights.
    """
    dtype = None if are_given else _dtype(model)
    failures: list[Exception] = []
    for inputs in candidates:
        graph = _attempt(_on_meta, model, inputs, dtype)
        if isinstance(graph, Graph):
            return inputs, graph, "meta"
        failures.append(graph)
        if inputs is candidates[0] or needs_data(graph):
            graph = _attempt(_for_real, model, inputs, dtype)
            if isinstance(graph, Graph):
                return inputs, graph, "forward"
            failures[-1] = graph
    raise SiteError(
        f"A probe runs the model once; got {type(failures[0]).__name__}: {failures[0]} from {type(model).__name__}, "
        f"on {'the' if are_given else 'made-up'} example inputs. Pass `example_inputs=` with which the model runs."
    ) from failures[0]


def _attempt(
    run: Callable[[nn.Module, Inputs, torch.dtype | None], Graph],
    model: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype | None,
) -> Graph | Exception:
    try:
        return run(model, inputs, dtype)
    except Exception as error:  # noqa: BLE001  a model's forward may raise anything; the caller chains it
        return error


def _on_meta(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> Graph:
    twin = meta_copy(model)
    with torch.random.fork_rng(devices=[]):
        try:
            return _trace_twin(model, twin, inputs, dtype)
        except (RuntimeError, ValueError) as error:
            if not _REFUSES_FP32.search(str(error)):
                raise
            return _trace_twin(model, twin.to(torch.bfloat16), inputs, torch.bfloat16)


def _trace_twin(model: nn.Module, twin: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> Graph:
    on_meta = inputs.to("meta", dtype)
    known = Known()
    for tensor, value in zip(on_meta.tensors(), inputs.tensors(), strict=True):
        known.put(tensor, value)
    for tensor, value in zip(twin.buffers(), model.buffers(), strict=True):
        known.put(tensor, value)
    return trace(twin, on_meta.args, on_meta.kwargs, known)


def _for_real(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> Graph:
    on_device = inputs.to(_device(model), dtype)
    with _undisturbed(model):
        return trace(model, on_device.args, on_device.kwargs)


def _dtype(model: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and a random state of its own, for as long as the context lasts."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device.index or 0 for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
