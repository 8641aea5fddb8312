"""Brings together what is known of a model with adapters: its state, its data, and what one small batch shows."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..compose import Setup, cuts_rows, names
from ..core.site import Sites
from ..heads import HeadConfig, id2label, path_of, task_head
from ..methods import AdapterConfig, OutOfRange
from ..sites import Inputs, Known, RunsKnown
from .facts import Data, Memory, ModelFacts, Stored, Training
from .measure import measure, memory
from .report import Report, report

logger = logging.getLogger(__name__)

_PLACEHOLDER = "LABEL_"
_GRAFTED = ".inarch."
"""What the paths of all that was put into a model have in them."""


class Subject(Protocol):
    """What is examined: the handle on a model with adapters."""

    model: Any
    sites: Sites

    def __getitem__(self, name: str) -> dict[str, nn.Parameter]: ...
    def head(self, name: str) -> dict[str, Tensor]: ...
    def heads_of(self, setup: Setup) -> tuple[str, ...]: ...
    @property
    def flexible_heads(self) -> dict[str, HeadConfig]: ...
    def trying(self, setup: Setup, inputs: Inputs) -> AbstractContextManager[None]: ...
    def bare(self) -> AbstractContextManager[None]: ...


def examine(
    subject: Subject,
    setup: Setup,
    configs: Mapping[str, AdapterConfig],
    inputs: Inputs | None,
    *,
    on_trial: bool,
    training: Training | None = None,
    data: Data | None = None,
    stored: Stored | None = None,
    out_of_range: tuple[OutOfRange, ...] = (),
) -> Report:
    """The report on a setup of a grafted model, with the evidence of one batch where inputs are given.

    **Arguments**: `on_trial` says that the adapters are there for this examination alone, so that what is frozen says
    nothing about the training to come; `stored` is what is known of the folder that they came from, `out_of_range` what
    its settings cannot be: nothing is measured then, since the adapter has others.
    """
    model: nn.Module = subject.model
    several = len(dict.fromkeys(names(setup))) > 1
    parameters = {
        f"{key} of {name}" if several else key: p for name in names(setup) for key, p in subject[name].items()
    }
    flexible = dict.fromkeys(subject.heads_of(setup))
    paths = tuple(map(path_of, flexible)) or task_head(model, subject.sites)
    heads = [tensor for name in names(setup) for tensor in subject.head(name).values()]
    own = [] if flexible else [tensor for tensor in heads if isinstance(tensor, nn.Parameter)]
    head = own or [p for path in paths for p in model.get_submodule(path).parameters()]
    evidence, held = None, None
    # Of a setup that cuts the batch, outputs and memory are those of each case, and of its share.
    if inputs is not None and not cuts_rows(setup) and not out_of_range:
        with subject.trying(setup, inputs):
            run = run_of(model, inputs)
            if not _has_no_memory(model):
                found = measure(model, subject.sites, parameters, run, subject.bare)
                evidence = replace(found, is_initial=on_trial and stored is None)
            held = _memory(model, run, [*parameters.values(), *head], _samples(inputs))
    return report(
        subject.sites,
        setup,
        configs,
        model=model_facts(
            model,
            parameters,
            head,
            paths,
            heads=tuple(map(path_of, subject.flexible_heads)),
            flexible={name: subject.flexible_heads[name] for name in flexible},
            attached=not on_trial,
        ),
        training=training,
        data=_with_pixels(data, inputs),
        evidence=evidence,
        memory=held,
        stored=stored,
        out_of_range=out_of_range,
    )


def _has_no_memory(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def run_of(model: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    """A call of the model on these inputs."""
    call = inputs.to(*_place(model))
    known = Known()
    for tensor, value in zip(call.tensors(), inputs.tensors(), strict=True):
        known.put(tensor, value)

    def run() -> Any:
        with RunsKnown(known) if _has_no_memory(model) else nullcontext():
            return model(*call.args, **call.kwargs)

    return run


def _memory(
    model: nn.Module, run: Callable[[], Any], parameters: Sequence[nn.Parameter], samples: int
) -> Memory | None:
    """What training takes; None, with a warning, for a model whose code does not run without memory."""
    try:
        return memory(model, run, parameters, samples=samples)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        if not _has_no_memory(model):
            raise
        logger.warning(
            "The memory of %s cannot be estimated without its weights (%s); measure it with them.",
            type(model).__name__,
            str(error).partition("\n")[0],
        )
        return None


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    floats = [p for p in model.parameters() if p.is_floating_point()]
    return (floats[0].device, floats[0].dtype) if floats else (torch.device("cpu"), None)


def _samples(inputs: Inputs) -> int:
    return max((int(tensor.shape[0]) for tensor in inputs.tensors() if tensor.dim()), default=1)


def model_facts(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    head_parameters: Sequence[nn.Parameter],
    head: tuple[str, ...],
    *,
    attached: bool,
    flexible: Mapping[str, HeadConfig] | None = None,
    heads: tuple[str, ...] = (),
) -> ModelFacts:
    """What rules may know of a model's state.

    Arguments: `head` has the paths of its task head, or of the heads that are `flexible`; `heads` those of all
    flexible heads.
    """
    flexible = flexible or {}
    config = getattr(model, "config", None)
    beside = [p for path in heads for p in model.get_submodule(path).parameters()]
    special = {id(p) for p in (*parameters.values(), *head_parameters, *beside)}
    own = {id(p) for p in parameters.values()}
    num_labels, labels = _labels(model, head, list(flexible.values()))
    spread = getattr(config, "initializer_range", 0.02 if flexible else None)
    return ModelFacts(
        num_labels=num_labels,
        labels=labels,
        image_size=_image_size(config),
        head=head,
        flexible_head=next(iter(flexible)) if len(flexible) == 1 else "",
        random_frozen=_random_frozen(model, head, spread, head_parameters, apart=bool(flexible)),
        adapter_trainable=sum(p.numel() for p in parameters.values() if p.requires_grad),
        base_trainable=tuple(
            name
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in special and _GRAFTED not in name  # those are other adapters'
        ),
        adapter_dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if id(p) in own})),
        batch_norms_in_training=tuple(_active_batch_norms(model)),
        dropouts_in_training=sum(
            1
            for path, module in model.named_modules()
            if isinstance(module, nn.Dropout) and module.training and module.p > 0 and _GRAFTED not in path
        ),
        in_training=model.training,
        attached=attached,
    )


def _labels(
    model: nn.Module, head: tuple[str, ...], flexible: Sequence[HeadConfig]
) -> tuple[int | None, tuple[str, ...] | None]:
    """How many labels a model's head has, and their names by id; None where that is not known, or of several heads."""
    if len(flexible) == 1:
        count = getattr(flexible[0], "num_labels", getattr(flexible[0], "num_choices", None))
        return count, getattr(flexible[0], "labels", None)
    if flexible:
        return None, None
    labels = id2label(model)
    named = labels and not all(label.startswith(_PLACEHOLDER) for label in labels.values())
    return len(labels) if head and labels else None, tuple(labels[key] for key in sorted(labels)) if named else None


def _random_frozen(
    model: nn.Module, head: tuple[str, ...], spread: float | None, parameters: Sequence[nn.Parameter], *, apart: bool
) -> tuple[str, ...]:
    """The modules of a head that hold initial weights and are frozen: each for itself, or the model's own as one."""
    if not apart:
        frozen = not any(p.requires_grad for p in parameters)
        return head if head and frozen and _looks_untrained(model, head, spread) else ()
    return tuple(
        path
        for path in head
        if not any(p.requires_grad for p in model.get_submodule(path).parameters())
        and _looks_untrained(model, (path,), spread)
    )


def _active_batch_norms(model: nn.Module) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001  its public subclasses are several
        and module.training
        and module.track_running_stats
        and not any(p.requires_grad for p in module.parameters())
    ]


def _image_size(config: Any) -> tuple[int, int] | None:
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _looks_untrained(model: nn.Module, head: tuple[str, ...], spread: float | None) -> bool:
    """Whether all linear maps of a head are as an initialiser leaves them: biases zero, weights centred and of its
    spread, within four standard errors."""
    linears = [m for path in head for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear)]
    if not linears or spread is None or any(m.weight.is_meta for m in linears):
        return False
    for linear in linears:
        weight = linear.weight.detach().float()
        if linear.bias is not None and bool(linear.bias.detach().abs().max() > 0):
            return False
        count = weight.numel()
        if abs(float(weight.mean())) > 4 * spread / count**0.5:
            return False
        if abs(float(weight.std()) / spread - 1) > 4 / (2 * count) ** 0.5:
            return False
    return True


def _with_pixels(data: Data | None, inputs: Inputs | None) -> Data | None:
    """What a batch says of the images, where nothing is given."""
    pixels = None if inputs is None else inputs.kwargs.get("pixel_values")
    if not isinstance(pixels, Tensor) or data is None or data.pixel_size is not None or pixels.is_meta:
        return data
    return replace(
        data,
        pixel_range=(float(pixels.min()), float(pixels.max())),
        pixel_size=(int(pixels.shape[-2]), int(pixels.shape[-1])),
    )
