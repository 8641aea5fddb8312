"""Keeps the record of a run while it goes on."""

import dataclasses
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from transformers import TrainerState

from ..check import Report
from ..core.records import (
    EpochRecord,
    FindingRecord,
    GroupRecord,
    ModuleRecord,
    MonitorRecord,
    RunRecord,
    SiteRecord,
    Status,
    VerdictRecord,
)
from ..core.site import Sites
from ..data.examples import ImageData
from ..handle import Adapters
from ..heads import task_head
from ..methods import LinearMethod, ParameterMethod, method_of
from .callbacks import epochs_of
from .folder import RunFolder
from .processes import Processes

PACKAGES = ("inarch", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy", "pillow")


class Ledger:
    """The record of one run, and the time since it was begun or resumed."""

    def __init__(self, folder: RunFolder, record: RunRecord) -> None:
        self.folder = folder
        self.record = record
        self.watched: Callable[[], MonitorRecord | None] = lambda: record.monitor
        """What a monitor has seen so far."""
        self._before = record.seconds
        self._start = time.perf_counter()
        self._first_step: int | None = None

    def start(self, step: int) -> None:
        """Begin to count the time; `step` is the first one."""
        self._start, self._first_step = time.perf_counter(), step

    def write(self) -> None:
        """Write `run.json`."""
        self.record.save(self.folder.path)

    def update(self, state: TrainerState, status: Status = "running") -> RunRecord:
        """Write what the trainer's state says. Returns it."""
        epochs = epochs_of(state.log_history)
        best = self._best(epochs)
        seconds = time.perf_counter() - self._start
        steps = state.global_step - (self._first_step or 0)
        batch = int(self.record.job["recipe"]["batch_size"])
        self.record = dataclasses.replace(
            self.record,
            status=status,
            epochs=epochs,
            best_epoch=best.epoch if best else None,
            results=_results(best, epochs),
            monitor=self.watched(),
            finished=None if status == "running" else now(),
            seconds=self._before + seconds,
            images_per_second=steps * batch / seconds if steps else self.record.images_per_second,
            peak_memory=peak_memory(),
        )
        self.write()
        return self.record

    def _best(self, epochs: tuple[EpochRecord, ...]) -> EpochRecord | None:
        """The first of the best epochs, as the trainer chooses it."""
        metric = self.record.metric
        measured = [one for one in epochs if one.step and metric in one.metrics]
        return max(measured, key=lambda one: one.metrics[metric] or 0, default=None) if metric else None


def _results(best: EpochRecord | None, epochs: tuple[EpochRecord, ...]) -> dict[str, float | None]:
    if best is not None:
        return dict(best.metrics)
    losses = [one.train_loss for one in epochs if one.train_loss is not None]
    return {"train_loss": losses[-1]} if losses else {}


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory() -> int:
    """The most memory used so far, in bytes: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_data(images: ImageData) -> dict[str, Any]:
    """What a record keeps of the data."""
    return {
        "name": images.name,
        "task": images.task,
        "labels": list(images.labels),
        "train": len(images.train),
        "validation": len(images.validation),
    }


def describe_model(name: str, network: nn.Module, handle: Adapters | None) -> dict[str, Any]:
    """What a record keeps of the model."""
    config = getattr(network, "config", None)
    adapters = 0 if handle is None else sum(p.numel() for key in handle.names for p in handle[key].values())
    return {
        "id": name,
        "revision": getattr(config, "_commit_hash", None),
        "class": type(network).__name__,
        "type": getattr(config, "model_type", ""),
        "parameters": sum(p.numel() for p in network.parameters()) - adapters,
        "trainable": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "adapter_parameters": adapters,
        "head_parameters": sum(
            p.numel() for path in task_head(network) for p in network.get_submodule(path).parameters()
        ),
    }


def describe_verdict(report: Report) -> VerdictRecord:
    """What a record keeps of a verdict."""
    groups = tuple(
        GroupRecord(
            place=group.place,
            arrangement=group.sites[0].arrangement,
            pretrained=f"y = {group.proof.formula.pretrained}",
            adapted=f"y = {group.proof.formula.adapted}",
            verdict=group.proof.verdict,
        )
        for group in report.sites
    )
    details = tuple(
        FindingRecord(
            code=finding.code,
            level=finding.level,
            place=finding.place,
            message=finding.message,
            fixes=tuple(map(str, finding.fixes)),
            advice=finding.advice,
        )
        for finding in report.findings
    )
    findings = tuple(map(str, report.findings))
    return VerdictRecord(sound=report.sound, groups=groups, findings=findings, details=details)


def describe_sites(sites: Sites, report: Report | None = None) -> tuple[SiteRecord, ...]:
    """What a record keeps of the sites: those that differ by their layer alone, with the same grafts, as one."""
    proofs = {site.key: group.proof for group in report.sites for site in group.sites} if report else {}
    sizes: dict[tuple[object, ...], int] = {}
    grafts: dict[str, list[ModuleRecord]] = {}
    for module in report.plan.modules if report else ():
        place = module.placement
        kind = (module.adapter, module.method, place.port, place.role, place.part, place.site.signature())
        if kind not in sizes:  # equal modules are made and counted once
            sizes[kind] = module.num_parameters
        method = method_of(module.config)
        made = ModuleRecord(
            adapter=module.adapter,
            method=module.method,
            port=place.port,
            role=place.role,
            parameters=sizes[kind],
            formula=method.formula(module.config, place) if issubclass(method, LinearMethod | ParameterMethod) else "",
        )
        grafts.setdefault(place.site.key, []).append(made)
    found: dict[SiteRecord, list[int]] = {}
    for site in sites:
        formula = proofs[site.key].formula if site.key in proofs else None
        same = SiteRecord(
            stack=site.stack,
            role=site.role,
            kind=site.kind,
            layers=(),
            layer_class=site.layer_class,
            arrangement=site.arrangement,
            width=site.width,
            projections=tuple(site.projections),
            modules=tuple(grafts.get(site.key, ())),
            pretrained="" if formula is None else f"y = {formula.pretrained}",
            adapted="" if formula is None else f"y = {formula.adapted}",
            verdict=proofs[site.key].verdict if formula is not None else "",
        )
        found.setdefault(same, []).append(site.layer)
    return tuple(dataclasses.replace(same, layers=tuple(layers)) for same, layers in found.items())


def describe_environment(processes: Processes, precision: str) -> Mapping[str, Any]:
    """What a record keeps of the machine."""
    device = processes.state.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes.number,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "precision": precision,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
