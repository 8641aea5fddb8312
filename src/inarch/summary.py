"""The table of a model's adapters: configuration, parameters, share of the base, state."""

from collections.abc import Iterable
from typing import Protocol

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


def summary(handle: Handle) -> str:
    """One row for each adapter, one for the task head, where there is one, and one for the base."""
    model, head_paths = handle.model, handle.heads
    adapters = {name: list(handle[name].values()) for name in handle.names}
    own = {id(parameter) for parameters in adapters.values() for parameter in parameters}
    head = {id(p): p for path in head_paths for p in model.get_submodule(path).parameters()}
    rest = [p for p in model.parameters() if id(p) not in own and id(p) not in head]
    base = sum(p.numel() for p in rest)

    def row(name: str, text: str, parameters: Iterable[nn.Parameter], active: str) -> tuple[object, ...]:
        listed = list(parameters)
        count = sum(p.numel() for p in listed)
        return name, text, count, f"{count / base:.2%}", active, _trainable(listed)

    chosen = () if handle.setup is None else names(handle.setup)
    rows = [
        row(name, str(handle.config(name)), parameters, "yes" if name in chosen else "no")
        for name, parameters in adapters.items()
    ]
    if head:
        rows.append(row("(head)", ", ".join(head_paths), head.values(), ""))
    rows.append(("(base)", type(model).__name__, base, "100%", "", _trainable(rest)))
    return render(("adapter", "configuration", "parameters", "of base", "active", "trainable"), rows)


def _trainable(parameters: Iterable[nn.Parameter]) -> str:
    flags = [parameter.requires_grad for parameter in parameters]
    return "yes" if flags and all(flags) else "partly" if any(flags) else "no"
