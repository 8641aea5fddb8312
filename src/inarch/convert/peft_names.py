"""Which projections of a model a module path of a PEFT folder means.

PEFT names modules as the host library did when the adapter was made. Those names change: transformers 5 renamed the
modules of ViT, DINOv2, Swin, SegFormer and others, and PEFT itself no longer finds them. So a path is looked up, in
this order, as

    itself                        vit.layers.3.attention.q_proj
    a longer or a shorter one     layers.3.attention.q_proj, of the bare model
    what it says                  vit.encoder.layer.3.attention.attention.query: the numbers of the layer, whether it is
                                  of an attention or an MLP, and the role that modules of that name have

The last holds for the names that transformers has given to projections, in any release. It never splits what was one
projection: whether its rows lay as they do now, no name says. A path that names another tower (`text_model`), or the
other side of an encoder and decoder, means nothing here.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from ..core.site import Kind, Projection, Site, Sites
from ..methods import Placement

_ATTENTION_LEAVES: dict[str, tuple[str, ...]] = {
    "q": ("q", "query", "q_proj", "q_lin", "query_proj", "q_linear"),
    "k": ("k", "key", "k_proj", "k_lin", "key_proj", "k_linear"),
    "v": ("v", "value", "v_proj", "v_lin", "value_proj", "v_linear"),
    "o": ("o", "dense", "o_proj", "out_proj", "out_lin", "c_proj", "proj", "Wo", "o_linear"),
}
_MLP_LEAVES: dict[str, tuple[str, ...]] = {
    "up": ("up_proj", "fc1", "lin1", "wi", "wi_1", "c_fc", "fc_in", "dense_h_to_4h", "dense1", "linear1"),
    "gate": ("gate_proj", "wi_0"),
    "down": ("down_proj", "fc2", "lin2", "wo", "c_proj", "fc_out", "dense_4h_to_h", "dense2", "linear2"),
}
_PARENTS = {"intermediate": "up", "output": "down"}
"""What a map called `dense` does, by its parent."""
_TOWERS = {
    **dict.fromkeys(("text_model", "language_model"), ("text",)),
    **dict.fromkeys(("vision_model", "vision_tower", "visual"), ("image", "video", "data")),
}
"""What the stacks of a tower are called after, by its module's name."""
_SIDES = {"encoder", "decoder"}
_CROSS = ("cross", "encoder_attn", "encdec", "encoder_attention", "encoder_decoder")


def module_path(site: Site, projection: Projection) -> str:
    """The path of the module whose weight a projection is, from the root of the model."""
    inside = projection.weight.rpartition(".")[0]
    return site.absolute(".".join(part for part in (projection.path, inside) if part))


class Names:
    """The projections of one model by module path, in today's names and in older ones."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.paths: dict[str, list[Placement]] = defaultdict(list)
        """By module path, the roles that the module plays."""
        for site in sites:
            for role, projections in site.projections.items():
                for part, projection in enumerate(projections):
                    self.paths[module_path(site, projection)].append(
                        Placement(site=site, port="linear", role=role, part=part)
                    )

    def find(self, path: str) -> list[Placement]:
        """The projections that a path means: one, several of a fused module, or none."""
        if path in self.paths:
            return self.paths[path]
        around = [
            own
            for own, placements in self.paths.items()
            if (own.endswith(f".{path}") or path.endswith(f".{own}")) and not _is_elsewhere(path, placements[0].site)
        ]
        if len(around) == 1:
            return self.paths[around[0]]
        found = self._by_meaning(path)
        return [found] if found is not None else []

    def _by_meaning(self, path: str) -> Placement | None:
        meaning = _meaning(path)
        if meaning is None:
            return None
        kind, role = meaning
        numbers = _numbers(path)
        sites = [
            site
            for site in self.sites
            if site.role == kind  # the first of its kind in its layer
            and len(site.projections.get(role, ())) == 1
            and numbers[: len(own := _numbers(site.layer_path))] == own
            and not _is_elsewhere(path, site)
        ]
        best = _closest(path, sites)
        return Placement(site=best, port="linear", role=role) if best is not None else None


def _meaning(path: str) -> tuple[Kind, str] | None:
    """The kind of branch and the role that a name stands for; None where transformers gave a module no such name."""
    *parents, leaf = path.split(".")
    inside = ".".join(parents[_layer_end(parents) :]).lower()
    if "att" in inside:
        role = next((role for role, names in _ATTENTION_LEAVES.items() if leaf in names), None)
        kind: Kind = "cross_attention" if any(word in inside for word in _CROSS) else "self_attention"
        return None if role is None else (kind, role)
    if leaf == "dense":
        role = _PARENTS.get(parents[-1] if parents else "")
    else:
        role = next((role for role, names in _MLP_LEAVES.items() if leaf in names), None)
    return None if role is None else ("mlp", role)


def _is_elsewhere(path: str, site: Site) -> bool:
    """Whether a path names another tower, or another side of an encoder and decoder, than that of a site."""
    words, own = set(path.split(".")), set(site.layer_path.split("."))
    towers = [names for word, names in _TOWERS.items() if word in words]
    is_other_tower = bool(towers) and not any(site.stack.startswith(names) for names in towers)
    return is_other_tower or bool(words & _SIDES and own & _SIDES and not words & own & _SIDES)


def _layer_end(parents: list[str]) -> int:
    """Where the name of a layer ends: behind its first number."""
    return next((place + 1 for place, part in enumerate(parents) if part.isdigit()), 0)


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(part) for part in path.split(".") if part.isdigit())


def _closest(path: str, sites: Iterable[Site]) -> Site | None:
    """The site whose layer has the most words in common with a path; None where several are as close."""
    words = set(re.split(r"[._]", path))
    scored: dict[int, list[Site]] = defaultdict(list)
    for site in sites:
        scored[len(words & set(re.split(r"[._]", site.layer_path)))].append(site)
    best = scored[max(scored)] if scored else []
    return best[0] if len(best) == 1 else None
