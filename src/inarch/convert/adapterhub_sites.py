"""Which site of this model a module of the library `adapters` belongs to."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..core.errors import StateError
from ..core.site import Kind, Site, Sites
from ..methods import layer_number
from .adapterhub_fused import are_stacked
from .adapterhub_names import TOWERS, Place, Tower


@dataclass(frozen=True, slots=True)
class Stack:
    """A tower of the reference and the sites of this model that it describes."""

    tower: Tower
    sites: tuple[Site, ...]

    def site(self, path: str, kind: Kind) -> Site | None:
        """The site of that kind in a layer, by the layer's path in the reference.

        None where there is none, or more than the reference could mean.
        """
        if "*" in self.tower.layers:  # where layers are counted in groups, the number alone does not tell which it is
            found = [site for site in self.sites if f".{site.layer_path}".endswith(f".{path}")]
        else:
            found = [site for site in self.sites if site.layer == int(path.rpartition(".")[2])]
        found = [site for site in found if site.role == kind]  # the first of its kind in its layer
        return found[0] if len(found) == 1 else None

    @property
    def kinds(self) -> set[Kind]:
        """The kinds of site that there are."""
        return {site.kind for site in self.sites}


@dataclass(frozen=True, slots=True)
class Stacks:
    """All of a model."""

    stacks: tuple[Stack, ...]
    numbers: dict[int, int]
    """The layer numbers of the reference, and ours."""

    def __iter__(self) -> Iterator[Stack]:
        return iter(self.stacks)

    def bottlenecks(self) -> Iterator[Place]:
        """The places of the bottlenecks that exist in this model."""
        for stack in self.stacks:
            yield from (place for place in stack.tower.bottlenecks.values() if place.kind in stack.kinds)

    def thirds_are_interleaved(self) -> bool:
        """Whether queries, keys and values are one projection, but do not lie one below the other."""
        return any(
            len(place.roles) > 1 and site.kind == place.kind and not are_stacked(site)
            for stack in self.stacks
            for place in stack.tower.linears.values()
            for site in stack.sites
        )

    def fused_paths(self) -> list[str]:
        """The projections that are queries, keys and values at once, by their paths in a layer."""
        return [path for stack in self.stacks for path, place in stack.tower.linears.items() if len(place.roles) > 1]

    def are_fused(self) -> bool:
        """Whether queries, keys and values are one projection."""
        return any(len(place.roles) > 1 for place in self.linears())

    def gates_are_fused(self) -> bool:
        """Whether the up-projection of an MLP is one with its gate."""
        return any(fused_with_gate(site) for stack in self.stacks for site in stack.sites)

    def deleted(self) -> tuple[str, ...]:
        """The roles of the branches that the reference deletes from this model."""
        roles = dict.fromkeys(stack.tower.deleted for stack in self.stacks)
        present = {site.role for stack in self.stacks for site in stack.sites}
        return tuple(role for role in roles if role in present)

    def linears(self) -> Iterator[Place]:
        """The places of the projections that exist in this model."""
        for stack in self.stacks:
            yield from (place for place in stack.tower.linears.values() if place.kind in stack.kinds)


def fused_with_gate(site: Site) -> bool:
    """Whether one projection of an MLP computes the gate and what is gated."""
    up, gate = site.projections.get("up", ()), site.projections.get("gate", ())
    return len(up) == len(gate) == 1 and up[0].path == gate[0].path


def known_towers(model_type: str, folder: object) -> tuple[Tower, ...]:
    """The towers of a model type. Raises `StateError` for one that is not in the table."""
    if model_type == "encoder-decoder":
        raise StateError(
            "An adapter is read where its modules have names of their own; got one of the model type "
            f"`encoder-decoder`, whose modules are those of two other models, at `{folder}`. Train the adapter anew."
        )
    towers = TOWERS.get(model_type)
    if towers is None:
        raise StateError(
            f"This version reads folders of the library `adapters` for {len(TOWERS)} model types, and those with an "
            f"interface; got `{model_type}` at `{folder}`. Known: {', '.join(sorted(TOWERS))}."
        )
    return towers


def match_stacks(towers: tuple[Tower, ...], sites: Sites, folder: object) -> Stacks:
    """The stacks of this model beside the names they have in the reference.

    Raises `StateError` where a model does not have what an adapter of it was made for.
    """
    names = list(sites.num_layers)
    chosen = [
        next((name for name in names if name.startswith(tower.modality)), None)
        if tower.modality
        else (names[place] if place < len(names) else None)
        for place, tower in enumerate(towers)
    ]
    for tower, name in zip(towers, chosen, strict=True):
        _check_deleted(tower, [site for site in sites if site.stack == name], folder)
    stacks = [
        Stack(tower, tuple(site for site in sites if site.stack == name))
        for tower, name in zip(towers, chosen, strict=True)
    ]
    numbers: dict[int, int] = {}
    offset = 0
    for stack, name in zip(stacks, chosen, strict=True):
        numbers |= {offset + site.layer: layer_number(site, sites) for site in stack.sites}
        offset += sites.num_layers.get(name or "", 0)
    return Stacks(tuple(stacks), numbers)


def _check_deleted(tower: Tower, sites: list[Site], folder: object) -> None:
    """Raise `StateError` where what remains of a layer after the deletion is not what the reference makes of it."""
    if tower.deleted in {site.role for site in sites}:
        for site in sites:
            if site.role == "mlp" and site.post_norm is None:
                raise StateError(
                    f"Where the library `adapters` deletes a branch (`{tower.deleted}`), adapters are read if that "
                    f"branch starts from the norm of the sum before it; got a sum without norm at `{site.key}` for "
                    f"`{folder}`. Use a base model with `ln_before_adapter=True`, or train the adapter anew."
                )
