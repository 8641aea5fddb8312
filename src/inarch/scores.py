"""What adapters decide in a forward, on request: how far gates are open, and what fusion layers attend to."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attach import methods_in
from .bank import Modules


@dataclass(slots=True)
class Scores:
    """The scores of the last forward, by adapter and by its module's key in an adapter file. No graph is kept."""

    gates: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """One number for each sample, (B,): how far the gate is open."""
    fusion: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """(B, L, N): the weights of N fused adapters, which add up to one."""


@contextmanager
def watched(adapters: Mapping[str, Mapping[str, Modules]]) -> Iterator[Scores]:
    """A block in which forwards leave the scores of adapters, given by name and site key, in what it yields."""
    scores, handles = Scores(), []
    try:
        for name, sites in adapters.items():
            for site, modules in sites.items():
                for key, module in methods_in(modules):
                    place = f"{site}.{key}"
                    gate, attention = getattr(module, "gate", None), getattr(module, "attention", None)
                    if isinstance(gate, nn.Module):
                        dim = getattr(module, "batch_dim", 0)
                        hook = _gate_hook(scores.gates.setdefault(name, {}), place, dim)
                        handles.append(gate.register_forward_hook(hook))
                    if isinstance(attention, nn.Module):
                        hook = _attention_hook(scores.fusion.setdefault(name, {}), place)
                        handles.append(attention.register_forward_hook(hook))
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def _gate_hook(found: dict[str, Tensor], place: str, batch_dim: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        values = torch.sigmoid(output.detach()).squeeze(-1)
        tokens = tuple(dim for dim in range(values.dim()) if dim != batch_dim)
        found[place] = values.mean(dim=tokens) if tokens else values

    return hook


def _attention_hook(found: dict[str, Tensor], place: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        found[place] = output.detach()

    return hook
