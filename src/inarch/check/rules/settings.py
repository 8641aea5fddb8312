"""Rules about single settings of a method."""

from collections.abc import Iterator
from typing import Any

from ...core.config import Config
from ...methods import layer_number, method_of
from ..facts import Facts, place
from ..findings import Finding, rule
from ..repair import Repair, search


def _parts(facts: Facts) -> Iterator[tuple[str, Config]]:
    for name, config in facts.configs.items():
        for part in config.parts:
            yield name, part


def _repairs(part: Config, edits: dict[str, tuple[Any, ...]], clears: Any) -> tuple[Repair, ...]:
    return tuple(Repair(method_of(part).name, tuple(changes.items())) for changes in search(part, edits, clears))


@rule("out-of-range", "error")
def out_of_range(facts: Facts) -> Iterator[Finding]:
    """A number with which an adapter cannot be, or cannot learn: a rank below 1, a dropout of 1, an alpha of 0.

    A dropout of 1 and an alpha of 0 leave nothing of the adapter, so no gradient reaches it, and only the task head
    learns. `add` refuses such a configuration with the same words. The rest is judged with what the preset has in
    its place.
    """
    for entry in facts.out_of_range:
        yield Finding(
            "out-of-range",
            "error",
            ", ".join(f"`{name}`" for name in facts.configs),
            entry.problem.rstrip("."),
            (Repair(entry.method, ((entry.field, entry.instead),)),),
        )


@rule("zero-scale", "error")
def zero_scale(facts: Facts) -> Iterator[Finding]:
    """The adapter's output is multiplied by zero.

    It changes nothing and no gradient reaches it: training runs, and only the task head learns.
    """
    for name, part in _parts(facts):
        if _is_zero(part):
            yield Finding(
                "zero-scale",
                "error",
                f"`{name}`",
                f"`scaling` multiplies the adapter by {getattr(part, 'scaling', 0)}, so it never learns",
                _repairs(part, {"scaling": (1.0,)}, lambda candidate: not _is_zero(candidate)),
            )


def _is_zero(part: Config) -> bool:
    scaling = getattr(part, "scaling", 1.0)
    return not isinstance(scaling, str) and scaling == 0


@rule("too-wide", "warning")
def too_wide(facts: Facts) -> Iterator[Finding]:
    """The bottleneck or the rank is at least as large as what it bottlenecks.

    A matrix of rank r >= the smaller side of a projection is no longer low rank: it costs more than the full update it
    stands for and can express no more. A smaller `reduction_factor` makes the bottleneck larger.
    """
    for name, part in _parts(facts):
        wide = [(site_width, inner, placement) for placement, site_width, inner in _widths(facts, part)]
        wide = [entry for entry in wide if entry[1] >= entry[0]]
        if wide:
            width, inner, placement = wide[0]
            field = "reduction_factor" if hasattr(part, "reduction_factor") else "r"
            value = 16.0 if field == "reduction_factor" else max(1, min(8, width // 4))
            yield Finding(
                "too-wide",
                "warning",
                place((placement.site,)),
                f"`{name}` has an inner width of {inner} where the model has {width}, at {len(wide)} places",
                (Repair(method_of(part).name, ((field, value),)),),
            )


@rule("one-unit", "warning")
def one_unit(facts: Facts) -> Iterator[Finding]:
    """`reduction_factor` exceeds the width of a site, and the bottleneck is held at one unit.

    The factor divides the width; beyond the width it asks for less than one unit.
    """
    for name, part in _parts(facts):
        factor = getattr(part, "reduction_factor", None)
        if not isinstance(factor, int | float):
            continue
        narrow = [placement for placement, width, _ in _widths(facts, part) if factor > width]
        if narrow:
            width = narrow[0].site.width
            yield Finding(
                "one-unit",
                "warning",
                place((narrow[0].site,)),
                f"`{name}` divides a width of {width} by {factor:g}, less than one unit; it gets one",
                (Repair(method_of(part).name, (("reduction_factor", 16.0 if width >= 16 else float(width)),)),),
            )


def _widths(facts: Facts, part: Config) -> Iterator[tuple[Any, int, int]]:
    """Every placement of a method with the width of what it adapts and its own inner width, where it has one."""
    for placement in method_of(part).placements(part, facts.sites):
        site = placement.site
        if hasattr(part, "bottleneck_width"):
            yield placement, site.width, part.bottleneck_width(site.width, layer_number(site, facts.sites))
        elif hasattr(part, "rank") and placement.port == "linear":
            projection = placement.projection
            yield placement, min(projection.in_features, projection.num_rows), part.rank(placement)


# ------------------------------------------------------------------------ steps

LARGEST_STEP = {"bottleneck": 0.032, "lora": 0.072}
"""Learning rate times scale from which bottleneck adapters, and times alpha from which LoRA, often fail to train."""

SMALLEST_RATE, USUAL_RATE = 2e-4, 1e-3


def step(part: Config, learning_rate: float) -> tuple[str, float] | None:
    """The kind of a method for this purpose, and the product that decides; None for other methods.

    An Adam step moves every weight by about the learning rate, and the adapter's output by its scale times that. For
    LoRA the scale is alpha / r over a sum of r terms that all move, hence alpha.
    """
    if hasattr(part, "alpha") and hasattr(part, "r"):
        return "lora", learning_rate * part.alpha
    scaling = getattr(part, "scaling", None)
    if scaling is None:
        return None
    return "bottleneck", learning_rate * (1.0 if isinstance(scaling, str) else abs(scaling))


@rule("large-step", "warning")
def large_step(facts: Facts) -> Iterator[Finding]:
    """The learning rate times the adapter's scale is where many trainings fail.

    Fitted on 4,076 labelled trainings of bottleneck adapters and LoRA on ViT-B/16, on 19 tasks (the sweeps of
    OSU-MLB/ViT_PEFT_Vision, arXiv 2409.16434); a training counts as failed if its accuracy is below half of the best of
    its task and method. Judged by limits that were fitted on the other tasks, the rule finds 85 % of the failed
    trainings of bottlenecks and 84 % of LoRA's; of the trainings it flags 37 % and 41 % failed. So it is a warning.
    `scripts/fit_step_rule.py` prints these figures.
    """
    if facts.training is None or not facts.training.optimizer.startswith("adam"):
        return
    rate = facts.training.learning_rate
    for name, part in _parts(facts):
        found = step(part, rate)
        if found is not None and found[1] >= LARGEST_STEP[found[0]]:
            kind, product = found
            factor = "alpha" if kind == "lora" else "scaling"
            yield Finding(
                "large-step",
                "warning",
                f"`{name}`",
                f"learning rate times {factor} is {product:.3g}; from {LARGEST_STEP[kind]:g} on many trainings fail",
                advice=f"Lower the learning rate to {rate * LARGEST_STEP[kind] / product / 5:.1g}, or `{factor}`.",
            )


@rule("small-rate", "warning")
def small_rate(facts: Facts) -> Iterator[Finding]:
    """The learning rate is one for full fine-tuning, far too low for adapters.

    The default of transformers' `TrainingArguments` is 5e-5, and its search space for Optuna ends at 1e-4. Adapters on
    ViT train best near 1e-3 (arXiv 2406.06820; 2409.16434). Of a study the highest rate that it tries counts.
    """
    if facts.training is None or not facts.training.optimizer.startswith("adam") or not facts.configs:
        return
    low, high = facts.training.search or (facts.training.learning_rate,) * 2
    if high < SMALLEST_RATE:
        is_study = facts.training.search is not None
        rates = f"a study of learning rates from {low:g} to {high:g}" if is_study else f"a learning rate of {high:g}"
        yield Finding(
            "small-rate",
            "warning",
            "the recipe",
            f"{rates} is one for full fine-tuning; adapters want about {USUAL_RATE / high:,.0f} times more",
            advice="Search from 0.0001 to 0.01." if is_study else "Set the learning rate to 0.001.",
        )
