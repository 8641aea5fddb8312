"""The smallest changes of a configuration that clear a finding, found by search; every candidate is checked again."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.config import Config
from ..core.errors import ConfigError
from ..core.site import Site
from ..methods import AdapterConfig, method_of
from .proof import Proof, prove

WIRING: dict[str, tuple[Any, ...]] = {
    "residual_before_ln": (True, False),
    "original_ln_after": (True, False),
    "original_ln_before": (True, False),
    "adapter_residual_before_ln": (False,),
    "ln_after": (False,),
    "is_parallel": (False,),
}
"""The fields that decide a wiring, with the values a repair may give them."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Fields of one method's configuration to change, and what the first site concerned computes then."""

    method: str
    changes: tuple[tuple[str, Any], ...]
    formula: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.changes)

    def apply(self, config: AdapterConfig) -> AdapterConfig:
        """The configuration with the changes made."""
        return AdapterConfig(
            tuple(
                part.replace(**dict(self.changes)) if method_of(part).name == self.method else part
                for part in config.parts
            )
        )


def search(part: Config, edits: Mapping[str, Sequence[Any]], clears: Callable[[Config], bool]) -> list[dict[str, Any]]:
    """The smallest sets of changed fields with which `clears` holds: all those of the fewest changes, or none.

    **Arguments**: `edits` has, by field, the values it may be given; fields the configuration does not have are passed
    over.
    """
    fields = [name for name in edits if hasattr(part, name)]
    for distance in range(1, len(fields) + 1):
        found = [changes for changes in _changes(part, edits, fields, distance) if _holds(part, changes, clears)]
        if found:
            return found
    return []


def _changes(
    part: Config, edits: Mapping[str, Sequence[Any]], fields: list[str], distance: int
) -> Iterator[dict[str, Any]]:
    for changed in itertools.combinations(fields, distance):
        choices = [[value for value in edits[name] if value != getattr(part, name)] for name in changed]
        for values in itertools.product(*choices):
            yield dict(zip(changed, values, strict=True))


def _holds(part: Config, changes: dict[str, Any], clears: Callable[[Config], bool]) -> bool:
    try:
        return clears(part.replace(**changes))
    except ConfigError:
        return False


def wiring_repairs(sites: Sequence[Site], part: Config) -> list[Repair]:
    """The smallest changes of flags after which a method is sound at every one of these sites."""

    def sound(candidate: Config) -> bool:
        return all((proof := _prove(site, candidate)) is None or proof.sound for site in sites)

    unsound = [site for site in sites if (proof := _prove(site, part)) is not None and not proof.sound]
    if not unsound:
        return []
    repairs = []
    for changes in search(part, WIRING, sound):
        proof = _prove(unsound[0], part.replace(**changes))
        assert proof is not None
        repairs.append(Repair(method_of(part).name, tuple(changes.items()), str(proof.formula.adapted)))
    return repairs


def _prove(site: Site, part: Config) -> Proof | None:
    return prove(site, "a", {"a": AdapterConfig((part,))})
