"""The port for plain parameters: the weights and biases of norms, the biases of projections.

A vector is replaced like any parameter that a module reads itself (`weight.py`): the effective one lies before it for
the length of the module's forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .bank import ProjectionSlot
from .compose import Setup, run, uncut
from .core.offloaded import with_weights
from .core.site import Affine
from .methods import ParameterMethod
from .weight import WeightSlot, WeightState


@dataclass(frozen=True, slots=True)
class VectorRole:
    """The adapters of one vector: of a norm, of a projection, or of the part of a fused one that plays a role."""

    vectors: Affine
    leaf: str
    """`weight` or `bias`."""
    setup: Setup
    modules: Mapping[str, list[ParameterMethod]]

    def apply(self, value: Tensor) -> Tensor:
        """The vector (all its numbers) with those of the role changed."""
        rows = self.vectors.rows
        part = value if rows is None else torch.cat([value[start:stop] for start, stop in rows])
        part = run(self.setup, WeightState(part), self._step, uncut).weight
        if rows is None:
            return part
        place = 0
        for start, stop in rows:
            value = torch.slice_scatter(value, part[place : place + stop - start], 0, start, stop)
            place += stop - start
        return value

    def _step(self, name: str, state: WeightState) -> WeightState:
        value = state.weight
        for module in self.modules.get(name, ()):
            value = with_weights(module, module.effective, self.leaf, value)
        return WeightState(value)


@dataclass(frozen=True, slots=True)
class Slots:
    """The hooks that are on modules of a model, by module: at parameters, and at inputs and outputs."""

    parameters: dict[nn.Module, WeightSlot] = field(default_factory=dict)
    outputs: dict[nn.Module, ProjectionSlot] = field(default_factory=dict)

    def adapted(self, norm: nn.Module) -> "nn.Module | AdaptedNorm":
        """A norm as something that has the forward that it has with these hooks."""
        if norm not in self.parameters and norm not in self.outputs:
            return norm
        return AdaptedNorm(norm, self.parameters.get(norm), self.outputs.get(norm))


@dataclass(frozen=True, slots=True)
class AdaptedNorm:
    """A norm as a bottleneck runs it that applies it by itself: its forward, with the adapters of its vectors and of
    its output, and without the hooks of others."""

    module: nn.Module
    vectors: WeightSlot | None
    output: ProjectionSlot | None

    def forward(self, value: Tensor) -> Tensor:
        """The norm of a tensor."""
        normed: Any = None
        if self.vectors is not None:
            self.vectors.enter(self.module, ())
        try:
            normed = self.module.forward(value)
        finally:
            if self.vectors is not None:
                self.vectors.leave(self.module, (), normed)
        return normed if self.output is None else self.output.adapt(self.module, (value,), {}, normed)
