"""Rules about which parts of the model an adapter reaches."""

from collections import defaultdict
from collections.abc import Iterator

from ...core.site import Site
from ...core.table import layers
from ...methods import layer_number
from ..facts import Facts
from ..findings import Finding, Level, rule

_FEW = 0.25

_MIXERS = ("self_attention", "mixer")


@rule("partial-reach", "warning")
def partial_reach(facts: Facts) -> Iterator[Finding]:
    """An adapter that changes token mixers reaches only some of those it could.

    In a hybrid model most mixers are no attention: LoRA on q and v of such a model reached 4 of 56 layers and the loss
    stayed at ln 2 (PEFT issue 3554). Layers that `leave_out` names are not counted. Below a quarter it is an error.
    """
    for name, config in facts.configs.items():
        reached = {m.placement.site.key for m in facts.plan.modules if m.adapter == name}
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
    """A tensor of an adapter gets no gradient, neither at the initial weights nor after all of them have moved.

    It cannot learn. Usual causes are a projection that is zero behind it, a stack whose output the model does not use,
    a branch that did not run on this batch, or an activation that is off for every token.
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
            f"`{tensor}` gets no gradient from a batch, at the initial weights or near them",
            advice="Leave these layers out with `leave_out`, or measure with `example_inputs` that reach them.",
        )
