"""The model as the page draws it: stacks of layers, each with its sites, what is grafted there, and the formula."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.records import SiteRecord
from ..core.table import layers
from .entries import Entry

_ROLES = {"self_attention": "self-attention", "cross_attention": "cross-attention", "mlp": "MLP", "mixer": "mixer"}
_ARRANGEMENTS = {
    "pre": "norm before the branch",
    "post": "norm after the sum",
    "sandwich": "norms before the branch and on its output",
    "branch": "norm on the branch's output",
    "none": "no norm",
}


@dataclass(frozen=True, slots=True)
class Graft:
    """One model with its adapters, and the runs that have it so."""

    entries: tuple[Entry, ...]
    model_class: str
    stacks: tuple["Stack", ...]

    @property
    def title(self) -> str:
        return self.entries[0].configuration


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of one tower."""

    name: str
    layer_class: str
    width: int
    layers: tuple["Layer", ...]
    groups: tuple[tuple[str, "SiteView"], ...]
    """Equal sites: their layers in words, and one of them."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer with its sites, in the order in which they run."""

    number: int
    sites: tuple["SiteView", ...]


@dataclass(frozen=True, slots=True)
class SiteView:
    """One site as it is shown."""

    key: str
    label: str
    record: SiteRecord

    @property
    def state(self) -> str:
        """`plain` without an adapter, `kept` or `lost`."""
        if not self.record.modules:
            return "plain"
        return "kept" if self.record.verdict in ("", "preserved") else "lost"

    @property
    def badge(self) -> str:
        """The methods here, with the projections that they adapt."""
        roles: dict[str, list[str]] = {}
        for module in self.record.modules:
            roles.setdefault(module.method, []).append(module.role)
        return ", ".join(" ".join([method, *filter(None, dict.fromkeys(found))]) for method, found in roles.items())

    @property
    def formulas(self) -> list[str]:
        """What it computes with the adapter."""
        found = [self.record.adapted] if self.record.adapted else []
        found += [f"{module.role}: {module.formula}" for module in self.record.modules if module.formula]
        return list(dict.fromkeys(found)) or ["y = x + h" if not self.record.modules else "not told"]

    @property
    def parameters(self) -> int:
        """Of all adapters at this site."""
        return sum(module.parameters for module in self.record.modules)

    @property
    def arrangement(self) -> str:
        return _ARRANGEMENTS.get(self.record.arrangement, self.record.arrangement)


def grafts(entries: Sequence[Entry]) -> list[Graft]:
    """Every different model of the runs; older records of runs without an adapter have no sites."""
    found: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        if entry.sites:
            found.setdefault((entry.model_class, entry.sites), []).append(entry)
    return [
        Graft(tuple(same), same[0].model_class, tuple(_stacks(sites)))
        for (_, sites), same in found.items()
        if isinstance(sites, tuple)
    ]


def _stacks(sites: Sequence[SiteRecord]) -> list[Stack]:
    # A role has its place in a layer from where it first occurs, whatever is grafted in some of the layers.
    order: dict[tuple[str, str], int] = {}
    for record in sites:
        order.setdefault((record.stack, record.role), len(order))
    stacks: dict[str, list[SiteRecord]] = {}
    for record in sites:
        stacks.setdefault(record.stack, []).append(record)
    return [
        Stack(
            name=name,
            layer_class=", ".join(dict.fromkeys(record.layer_class for record in records)),
            width=records[0].width,
            layers=tuple(
                Layer(
                    number,
                    tuple(
                        SiteView(f"{name}.{number}.{record.role}", _label(record), record)
                        for record in sorted(records, key=lambda record: order[record.stack, record.role])
                        if number in record.layers
                    ),
                )
                for number in sorted({number for record in records for number in record.layers})
            ),
            groups=tuple(
                (layers(list(record.layers)), SiteView("", _label(record), record))
                for record in sorted(records, key=lambda record: (order[record.stack, record.role], record.layers))
            ),
        )
        for name, records in stacks.items()
    ]


def _label(record: SiteRecord) -> str:
    """The role in words; the second of its kind in a layer has a number."""
    number = record.role.rpartition("_")[2]
    return _ROLES.get(record.kind, record.kind) + (f" {number}" if number.isdigit() else "")
