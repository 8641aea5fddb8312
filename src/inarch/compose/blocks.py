"""Setups: trees of composition blocks over adapter names. Pure data; no tensor, no module.

Stack        one after the other, each on the result of the one before
Fuse         all on the same input, combined by a learned attention (AdapterFusion, arXiv 2005.00247)
Split        each on its own tokens
BatchSplit   each on its own rows of the batch
Parallel     each on its own copy of the batch
Average      all on the same input, combined by fixed weights
MultiTask    each on the rows of its task
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Union, overload

from ..core.errors import SetupError, nearest
from ..core.exact import exact, exact_sum

Setup = Union[str, "Block"]


@dataclass(frozen=True, slots=True, init=False)
class Block(Sequence[Any]):
    """A composition of adapters: the sequence of its `children`, which are adapter names and blocks.

    Every block raises `SetupError` for no children, for a block that may not stand inside it, and for settings that do
    not fit its children. What a model cannot run is refused where it is activated.
    """

    children: tuple[Setup, ...]
    allowed: ClassVar[tuple[str, ...]] = ()
    """The blocks that may stand inside; adapter names always may."""

    def __init__(self, *children: Setup) -> None:
        object.__setattr__(self, "children", _checked(type(self), children))

    def __str__(self) -> str:
        inner = [repr(child) if isinstance(child, str) else str(child) for child in self.children]
        inner += [f"{key}={value!r}" for key, value in self.settings().items()]
        return f"{type(self).__name__}({', '.join(inner)})"

    @overload
    def __getitem__(self, key: int) -> Setup: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Setup, ...]: ...
    def __getitem__(self, key: int | slice) -> Setup | tuple[Setup, ...]:
        return self.children[key]

    def __len__(self) -> int:
        return len(self.children)

    def settings(self) -> dict[str, Any]:
        """What the block has besides children, as JSON data."""
        return {}

    def names(self) -> tuple[str, ...]:
        """Adapter names, in order of first appearance."""
        found: dict[str, None] = {}
        for child in self.children:
            for name in names(child):
                found[name] = None
        return tuple(found)


@dataclass(frozen=True, slots=True, init=False)
class Stack(Block):
    """Adapters one after the other: `Stack("language", "task")` (MAD-X, Pfeiffer et al. 2020, arXiv 2005.00052)."""

    allowed = ("Fuse", "Split", "Parallel", "BatchSplit", "Average", "MultiTask")


@dataclass(frozen=True, slots=True, init=False)
class Fuse(Block):
    """Adapters side by side, combined by a trained attention over their outputs, for each token by itself
    (AdapterFusion, Pfeiffer et al. 2021, arXiv 2005.00247, section 3.2).

    `name` is that of its fusion layers, which `Adapters.add_fusion` makes: by default those of the children, joined
    by `+`.
    """

    name: str
    allowed = ("Stack",)

    def __init__(self, *children: Setup, name: str | None = None) -> None:
        object.__setattr__(self, "children", _checked(Fuse, children))
        object.__setattr__(
            self, "name", "+".join("-".join(names(child)) for child in children) if name is None else name
        )

    def settings(self) -> dict[str, Any]:
        return {"name": self.name}

    def names(self) -> tuple[str, ...]:
        """The adapters, and the fusion layers."""
        return tuple(dict.fromkeys([name for child in self.children for name in names(child)] + [self.name]))


@dataclass(frozen=True, slots=True, init=False)
class Parallel(Block):
    """Each child sees its own copy of the batch: of B samples the output has B for each child, in their order."""

    allowed = ("Stack", "BatchSplit", "Average")


@dataclass(frozen=True, slots=True, init=False)
class MultiTask(Block):
    """Each child sees the samples whose task id is its position, or its name: `model(**batch, task_ids=ids)`.

    `ids` is a tensor (B,) of positions from 0, or a list of names.
    """

    allowed = ("Stack", "Average", "Fuse")


@dataclass(frozen=True, slots=True, init=False)
class Split(Block):
    """Each child sees its own tokens: `Split("a", "b", splits=[4, 13])`, or one number for equal parts.

    Here the first 4 tokens of each sequence and the next 13; sequences have as many tokens as `splits` adds up to.
    """

    splits: tuple[int, ...]
    allowed = ("Split", "Stack", "BatchSplit", "Average")

    def __init__(self, *children: Setup, splits: int | list[int] | tuple[int, ...]) -> None:
        object.__setattr__(self, "children", _checked(Split, children))
        object.__setattr__(self, "splits", _sizes("Split", "splits", splits, len(children)))

    def settings(self) -> dict[str, Any]:
        return {"splits": list(self.splits)}


@dataclass(frozen=True, slots=True, init=False)
class BatchSplit(Block):
    """Each child sees its own samples of the batch: `BatchSplit("a", "b", batch_sizes=[2, 6])`, or one number for all.

    Here the first 2 samples and the next 6; a batch has as many samples as `batch_sizes` adds up to.
    """

    batch_sizes: tuple[int, ...]
    allowed = ("Stack", "Split", "BatchSplit", "Average")

    def __init__(self, *children: Setup, batch_sizes: int | list[int] | tuple[int, ...]) -> None:
        object.__setattr__(self, "children", _checked(BatchSplit, children))
        object.__setattr__(self, "batch_sizes", _sizes("BatchSplit", "batch_sizes", batch_sizes, len(children)))

    def settings(self) -> dict[str, Any]:
        return {"batch_sizes": list(self.batch_sizes)}


@dataclass(frozen=True, slots=True, init=False)
class Average(Block):
    """The weighted mean of the children's outputs; weights are divided by their sum.

    With `normalize_weights=False` they are taken as they are, and multiply what each child changes.
    """

    weights: tuple[float, ...]
    normalize_weights: bool
    allowed = ("Stack", "Split", "BatchSplit")

    def __init__(
        self,
        *children: Setup,
        weights: list[float] | tuple[float, ...] | None = None,
        normalize_weights: bool = True,
    ) -> None:
        object.__setattr__(self, "children", _checked(Average, children))
        chosen = tuple(weights) if weights is not None else (1.0,) * len(children)
        finite = all(isinstance(weight, int | float) and math.isfinite(weight) for weight in chosen)
        if len(chosen) != len(children) or not finite or (normalize_weights and exact_sum(chosen) <= 0):
            raise SetupError(
                f"`weights` of an `Average` must be one number for each child, with a sum above zero to be divided by; "
                f"got {list(chosen)} for {len(children)} children. Give {len(children)} weights, or "
                "`normalize_weights=False`."
            )
        object.__setattr__(self, "weights", tuple(map(float, chosen)))
        object.__setattr__(self, "normalize_weights", bool(normalize_weights))

    def settings(self) -> dict[str, Any]:
        return {
            "weights": list(self.weights),
            **({} if self.normalize_weights else {"normalize_weights": False}),
        }

    def shares(self) -> tuple[Fraction, ...]:
        """What each child's result counts, as exact as the weights are written; and last, where the weights are not
        normalised, what is left for the input: weights then multiply what each child changes."""
        shares, total = tuple(map(exact, self.weights)), exact_sum(self.weights)
        return tuple(share / total for share in shares) if self.normalize_weights else (*shares, 1 - total)


BLOCKS: dict[str, Callable[..., Block]] = {
    block.__name__: block for block in (Stack, Fuse, Split, BatchSplit, Parallel, Average, MultiTask)
}


def names(setup: Setup) -> tuple[str, ...]:
    """The adapter names of a setup."""
    return (setup,) if isinstance(setup, str) else setup.names()


def walk(setup: Setup) -> Iterator[Block]:
    """Every block of a setup, outermost first."""
    if isinstance(setup, Block):
        yield setup
        for child in setup.children:
            yield from walk(child)


def cases(setup: Setup) -> tuple[Setup, ...]:
    """What the rows and tokens of a batch may meet, block by block: setups of `Stack`, `Average` and `Fuse` alone."""
    if isinstance(setup, str):
        return (setup,)
    inner = [cases(child) for child in setup.children]
    if isinstance(setup, BatchSplit | Split | Parallel | MultiTask):
        return tuple(dict.fromkeys(itertools.chain.from_iterable(inner)))
    return tuple(dict.fromkeys(_with_children(setup, children) for children in itertools.product(*inner)))


def _with_children(block: Block, children: tuple[Setup, ...]) -> Block:
    """The same block of other children, also of those that nobody may write there."""
    changed: Block = object.__new__(type(block))
    for field in dataclasses.fields(block):
        object.__setattr__(changed, field.name, children if field.name == "children" else getattr(block, field.name))
    return changed


def fusions(setup: Setup) -> tuple[Fuse, ...]:
    """Every `Fuse` of a setup."""
    return tuple(block for block in walk(setup) if isinstance(block, Fuse))


def leaves(setup: Setup) -> tuple[str, ...]:
    """The names of a setup without those of its fusion layers."""
    return (setup,) if isinstance(setup, str) else tuple(dict.fromkeys(n for c in setup.children for n in leaves(c)))


def to_data(setup: Setup | None) -> Any:
    """A setup as JSON data."""
    if setup is None or isinstance(setup, str):
        return setup
    return {"block": type(setup).__name__, "children": [to_data(c) for c in setup.children], **setup.settings()}


def from_data(data: Any) -> Setup | None:
    """The setup that `to_data` wrote. Raises `SetupError` for anything else."""
    if data is None or isinstance(data, str):
        return data
    if not isinstance(data, Mapping) or data.get("block") not in BLOCKS or not isinstance(data.get("children"), list):
        raise SetupError(
            f"A stored setup is a name or {{'block': ..., 'children': [...]}}; got {str(data)[:80]}. "
            f"Blocks: {', '.join(BLOCKS)}."
        )
    settings = {key: value for key, value in data.items() if key not in ("block", "children")}
    children = [from_data(child) for child in data["children"]]
    try:
        return BLOCKS[data["block"]](*children, **settings)
    except TypeError as error:
        raise SetupError(f"A stored `{data['block']}` must have its own settings; got {settings}: {error}.") from None


def _checked(block: type[Block], children: tuple[Any, ...]) -> tuple[Setup, ...]:
    if not children:
        raise SetupError(f"A `{block.__name__}` composes at least one adapter; got none. Give it adapter names.")
    for child in children:
        inner = type(child).__name__
        if not isinstance(child, str) and inner not in block.allowed:
            raise SetupError(
                f"A `{block.__name__}` may hold adapter names and {', '.join(block.allowed)}; got `{inner}`. "
                f"{nearest(inner, block.allowed) if isinstance(child, Block) else 'Give the name of an adapter.'}"
            )
    return children


def _sizes(block: str, field: str, sizes: Any, count: int) -> tuple[int, ...]:
    chosen = (sizes,) * count if isinstance(sizes, int) else tuple(sizes)
    if len(chosen) != count or not all(isinstance(size, int) and size > 0 for size in chosen):
        raise SetupError(
            f"`{field}` of a `{block}` must be one positive integer for each child; got {list(chosen)} for "
            f"{count} children. Give {count} sizes."
        )
    return chosen
