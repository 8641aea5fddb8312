"""The table of a model's adapters: configuration, parameters, share of the base, state."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from .compose import Setup, names
from .core.table import render
from .methods import AdapterConfig


class Handle(Protocol):
    """What the table needs of the handle of a model."""

    model: nn.Module

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def heads(self) -> tuple[str, ...]: ...
    @property
    def setup(self) -> Setup | None: ...
    def config(self, name: str) -> AdapterConfig: ...
    def __getitem__(self, name: str) -> dict[str, nn.Parameter]: ...


HEADERS = ("adapter", "configuration", "parameters", "of base", "active", "trainable")


def summary(handle: Handle) -> str:
    """The table as text."""
    found = [
        (*list(row.values())[:3], "100%" if row["adapter"] == "(base)" else f"{row['of base']:.2%}", *_told(row))
        for row in rows(handle)
    ]
    return render(HEADERS, found)


def _told(row: Mapping[str, Any]) -> tuple[str, str]:
    active = {True: "yes", False: "no", None: ""}[row["active"]]
    return active, {True: "yes", False: "no", None: "partly"}[row["trainable"]]


def rows(handle: Handle) -> list[dict[str, Any]]:
    """One row for each adapter, one for the task head, where there is one, and one for the base, by `HEADERS`.

    `of base` is a share; `active` is None where that means nothing, `trainable` where some parameters are.
    """
    model, head_paths = handle.model, handle.heads
    adapters = {name: list(handle[name].values()) for name in handle.names}
    own = {id(parameter) for parameters in adapters.values() for parameter in parameters}
    head = {id(p): p for path in head_paths for p in model.get_submodule(path).parameters()}
    rest = [p for p in model.parameters() if id(p) not in own and id(p) not in head]
    base = sum(p.numel() for p in rest)

    def row(name: str, text: str, parameters: Iterable[nn.Parameter], *, active: bool | None) -> dict[str, Any]:
        listed = list(parameters)
        count = sum(p.numel() for p in listed)
        return dict(zip(HEADERS, (name, text, count, count / base, active, _trainable(listed)), strict=True))

    chosen = () if handle.setup is None else names(handle.setup)
    found = [
        row(name, str(handle.config(name)), parameters, active=name in chosen) for name, parameters in adapters.items()
    ]
    if head:
        found.append(row("(head)", ", ".join(head_paths), head.values(), active=None))
    return [*found, row("(base)", type(model).__name__, rest, active=None)]


def _trainable(parameters: Iterable[nn.Parameter]) -> bool | None:
    """Whether all are trained; None where some are."""
    flags = [parameter.requires_grad for parameter in parameters]
    return True if flags and all(flags) else None if any(flags) else False
