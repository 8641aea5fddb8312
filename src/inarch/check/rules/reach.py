"""Rules about which parts of the model an adapter reaches."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ...core.config import Config
from ...core.site import Site, Sites
from ...core.table import layers
from ...methods import AdapterConfig, layer_number, method_of
from ...plan import plan
from ..facts import Facts
from ..findings import Finding, Level, rule
from ..repair import Repair, search

_FEW = 0.25

_MIXERS = ("self_attention", "mixer")


@rule("no-such-place", "error")
def no_such_place(facts: Facts) -> Iterator[Finding]:
    """A target, a layer or a pattern of the configuration matches nothing, or `leave_out` leaves nothing.

    Other libraries pass over what does not match, and train what is left, or the task head alone. `add` refuses such a
    configuration with the same words.
    """
    if not facts.unplaced:
        return
    for name, config in facts.configs.items():
        found = [repair for part in config.parts for repair in _placing(config, part, facts.sites)]
        yield Finding("no-such-place", "error", f"`{name}`", facts.unplaced.rstrip("."), tuple(found))


def _placing(config: AdapterConfig, part: Config, sites: Sites) -> Iterator[Repair]:
    """The smallest changes of one method after which the model has every place that is asked for."""
    roles = {role for site in sites for role in site.projections}
    layers = range(sum(sites.num_layers.values()))
    known = {site.role for site in sites}
    edits: dict[str, list[Any]] = {}
    for field, value in part.to_dict().items():
        if value is True:
            edits[field] = [False]
        elif field in ("leave_out", "leave_out_roles") and value:
            kept = [entry for entry in value if entry in (layers if field == "leave_out" else known)]
            edits[field] = [[] if kept == value else kept]
        elif field == "attn_matrices":
            edits[field] = [[role for role in value if role in roles]]
        elif field in ("rank_pattern", "alpha_pattern") and value:
            edits[field] = [{}]
        elif field in ("leave_out_projections", "input_matrices") and value:
            edits[field] = [[]]
        elif field == "dropout" and value:
            edits[field] = [0.0]

    def is_placed(candidate: Config) -> bool:
        parts = tuple(candidate if other is part else other for other in config.parts)
        plan(sites, {"adapter": AdapterConfig(parts)})  # raises where it is not, as `search` expects
        return True

    for changes in search(part, edits, is_placed):
        yield Repair(method_of(part).name, tuple(changes.items()))


@rule("matched-nothing", "warning")
def matched_nothing(facts: Facts) -> Iterator[Finding]:
    """The settings of a stored adapter name targets, or modules to be trained whole, that it holds nothing of.

    A misspelt name beside right ones is passed over by PEFT without a word: the adapter was trained without that part.
    """
    if facts.stored is not None and facts.stored.idle:
        yield Finding(
            "matched-nothing",
            "warning",
            ", ".join(f"`{name}`" for name in facts.configs),
            f"the folder's settings name what it has no tensors of: "
            f"{', '.join(f'`{entry}`' for entry in facts.stored.idle)}",
            advice="Train it anew if that was meant to be adapted.",
        )


@rule("partial-reach", "warning")
def partial_reach(facts: Facts) -> Iterator[Finding]:
    """An adapter that changes token mixers reaches only some of those it could.

    In a hybrid model most mixers are no attention: LoRA on q and v of such a model reached 4 of 56 layers and the loss
    stayed at ln 2 (PEFT issue 3554). Layers that `leave_out` names are not counted. Below a quarter it is an error.
    """
    for name, config in facts.configs.items():
        # What stands at the input changes all layers, though it lives at the site of one.
        own = [m.placement for m in facts.plan.modules if m.adapter == name]
        reached = {placement.site.key for placement in own if placement.port != "input"}
        left_out = {layer for part in config.parts for layer in getattr(part, "leave_out", ())}
        for stack, mixers in _mixers(facts, left_out).items():
            covered = [site for site in mixers if site.key in reached]
            if not covered or len(covered) == len(mixers):
                continue
            level: Level = "error" if len(covered) < _FEW * len(mixers) else "warning"
            missed = sorted({site.layer for site in mixers if site.key not in reached})
            kinds = ", ".join(sorted({site.kind for site in mixers if site.key not in reached}))
            yield Finding(
                "partial-reach",
                level,
                f"{stack}, {layers(missed)}",
                f"`{name}` reaches {len(covered)} of {len(mixers)} token mixers; those it misses are {kinds}",
                advice="Adapt the sum of every layer, as `double_seq_bn` does, or the MLPs too.",
            )


def _mixers(facts: Facts, left_out: set[int]) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = defaultdict(list)
    for site in facts.sites:
        if site.kind in _MIXERS and layer_number(site, facts.sites) not in left_out:
            found[site.stack].append(site)
    return found


@rule("dead-tensors", "error")
def dead_tensors(facts: Facts) -> Iterator[Finding]:
    """A tensor of an adapter gets no gradient, neither at the weights it has nor after the others have moved.

    It cannot learn. Usual causes are a projection that is zero behind it, two factors that are both zero, a stack whose
    output the model does not use, a branch that did not run on this batch, or an activation that is off everywhere.
    """
    if facts.evidence is None:
        return
    groups: dict[str, list[str]] = defaultdict(list)
    for key in facts.evidence.dead:
        stack, layer, rest = key.split(".", 2)
        groups[f"{stack} {rest}"].append(layer)
    for rest, numbers in groups.items():
        stack, _, tensor = rest.partition(" ")
        yield Finding(
            "dead-tensors",
            "error",
            f"{stack}, {layers([int(number) for number in numbers])}",
            f"`{tensor}` gets no gradient from a batch, at the weights it has or after the others have moved",
            advice="Leave these layers out with `leave_out`, or measure with `example_inputs` that reach them.",
        )
