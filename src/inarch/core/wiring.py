"""How an adapter's result meets the layer's own sum: written once, run on tensors and on symbols.

A residual site of the layer computes `y = norm(x + h)` (post-norm) or `y = x + h` (every other arrangement). An adapter
at the site turns `h` into a new site output, possibly without the layer's sum. The layer will add `x` whatever happens,
so a result that contains `x` is carried as `count * x + rest` and only `rest + (count - 1) * x` is handed to the
layer: in every sound wiring the last term is absent and nothing is rounded twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, Self, TypeVar


class Summable(Protocol):
    """A tensor or an expression."""

    def __add__(self, other: Any, /) -> Self: ...
    def __mul__(self, factor: Any, /) -> Self: ...


V = TypeVar("V", bound=Summable)

Circuit = Literal["own", "exchanged", "unnormed", "joined", "inner", "last_norm"]
"""What an adapter is given for the stream, the branch output and the norm after the sum:

    own        those of the layer
    exchanged  the branch output for the stream, and the stream for the branch output
    unnormed   no norm: the layer's own comes after whatever the adapter makes of the sum
    joined     for the stream, the sum of the stream and the branches of the same sum that ran before
    inner      for the branch output, that of its last projection, before any norm of the branch; no norm
    last_norm  the same, and for the norm the one that ends the branch of this kind in the last layer of the stack

All but the first are habits of other libraries on certain models, needed for adapters that were trained there.
"""


@dataclass(frozen=True, slots=True)
class Carry(Generic[V]):
    """The value `count * x + rest`."""

    rest: V
    count: int = 0

    def value(self, x: V | None) -> V:
        """The value itself; `x` may be None only where its count is zero."""
        return add_multiple(self.rest, self.count, x)


def add_multiple(rest: V, count: int, x: V | None) -> V:
    """`rest + count * x`, exact and free of work for the counts that occur in sound wirings."""
    if count == 0:
        return rest
    assert x is not None, "a wiring that contains x was run without reading x"
    return rest + (x if count == 1 else x * count)


@dataclass(frozen=True, slots=True)
class Settled(Generic[V]):
    """What a hook hands to the layer: `branch` in place of `h`, and, where the layer's own norm is to be passed over,
    `output` in place of that norm's result."""

    branch: V
    output: V | None = None


def settle(carry: Carry[V], x: V | None, h: V, *, add: bool, post_norm: bool) -> Settled[V]:
    """Hand a site's new output to a layer that will still compute `x + branch`, and `norm` of it if post-norm.

    With `add` the layer's own sum (and norm) follows the adapter, `y = norm(x + value)`; without it `y = value`.
    """
    if add:
        return Settled(carry.value(x))
    if post_norm:
        return Settled(h, carry.value(x))
    return Settled(add_multiple(carry.rest, carry.count - 1, x))


def layer_output(settled: Settled[V], x: V, norm: Callable[[V], V] | None) -> V:
    """What the layer makes of it; the symbolic side of `settle`."""
    if settled.output is not None:
        return settled.output
    total = settled.branch + x
    return total if norm is None else norm(total)
