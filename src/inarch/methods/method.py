"""What a method is: a configuration, the places it wants, and a small module for each of them.

A method is one file of this folder with one leaf class. Its port says where it plugs in:

    SublayerMethod   receives the stream x and the branch output h of a site, gives a new site output
    LinearMethod     receives the input and the output of one projection, gives a new output; where no hook can see
                     these, because a module applies the weight itself, it gives a new weight, if it can
    PrefixMethod     gives keys and values that stand before those of one attention

`parameters.py` has another, for the vectors of norms and the biases of projections.

Tensors: B batch, L tokens, D width, R rank or bottleneck.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from ..core.config import Config, option
from ..core.errors import ConfigError, SiteError
from ..core.offloaded import with_weights
from ..core.site import Affine, Entry, Kind, Projection, Site, Sites
from ..core.turned import is_turned
from ..core.wiring import Carry, Circuit, Summable

V = TypeVar("V", bound=Summable)

_CUTTING = ("BatchSplit", "Split", "Parallel", "MultiTask")


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """One module a method wants: at which site, through which port, and, for a projection, in which role."""

    site: Site
    port: Literal["sublayer", "linear", "weight", "fusion", "stream", "input", "prefix", "parameter"]
    role: str = ""
    part: int = 0
    """Which of the projections that share the role (an attention may compute k in two steps)."""
    entry: Entry | None = None
    """Where the stack gets its tokens from, for the input port."""

    @property
    def projection_key(self) -> str:
        """The place of a projection in the architecture, such as `image0.3.self_attention.q`, which patterns match."""
        return f"{self.site.key}.{self.role}{self.part or ''}"

    @property
    def projection(self) -> Projection:
        """What is known of the projection; of a norm, which computes its outputs from as many inputs, as of one."""
        known = self.site.projections.get(self.role)
        if known is not None:
            return known[self.part]
        norm = self.vectors
        return Projection(path=norm.path, in_features=norm.size, out_features=norm.size)

    @property
    def vectors(self) -> Affine:
        """The vectors of the norm, or the bias of the projection."""
        return self.site.affine[f"{self.role}{self.part or ''}"]


class Branch(Protocol[V]):
    """The adapter as the wiring sees it; a module when tensors run, a pair of symbols in a proof."""

    def branch(self, z: V) -> V: ...
    def norm_branch(self, w: V) -> V: ...


@dataclass(frozen=True, slots=True)
class Frozen:
    """What the base has for one role of a projection, as plain tensors: `weight` (rows, in) and `bias` (rows,)."""

    weight: Tensor
    bias: Tensor | None


class Sharing(nn.Module):
    """A module that may share parameters and buffers with others of the same adapter."""

    def tie(self, name: str, known: dict[Any, Any], kind: Any = None) -> None:
        """Share one parameter or buffer with those modules that share the same `kind` of it.

        The first module keeps it, and saves it; the others hold none, and find it by `tied`.
        """
        first = known.setdefault((name, kind), self)
        if first is not self:
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
            self.__dict__.setdefault("_first", {})[name] = first  # not as a child: it is one already, elsewhere

    def tied(self, name: str, like: Tensor) -> Tensor:
        """What `tie` shares, where `like` is. Raises `SiteError` where it is a trained one that is spread out."""
        first = self.__dict__.get("_first", {}).get(name)
        found: Tensor = getattr(self, name) if first is None else with_weights(first, getattr, first, name)
        if first is not None and hasattr(found, "full_tensor"):
            raise SiteError(
                f"Parameters that layers share are whole in each of them; got `{name}` of `{type(self).__name__}`, "
                "spread over processes with the layer that keeps it. Train this adapter without `fully_shard`, or one "
                "that shares none."
            )
        return found if found.device == like.device else found.to(like.device)


class AbstractMethod(Sharing, ABC):
    """The common part of all ports.

    A method is made as `Method(config, placement, layer, generator)`: one module for one placement, where `layer`
    is the layer's number through all stacks and `generator` draws the initial weights (None: the global one).
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Config]]
    presets: ClassVar[dict[str, Config]]
    aliases: ClassVar[dict[str, str]] = {}
    """Older names of presets, found in existing checkpoints."""

    @classmethod
    @abstractmethod
    def placements(cls, config: Any, sites: Sites) -> list[Placement]:
        """Every module this configuration asks for. Raises `ConfigError` if a wish matches nothing."""

    # What a method claims: the tests hold it to this, on every architecture

    always_starts_at_base: ClassVar[bool] = False
    """What `starts_at_base` says where it does not depend on the configuration."""

    always_merges: ClassVar[bool] = False
    """Whether no configuration has an obstacle to merging."""

    @classmethod
    def starts_at_base(cls, config: Any) -> bool:  # noqa: ARG003  overriding methods read it
        """Whether training starts exactly at the base model: initial weights change no bit of its output."""
        return cls.always_starts_at_base

    @classmethod
    def sees_whole_sequences(cls, config: Any) -> bool:
        """Whether a token's result depends on all tokens of its sequence, as that of a `sequence_gate` does.

        Such a method does not give the same with a cache as without, and tokens cannot be taken apart.
        """
        return bool(getattr(config, "use_gating", False))

    @classmethod
    def obstacle_to_merge(cls, config: Any) -> str:  # noqa: ARG003  overriding methods read it
        """What of a configuration is no change of the base's parameters; empty if merging it is exact."""
        return "" if cls.always_merges else f"the method `{cls.name}`"

    @classmethod
    def obstacle_to_block(cls, config: Any, placement: Placement, block: str) -> str:  # noqa: ARG003  as above
        """The rule by which a composition block, such as `Fuse`, has no meaning for a module; empty if it has one."""
        if block == "Fuse" and placement.port != "sublayer":
            return "A `Fuse` combines what bottlenecks add to a sum"
        if block in _CUTTING and placement.port in ("weight", "parameter"):
            return "A weight is one for all rows of a batch"
        return ""

    @classmethod
    def formula(cls, config: Any, placement: Placement) -> str:  # noqa: ARG003  as above
        """What a module makes of what its port gives it, for people to read; empty where the proof of a sum says it."""
        return ""

    def share(self, known: dict[Any, Any]) -> None:
        """Share parameters or buffers with the other modules of the adapter: a call of `tie` for each.

        Called once for every module of an adapter, in their order, with one mapping, empty at first.
        """

    def penalty(self) -> Tensor | None:
        """What is to be added to the loss while the module is trained; None for nothing."""
        return None


class SublayerMethod(AbstractMethod):
    """A method that plugs into `SublayerPort`."""

    @staticmethod
    @abstractmethod
    def fits(config: Any, site: Site) -> bool:
        """Whether a configuration is meant for sites like this one, whatever their layer."""

    @staticmethod
    @abstractmethod
    def wire(
        config: Any, x: Summable, h: Carry[Summable], norm: Callable[[Any], Any] | None, branch: Branch[Any]
    ) -> Carry[Any]:
        """The site output as a function of the stream, the branch output and the norm that follows the sum, if any.

        Must use nothing but `+`, `*` by an integer and calls, so that it runs on tensors and on symbols alike.
        """

    @staticmethod
    @abstractmethod
    def keeps_sum(config: Any) -> bool:
        """Whether the layer's own sum (and norm) is wanted after the adapter."""

    @staticmethod
    def reads_normed(config: Any) -> bool:  # noqa: ARG004  overriding methods read it
        """Whether the branch reads its input behind the norm before the layer's own branch, where there is one."""
        return False

    @staticmethod
    def circuit(config: Any, kind: Kind) -> Circuit:  # noqa: ARG004 - for those that have a choice
        """What `wire` is given at the sites of a kind."""
        return "own"


class LinearMethod(AbstractMethod):
    """A method that plugs into `LinearPort` and, where it says so, into `WeightPort`."""

    changes_input: bool = False
    """Whether `prepare` does anything."""

    reads_base: ClassVar[bool] = False
    """Whether `forward`, `effective` and `fold` are given what the base has; others get None."""

    signless: ClassVar[frozenset[str]] = frozenset()
    """The parameters that a negation leaves as they are."""

    shareable: ClassVar[frozenset[str]] = frozenset()
    """The parameters that several adapters may share, as those of several tasks do."""

    additive: ClassVar[frozenset[str]] = frozenset()
    """The parameters that are updates themselves, such as a bias that is added to the base's."""

    @classmethod
    def starts_from_base(cls, config: Any) -> bool:  # noqa: ARG003  overriding methods read it
        """Whether the initial weights are made of the base's, by `start`."""
        return False

    def start(self, base: Frozen) -> None:
        """Take the initial weights from the base."""
        raise TypeError(f"`{self.name}` does not start from the base")

    def prepare(self, inputs: Tensor) -> Tensor:
        """What a projection gets for its input (..., in)."""
        return inputs

    @abstractmethod
    def forward(self, inputs: Tensor, output: Tensor, base: Frozen | None = None) -> Tensor:
        """The new output (..., rows) of a projection, from its input (..., in) and its output (..., rows)."""

    @classmethod
    def changes(cls, config: Any, placement: Placement) -> frozenset[str]:  # noqa: ARG003  overriding methods read them
        """What a module changes of its projection: `input`, `output` or both."""
        return frozenset({"output"})

    @classmethod
    def formula(cls, config: Any, placement: Placement) -> str:  # noqa: ARG003  overriding methods read them
        """What a module makes of its projection `W u`, bias included, for people to read."""
        return "y = W u + A(u)"

    @classmethod
    def obstacle_on_weight(cls, config: Any) -> str:  # noqa: ARG003  overriding methods read it
        """What of a configuration needs the input or the output of a projection; empty if `effective` does it all."""
        return f"the method `{cls.name}`"

    def effective(self, weight: Tensor, base: Frozen | None = None) -> Tensor:
        """The new weight (rows, in) of a projection that a module applies itself, from the one that adapters before
        made of the frozen one."""
        raise TypeError(f"`{self.name}` has an obstacle on weights")

    # What is asked where adapters are merged into the base, or combined

    def fold(self, weight: Tensor, bias: Tensor | None, base: Frozen | None = None) -> tuple[Tensor, Tensor | None]:
        """The weight (rows, in) and bias (rows,) of the projection with the adapter in them."""
        raise TypeError(f"`{self.name}` has an obstacle to merging")

    @property
    def adds_bias(self) -> bool:
        """Whether `fold` needs a bias of the projection to write into."""
        return getattr(self, "bias", None) is not None

    @classmethod
    def combinations(cls, config: Any) -> tuple[str, ...]:  # noqa: ARG003  overriding methods read it
        """The ways to combine several adapters, beside the weighted sum of each parameter, that mean something."""
        return ()

    def update(self) -> Tensor | None:
        """What the adapter adds to the weight, or to a scale of one; None where it is no such thing."""
        return None

    def put_update(self, update: Tensor) -> None:
        """Make the adapter add this, or what is nearest to it."""
        raise TypeError(f"`{self.name}` has no update")

    def put_side_by_side(self, sources: Sequence[Any], weights: Sequence[float]) -> None:
        """Make the adapter, of at least the sum of their ranks, add the weighted sum of what others of its kind add."""
        raise TypeError(f"`{self.name}` has no rank")


class PrefixMethod(AbstractMethod):
    """A method that plugs into `PrefixPort`: keys and values that every query of one attention sees, whatever its
    position, beside those of the sequence."""

    reads_input: bool = False
    """Whether `forward` reads what the attention's queries are made of."""

    @abstractmethod
    def forward(self, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """The keys and the values, (1, P, features of all heads) each, or (B, P, ...) where samples differ.

        Argument: the input of the query projection, (B, L, D), for methods that read it.
        """

    @classmethod
    def obstacle_to_block(cls, config: Any, placement: Placement, block: str) -> str:
        if block == "Split":
            return "A prefix is seen by whole sequences, of which a `Split` has none"
        return super().obstacle_to_block(config, placement, block)


def seed_option() -> Any:
    """The field `init_weights_seed` of a configuration."""
    return option(None, "Seed of the initial weights; none takes the global generator.", at_least=0, at_most=2**32 - 1)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to`, which takes its time to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def linear(module: nn.Module, value: Tensor) -> Tensor:
    """`module(value)`, in the dtype of the module's weight.

    To call a module costs as much as a small map itself. So a plain `nn.Linear` is not called where nothing could see
    the call: no hook, no compiled form, and no `forward` in the instance, which is how accelerate brings weights in.
    """
    parameters: Mapping[str, Any] = module._parameters
    state = module.__dict__
    if (
        type(module) is nn.Linear
        and len(parameters) == 2  # else one of them is no parameter, for who knows what reason
        and not (state["_forward_hooks"] or state["_forward_pre_hooks"])
        and not (state["_backward_hooks"] or state["_backward_pre_hooks"] or _has_any_global_hook())  # type: ignore[no-untyped-call]
        and "forward" not in state
        and "_compiled_call_impl" not in state
    ):
        weight = parameters["weight"]
        return F.linear(in_dtype(value, weight.dtype), weight, parameters["bias"])
    own: Any = getattr(module, "weight", None)
    found: Tensor = module(value if own is None else in_dtype(value, own.dtype))
    return found


def sequence_gate(gate: nn.Module, z: Tensor, batch_dim: int) -> Tensor:
    """A gate of one number for each sample, the mean over its tokens: (B, L, D) -> (B, 1, 1) or, with B second,
    (L, B, D) -> (1, B, 1)."""
    open_: Tensor = torch.sigmoid(gate(z))
    tokens = tuple(dim for dim in range(z.dim() - 1) if dim != batch_dim)
    return open_.mean(dim=tokens, keepdim=True) if tokens else open_


def projection_gate(gate: nn.Module, inputs: Tensor, batch_dim: int) -> Tensor:
    """The `sequence_gate` of what a projection gets. Raises `SiteError` where its samples may lie in another dimension
    than those of its layer."""
    if is_turned(inputs):
        raise SiteError(
            f"A gate is a mean over the tokens of a sample, whose number is dimension {batch_dim}; got a transposed "
            f"tensor of shape {tuple(inputs.shape)} for the input of a projection, which may have it in the other one. "
            "Use `use_gating=False`, or leave this projection out of the adapter."
        )
    weight: Any = gate.weight
    return sequence_gate(gate, in_dtype(inputs, weight.dtype), batch_dim)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name, by transformers' names. Raises `ConfigError` for an unknown one.

    The common ones are plain functions: to call a module costs more than a small activation itself.
    """
    name = name.lower()
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    from transformers.activations import ACT2CLS, ACT2FN

    if name not in ACT2CLS:
        known = sorted({*_ACTIVATIONS, *ACT2CLS})
        raise ConfigError(f"`non_linearity` must be an activation by name; got {name!r}. Known: {', '.join(known)}.")
    found: nn.Module = ACT2FN[name]
    return found


def _unchanged(z: Tensor) -> Tensor:
    return z


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leakyrelu": F.leaky_relu,
    "linear": _unchanged,
}
