"""One forward of a model as a plain graph: every tensor it made and every module it called."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

Key = tuple[int | str, ...]
"""The way into a call's arguments or into its result, as in `Tap.key`."""

PARAMETER, CONSTANT, INPUT, ALIAS = "parameter", "constant", "input", "alias"
"""What stands for an operator in values that no operator made. An alias is a view whose storage was written to."""

MODALITIES = ("text", "audio", "video", "image", "data")
"""In order of precedence: a stack that sees images and text is called after the text."""

ATTENTIONS = ("scaled_dot_product", "flash_attn", "flex_attention")
"""Operators that are a whole attention; their first three tensors are queries, keys and values."""

_WORDS = {
    "": ("mask", "masked", "position", "positions", "shape", "shapes", "ratio", "label", "labels"),
    "video": ("video", "videos", "frames"),
    "image": ("pixel", "pixels", "image", "images", "img", "grid", "thw"),
    "audio": ("audio", "speech", "wave", "waveform", "features", "values"),
    "text": ("ids", "token", "tokens", "text", "embeds"),
}
"""What an argument's name says, first match first: `pixel_values_videos` is video, `input_values` is audio."""


@dataclass(slots=True, eq=False)
class Value:
    """One version of one tensor."""

    index: int
    op: str
    """The operator, without its overload and without the mark of an in-place one: "aten.add"."""
    deps: tuple[int, ...]
    shape: tuple[int, ...]
    floating: bool
    storage: int
    offset: int
    strides: tuple[int, ...]
    call: int | None
    """The innermost module call in which the value came about."""
    users: list[int] = field(default_factory=list)
    data: bool = False
    """Computed from the model's inputs."""
    active: bool = False
    """An activation: floating point all the way from an input, an embedding or learned queries. A mask is none."""
    matrix: bool = False
    """A parameter of two or more dimensions, or computed from one without any activation."""
    weighted: bool = False
    """A product of an activation, or of learned or constant queries, with a `matrix`."""
    bilinear: bool = False
    """A matrix product of two activations."""

    @property
    def numel(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(slots=True, eq=False)
class Call:
    """One call of one module: `start <= value index < stop` came about in it."""

    index: int
    path: str
    module: nn.Module
    parent: "Call | None"
    start: int
    inputs: dict[Key, int] = field(default_factory=dict)
    outputs: dict[Key, int] = field(default_factory=dict)
    stop: int = -1
    returned: int = -1
    """How many calls had returned before this one."""

    def encloses(self, other: "Call") -> bool:
        """Whether `other` ran inside this call; not true of the call itself."""
        return other.index > self.index and other.returned < self.returned

    def chain(self) -> Iterator["Call"]:
        """This call and those around it, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


@dataclass(frozen=True, slots=True)
class Dropout:
    """One call of torch's `dropout`, which in eval mode computes nothing."""

    value: int
    at: int
    """How many values there were."""
    returned: int
    """How many calls had returned."""


@dataclass(eq=False)
class Graph:
    """All values and calls of one forward, in the order in which they came about."""

    model: nn.Module
    values: list[Value]
    calls: list[Call]
    roots: dict[int, str]
    """The model's inputs: value -> name of the argument."""
    indices: dict[int, tuple[Tensor | None, ...]]
    """Values picked from another by lists of places: value -> the places in every dimension, None for all."""
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    """The values that are parameters."""
    dropouts: list[Dropout] = field(default_factory=list)

    @cached_property
    def producers(self) -> dict[int, list[tuple[Call, Key]]]:
        """Value -> calls that return it."""
        found: dict[int, list[tuple[Call, Key]]] = defaultdict(list)
        for call in self.calls:
            for key, value in call.outputs.items():
                found[value].append((call, key))
        return found

    @cached_property
    def consumers(self) -> dict[int, list[tuple[Call, Key]]]:
        """Value -> calls that receive it."""
        found: dict[int, list[tuple[Call, Key]]] = defaultdict(list)
        for call in self.calls:
            for key, value in call.inputs.items():
                found[value].append((call, key))
        return found

    @cached_property
    def ran(self) -> set[int]:
        """The identities of all modules that were called."""
        return {id(call.module) for call in self.calls}

    def modality(self, root: int) -> str:
        """What kind of data an input of the model is: the one of `MODALITIES`, or "" for masks, positions and shapes.

        By the argument's name, which transformers keeps stable; by dimensions and type where the name says nothing.
        """
        names, value = self.roots[root].lower().split("_"), self.values[root]
        for modality, words in _WORDS.items():
            if any(name in words for name in names):
                return modality
        if not value.floating:
            return "text" if len(value.shape) == 2 else "data"
        return "image" if len(value.shape) == 4 else "data"

    def owner(self, value: int) -> Call:
        """The innermost call in which a value came about."""
        call = self.values[value].call
        return self.calls[0 if call is None else call]

    def ancestors(self, value: int, after: int) -> set[int]:
        """What `value` is computed from, itself included, as far back as the values that came after `after`."""
        found: set[int] = set()
        todo = [value]
        while todo:
            index = todo.pop()
            if index > after and index not in found:
                found.add(index)
                todo.extend(self.values[index].deps)
        return found

    def descendants(self, value: int, within: set[int]) -> set[int]:
        """Which of `within` are computed from `value`."""
        found = {value}
        for index in sorted(within):
            if index > value and not found.isdisjoint(self.values[index].deps):
                found.add(index)
        found.discard(value)
        return found
