"""What rules may read: the configuration and its proof; the model, its training and its data where they are known."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..compose import Setup
from ..core.site import Site, Sites
from ..core.table import layers
from ..methods import AdapterConfig, OutOfRange
from ..plan import Plan
from .proof import Proof


@dataclass(frozen=True, slots=True)
class SiteReport:
    """Equal sites, and the one proof that holds for all of them."""

    sites: tuple[Site, ...]
    proof: Proof
    case: str = ""
    """What of a setup the proof is about, where rows or tokens of a batch meet different adapters."""

    @property
    def place(self) -> str:
        """The sites in words: stack, role and layers, and the case."""
        return place(self.sites) + (f", {self.case}" if self.case else "")


def place(sites: tuple[Site, ...]) -> str:
    """Sites of one role in words: stack, role and layers."""
    first = sites[0]
    return f"{first.stack} {first.role}, {layers([site.layer for site in sites])}"


def places(groups: Iterable[SiteReport]) -> str:
    """Groups in words, those of one stack, role and case together."""
    alike: dict[tuple[str, str, str], list[Site]] = {}
    for group in groups:
        alike.setdefault((group.sites[0].stack, group.sites[0].role, group.case), []).extend(group.sites)
    return "; ".join(place(tuple(sites)) + (f", {case}" if case else "") for (_, _, case), sites in alike.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How an adapter is going to be trained, as far as rules ask."""

    learning_rate: float
    search: tuple[float, float] | None = None
    """The smallest and the largest learning rate that a study tries, if one is run."""
    optimizer: str = "adamw"
    """`adamw`, `adam`, `sgd`, ...; Adam-like ones take steps of about the learning rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What is known of the data: labels by id, and the pixel values of one batch as the model gets them."""

    labels: tuple[str, ...] | None = None
    label_ids: tuple[int, ...] | None = None
    """The ids that occur."""
    pixel_range: tuple[float, float] | None = None
    """Smallest and largest pixel value of a batch."""
    pixel_size: tuple[int, int] | None = None
    """Height and width of the images of a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What is known of the model's state, beside its sites."""

    num_labels: int | None
    labels: tuple[str, ...] | None
    """By id; None where they are transformers' placeholders."""
    image_size: tuple[int, int] | None
    head: tuple[str, ...]
    """Modules of the task head."""
    flexible_head: str
    """The name of that head, where it is a flexible one; empty for the model's own, for several, and for none."""
    random_frozen: tuple[str, ...]
    """Those modules that hold initial weights and are not trained."""
    adapter_trainable: int
    """Trainable parameters of the adapters."""
    base_trainable: tuple[str, ...]
    """Trainable parameters that are neither the adapters' nor the head's."""
    adapter_dtypes: tuple[str, ...]
    batch_norms_in_training: tuple[str, ...]
    dropouts_in_training: int
    in_training: bool
    """Whether the model is in train mode."""
    attached: bool
    """Whether the adapters judged are the model's own, and not a configuration on trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What one small batch shows."""

    drift: float
    """Relative change of the output by the adapter's initial weights, ||y' - y|| / ||y||."""
    gradients: Mapping[str, float]
    """By tensor of an adapter file: root mean square of its gradient at the initial weights."""
    dead: tuple[str, ...]
    """Tensors without a gradient, both at these weights and after a small change of those that get one."""
    growth: Mapping[str, float]
    """By stack: how much larger the last layer's output is with the adapter than without."""
    is_initial: bool = True
    """Whether the adapter has its initial weights, and not those of a stored one or of the model's own."""

    @property
    def reached(self) -> float:
        """Share of the adapter's tensors that a gradient reaches."""
        return 1 - len(self.dead) / len(self.gradients) if self.gradients else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What training takes beside the weights, in bytes."""

    activations: int
    """Kept for the backward pass of one batch."""
    optimizer: int
    """Gradients and AdamW's two moments of all trained parameters, the task head's included."""
    samples: int
    """Size of the batch."""
    is_measured: bool
    """Whether a real run was counted; else one on tensors without memory, whose kernels may keep other tensors."""
    device_peak: int | None = None
    """The most memory a CUDA device had allocated in that run, weights included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What is known of an adapter folder, beside its configuration and its weights."""

    difference: str = ""
    """How its base differs from the model, as a sentence; empty if nothing is known to differ."""
    base: str = ""
    """The base it names, where it keeps nothing by which to know it."""
    model: str = ""
    """The id or the place that the model itself came from."""
    head: str = ""
    """Why its task head does not fit the model."""
    idle: tuple[str, ...] = ()
    """What its settings name, and it holds nothing of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that is known."""

    sites: Sites
    setup: Setup
    configs: Mapping[str, AdapterConfig]
    plan: Plan
    groups: tuple[SiteReport, ...]
    model: ModelFacts | None = None
    training: Training | None = None
    data: Data | None = None
    evidence: Evidence | None = None
    memory: Memory | None = None
    stored: Stored | None = None
    """What is known of the folder that an adapter was read from."""
    unplaced: str = ""
    """Why a configuration asks for what the model does not have; the plan and the groups are empty then."""
    out_of_range: tuple[OutOfRange, ...] = ()
    """Numbers that their settings cannot take; `configs` has others in their place."""
