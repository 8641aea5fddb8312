"""The linear maps of a branch: linear modules, and weights that another module applies itself (`in_proj_weight`)."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .features import Features, features_used
from .graph import PARAMETER, Call, Graph, Value
from .layers import is_checkpointed
from .residual import Branch
from .taps import Reach


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMap:
    """One use of a linear map: `result = input W^T`, with or without a bias."""

    path: str
    """Relative to the layer: the linear module or, where `weight` is given, the module that applies it."""
    weight: str = ""
    """The parameter's name, relative to `path`, where no linear module is called."""
    in_features: int
    out_features: int
    transposed: bool
    input: int
    result: int
    first: int = 0
    """The output feature of the map that is the first of the result: a part of a weight may be used alone."""

    @property
    def key(self) -> tuple[str, str]:
        """What two uses of one map have in common."""
        return self.path, self.weight

    def features(self, graph: Graph, between: set[int]) -> Features:
        """The output features of the map that are used by `between`, values computed from its result."""
        size = graph.values[self.result].shape[-1]
        used = features_used(graph, self.result, size, between)
        if size == self.out_features:
            return used
        return frozenset(self.first + feature for feature in (range(size) if used is None else used))


def find_maps(graph: Graph, branch: Branch, reach: Reach) -> dict[int, LinearMap]:
    """The maps inside a branch, by their results."""
    found: dict[int, LinearMap] = {}
    for index in branch.interior:
        applied = _applied_weight(graph, reach, graph.values[index])
        if applied is not None:
            found[index] = applied
        for call, key in graph.producers.get(index, ()):
            shape, path = linear_shape(call.module), reach.path(call)
            if reach.scope.encloses(call) and shape and path and not key and _maps(graph, call, index, shape):
                found[index] = LinearMap(
                    path=path,
                    in_features=shape[0],
                    out_features=shape[1],
                    transposed=shape[2],
                    input=next(iter(call.inputs.values())),
                    result=index,
                )
    return found


def _maps(graph: Graph, call: Call, result: int, shape: tuple[int, int, bool]) -> bool:
    """Whether a call of a linear module takes and gives the features it claims: not so for a map by groups."""
    taken = graph.values[next(iter(call.inputs.values()))].shape if call.inputs else ()
    return (taken[-1:], graph.values[result].shape[-1:]) == (shape[:1], shape[1:2])


def linear_shape(module: nn.Module) -> tuple[int, int, bool] | None:
    """Input features, output features and whether the weight is stored as (in, out); None for other modules."""
    layers: Any = sys.modules.get("transformers.pytorch_utils")  # not loaded: then no module is of its classes
    if layers is not None and isinstance(module, layers.Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1]), True
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int) and hasattr(module, "weight"):
        return in_features, out_features, False
    return None


# -------------------------------------------------------------------- weights without a linear module


def _applied_weight(graph: Graph, reach: Reach, value: Value) -> LinearMap | None:
    """The map if the value is a product of an activation with a parameter, in a module that is not linear."""
    owner = graph.owner(value.index)
    if not value.weighted or "mm" not in value.op or linear_shape(owner.module):
        return None
    weight = graph.values[value.deps[-1]]
    root = _root(graph, weight)
    matrix = graph.parameters.get(root.index) if root is not None else None
    if root is None or matrix is None or len(root.shape) != 2:
        return None
    place, home = _rows_of(weight, root), _home(reach, owner, matrix)
    if place is None or home is None:
        return None
    first, transposed = place
    outputs, inputs = reversed(root.shape) if transposed else root.shape
    return LinearMap(
        path=home[0],
        weight=home[1],
        in_features=inputs,
        out_features=outputs,
        transposed=transposed,
        input=value.deps[-2],
        result=value.index,
        first=first,
    )


def _root(graph: Graph, value: Value) -> Value | None:
    """The parameter that a value is a view of."""
    while value.op != PARAMETER:
        sources = set(value.deps)
        if len(sources) != 1 or graph.values[min(sources)].storage != value.storage:
            return None
        value = graph.values[min(sources)]
    return value


def _rows_of(weight: Value, root: Value) -> tuple[int, bool] | None:
    """The first output feature of a factor (in, out), and whether the parameter is stored so; None if it is not a
    run of output features with all their inputs."""
    *batch, inputs, outputs = zip(weight.shape, weight.strides, strict=True)
    if any(size != 1 and stride != 0 for size, stride in batch):
        return None
    for transposed in (False, True):
        features, contracted = (1, 0) if transposed else (0, 1)
        first, rest = divmod(weight.offset - root.offset, root.strides[features])
        whole = inputs == (root.shape[contracted], root.strides[contracted])
        if whole and outputs[1] == root.strides[features] and not rest and first + outputs[0] <= root.shape[features]:
            return first, transposed
    return None


def _home(reach: Reach, owner: Call, matrix: nn.Parameter) -> tuple[str, str] | None:
    """The nearest module around a product whose tree holds the parameter, and the parameter's name in it.

    Not the layer itself if it is checkpointed: hooks on it do not run again with its inside. Nor what does not read
    its parameters by their names.
    """
    for call in owner.chain():
        path = "" if call is reach.scope and not is_checkpointed(call.module) else reach.path(call)
        if path is None or isinstance(call.module, nn.RNNBase):
            return None
        for name, parameter in call.module.named_parameters(remove_duplicate=False):
            holder = call.module.get_submodule(name.rpartition(".")[0])
            if parameter is matrix and not isinstance(holder, torch.jit.ScriptModule):
                return path, name
        if call is reach.scope:
            return None
    return None
