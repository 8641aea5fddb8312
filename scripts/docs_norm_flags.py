"""Write docs/norm-flags.md and its figure from the records in docs/norm-flags/, which `scripts/norm_flags` makes.

    python scripts/docs_norm_flags.py [--check]

Nothing is trained. `--check` writes nothing and fails if the page is not what the records say.
"""

import json
import statistics
import textwrap
from collections.abc import Iterator

from norm_flags.analysis import LOST_POINTS, SOUND_POINTS, Study, joined, mean_points, overlap
from norm_flags.cli import EPOCHS, LEARNING_RATES, LOST, PRACTICE_SEEDS, REDUCTION_FACTORS, SOUND, with_reduction
from norm_flags.figure import draw, letters
from norm_flags.record import FOLDER, Record
from norm_flags.subjects import SUBJECTS
from norm_flags.texts import NUM_ALL, NUM_TRAINING
from norm_flags.trials import FIFTHS, HALVES, Fold, Judgement, Trial, flags_of
from pages import write_or_check

from inarch.train.demo import RECIPE

PAGE, FIGURE = FOLDER.parent / "norm-flags.md", FOLDER.parent / "norm-flags.png"

HEAD = """# Three flags that decide whether an adapter can learn

A bottleneck adapter after the MLP has three flags for where it meets the layer's sum and norm: `original_ln_before`,
`original_ln_after` and `residual_before_ln`. All eight combinations run without an error. On a pre-norm model three
of them lose the skip connection of every layer and one doubles it. inarch says which before anything is trained, from
the formula that runs; this page sets what it says against what training shows, on small backbones of several
arrangements.

This page is written by `scripts/docs_norm_flags.py` from the records in `docs/norm-flags/`.

![Accuracy of every training, by combination of flags and by backbone](norm-flags.png)

## The formulas

`x` is the stream that enters the branch, `h` what the branch adds to it, `A` the adapter's bottleneck. The layer
computed `y = x + h` (pre-norm, layer scale, norm on the branch) or `y = LN(x + h)` (post-norm). The adapter is given
the branch's output and works in three steps:

1. `original_ln_before` gives the bottleneck the sum, `z = x + h` (post-norm: `z = LN(x + h)`), and otherwise
   `h` alone.
2. What is added to the bottleneck's output is `h` where `residual_before_ln` is on, and `z` where it is off. Without
   `original_ln_before` the two are the same, and the flag does nothing.
3. `original_ln_after` makes the layer's own sum and norm from that: `x + ...` (post-norm: `LN(x + ...)`). Without it
   the result of step 2 is the output of the layer.

So somewhere, once, `x` must be added. Neither step 2 nor step 3 does so with *after* off and (*before* off or
*residual* on): `y = h + A(...)`, and everything below the layer reaches the next one through the branch alone. Both
do with all of *before* and *after* on and *residual* off: `y = 2x + h + A(x + h)`. On a post-norm model the same
combination computes `LN(x + LN(x + h) + A(...))`: `x` twice and the norm twice.
"""

METHOD = """## What was trained

| backbone | arrangement | around an MLP | data |
| --- | --- | --- | --- |
{rows}

Each is a demonstration backbone of this project, pre-trained by `scripts/backbones` on rendered letters, the last on
a made language, and frozen. The adapter is `seq_bn` with the flags given, trained together with a new head with the
recipe of `make demo`: {epochs} epochs, learning rate {rate:g} with warm-up and cosine, batches of {batch}. The digits
are scikit-learn's, 1,797; the titles are of as many documents in the made language, of ten topics that pre-training
did not have. Accuracy is that after the last epoch.

**What is held out.** Every example, once. They are divided in five parts, label by label, the same for all; with each
seed a configuration is trained five times, on four parts, and its accuracy is that on the parts it did not see, over
all 1,797. Of combinations with one formula one is trained, and stands in the rows of all: a measurement of all eight
had found them alike bit for bit.

This is the third measurement. The first held out 400 examples, as `make demo` does: one is 0.25 points there, and two
forms that are a point apart differ in so few of them that a tie is chance. The second held out every example once, in
two halves, so that three epochs were {halves} steps instead of the {demo} of `make demo`; with five parts they are
{fifths}. Before any training of the third was made it was decided that it would be this, once, for all four backbones
alike, with the recipe, seeds and criteria of the others. All three stand on this page.

One command each, which trains the unsound ones too, on purpose; a training takes some ten seconds on one core:

```sh
{commands}
```

On images `inarch sweep --study norm-flags --model backbones/dinov2 --data digits --output runs/flags` trains the eight
as the first measurement did. It takes any model that classifies images, and any data.
"""


def studies(folds: tuple[Fold | None, ...] = FIFTHS) -> list[Study]:
    """The study of each backbone that was trained with one seed at least."""
    return [study for name in SUBJECTS if (study := Study(name, Record.read(name), folds)).seeds]


def _steps(num_examples: int) -> int:
    """Of a training on so many."""
    return RECIPE.epochs * -(-num_examples // RECIPE.batch_size)


def page() -> str:
    """The whole page."""
    found, first, second = studies(), studies((None,)), studies(HALVES)
    practices = Record.read("practices")
    subjects = "\n".join(
        f"| {s.name} | {s.arrangement} | `{s.stream}` | {_DATA[s.data]} |"
        for s in (SUBJECTS[name] for name in SUBJECTS)
    )
    commands = "\n".join(f"python scripts/norm_flags {name}" for name in [*SUBJECTS, "practices"])
    method = METHOD.format(
        rows=subjects,
        epochs=RECIPE.epochs,
        rate=RECIPE.learning_rate,
        batch=RECIPE.batch_size,
        commands=commands,
        demo=_steps(NUM_TRAINING),
        halves=_steps(NUM_ALL // 2),
        fifths=_steps(NUM_ALL * 4 // 5),
    )
    parts = [
        HEAD,
        method,
        _summary(found),
        _same_input([first, second, found]),
        *(_section(study) for study in found),
        _earlier(first, second, found),
        _repairs(found),
        _practices(found, practices),
        _not_measured(found),
    ]
    return "\n".join(_filled(part.strip()) + "\n" for part in parts if part)


def _filled(text: str) -> str:
    """The text with its paragraphs and items wrapped anew: numbers are not all of one width."""
    return "\n\n".join(_blocks(text))


def _blocks(text: str) -> Iterator[str]:
    for block in text.split("\n\n"):
        if block.startswith(("|", "#", "```", "![")):
            yield block
            continue
        items: list[str] = []
        for line in block.split("\n"):
            if items and line[:2] not in ("1.", "2.", "3."):
                items[-1] += f" {line.strip()}"
            else:
                items.append(line.strip())
        yield "\n".join(
            textwrap.fill(
                one,
                120,
                subsequent_indent="   " if one[:2] in ("1.", "2.", "3.") else "",
                break_long_words=False,
                break_on_hyphens=False,
            )
            for one in items
        )


_DATA = {"digits": "handwritten digits", "titles": "documents of ten titles"}


# ----------------------------------------------------------------------------------------------------------------------
# The flags


def _summary(found: list[Study]) -> str:
    rows = "\n".join(_criteria(study) for study in found)
    return f"""## Proved and trained

A verdict is counted as right where training shows it: a sound combination is within {SOUND_POINTS:g} points of the
best one, one that lost the skip connection at least {LOST_POINTS:g} points behind the worst sound one, one that
doubled it behind its repaired form in every seed, whichever repair (so too the norm applied twice, its form on a
post-norm model). A pair is a seed and a function that a repair leads to.

{_COLUMNS}
{_RULE}
{rows}

Accuracies are those on {found[0].num_held_out:,} held-out examples, {100 / found[0].num_held_out:.2f} points each;
differences are in points.{_all_exceptions(found)}
"""


def _earlier(first: list[Study], second: list[Study], third: list[Study]) -> str:
    """The measurements with fewer examples held out or trained on; in the first, combinations of one formula apart."""
    twins = "\n".join(f"{_criteria(study)} {_twins(study)} |" for study in first)
    halves = "\n".join(_criteria(study) for study in second)
    counts = "\n".join(
        f"| {one.backbone} | {' | '.join(f'{study.num_agreeing} of 8' for study in of_backbone)} |"
        for of_backbone in zip(first, second, third, strict=True)
        for one in of_backbone[:1]
    )
    return f"""## The measurements before

**The first**: all eight combinations with {first[0].num_held_out} examples held out, by the same criteria.

{_COLUMNS} same function: apart by |
{_RULE} ---: |
{twins}

The last column is the largest difference in accuracy between two combinations of the same formula, over seeds, and
that of the loss on the held-out examples over seeds and epochs: combinations of one formula are one function, so they
must agree seed by seed.{_all_exceptions(first)}

**The second**: every example held out once, in two halves.

{_COLUMNS}
{_RULE}
{halves}

{_all_exceptions(second).strip()}

Right of the eight in each:

| backbone | first, {first[0].num_held_out} held out | second, halves | third, fifths |
| --- | ---: | ---: | ---: |
{counts}
"""


_COLUMNS = "| backbone | seeds | right | sound apart by | lost: behind by | doubled: behind in | by |"
_RULE = "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"


def _all_exceptions(found: list[Study]) -> str:
    return "".join(f" {text}" for study in found if (text := _exceptions(study)))


def _same_input(measurements: list[list[Study]]) -> str:
    """Of what misses in the last measurement, the pairs in which nothing but the wiring of the sum is repaired."""
    said = []
    for studies_of in zip(*measurements, strict=True):
        last = studies_of[-1]
        for one in _doubled(last):
            fixes = [fix for fix in one.fixes if flags_of(fix)[0] != flags_of(one.adapter)[0]]
            if last.agrees(one) or not fixes:
                continue
            gaps = [study.gaps(one, same_input=True) for study in studies_of]
            counts = ", ".join(f"{sum(gap > 0 for gap in row)} of {len(row)}" for row in gaps)
            other, kept = letters(fixes[0]), max(last.sound, key=last.mean)
            weaker = last.mean(kept) - last.mean(fixes[0])
            said.append(
                f"**What that miss is.** {other} repairs the sum and gives the adapter another input too, `h` alone; "
                f"sound as it is, on {last.backbone} it is the weaker adapter, {weaker:.1f} points behind "
                f"{letters(kept)}. Where only the wiring is repaired, {letters(one.adapter)} is behind in {counts} "
                f"pairs of the first, second and third measurement, in the third by {statistics.fmean(gaps[-1]):.1f} "
                f"points on average and {min(gaps[-1]):.1f} at least."
            )
    return "\n\n".join(said)


def _twins(study: Study) -> str:
    accuracy, loss = study.twin_difference()
    return f"{accuracy:.1f}; {_small(loss)}"


def _criteria(study: Study) -> str:
    lost = [study.behind(one.adapter) for one in study.verdicts("skip connection lost")]
    gaps = [gap for one in _doubled(study) for gap in study.gaps(one)]
    higher = sum(map(study.num_higher_losses, _doubled(study)))
    doubled = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)} pairs (in loss {higher}) | {statistics.fmean(gaps):.1f}"
    return (
        f"| {study.backbone} | {len(study.seeds)} | {study.num_agreeing} of {len(study.judgements)} | "
        f"{study.spread:.1f} | "
        f"{min(lost):.1f} to {max(lost):.1f} | {doubled} |"
    )


def _small(value: float) -> str:
    return f"{value:.0e}" if value else "0, bit for bit"


def _doubled(study: Study) -> list[Judgement]:
    return study.verdicts("skip connection doubled", "norm applied twice")


def _section(study: Study) -> str:
    subject = SUBJECTS[study.backbone]
    rows = "\n".join(
        f"| {letters(one.adapter)} | `{one.formula}` | {one.verdict} | {study.mean(one.adapter):.1f} | "
        f"{' '.join(f'{value:.1f}' for value in study.points(one.adapter))} | {'yes' if study.agrees(one) else 'NO'} |"
        for one in study.judgements
    )
    return f"""### {study.backbone}: {subject.arrangement}

| before, after, residual | with the adapter | verdict before training | accuracy, % | by seed | as proved |
| --- | --- | --- | ---: | --- | --- |
{rows}

A new head alone: {study.mean(None):.1f} % ({" ".join(f"{value:.1f}" for value in study.points(None))}).
"""


def _exceptions(study: Study) -> str:
    missed = [one for one in study.judgements if not study.agrees(one)]
    return " ".join(_exception(study, one) for one in missed)


def _exception(study: Study, one: Judgement) -> str:
    name = f"**On {study.backbone}, {letters(one.adapter)} misses the criterion**"
    if one.verdict == "skip connection lost":
        return f"{name}: it is {study.behind(one.adapter):.1f} points behind, not {LOST_POINTS:g}."
    if one.verdict == "preserved":
        return f"{name}: it is {study.best - study.mean(one.adapter):.1f} points from the best, not {SOUND_POINTS:g}."
    gaps, size = study.gaps(one), len(study.seeds)
    repaired = {study.trained_as(fix): fix for fix in reversed(one.fixes)}  # by function; the first of each names it
    behind = ", ".join(
        f"{letters(fix)} in {sum(gap > 0 for gap in gaps[size * number :][:size])}"
        for number, fix in enumerate(reversed(repaired.values()))
    )
    return (
        f"{name}: of {size} seeds it is behind {behind}. The smallest gap is {min(gaps):.2f} points; an example is "
        f"{100 / study.num_held_out:.2f}, and the sound forms themselves are {study.spread:.1f} apart. Its held-out "
        f"loss is the higher one in {study.num_higher_losses(one)} of {len(gaps)} pairs."
    )


def _repairs(found: list[Study]) -> str:
    rows, gaps = [], []
    for study in found:
        for one in study.judgements:
            if one.fixes:
                fixes = ", ".join(f"{letters(fix)}: {study.mean(fix):.1f}" for fix in one.fixes)
                rows.append(f"| {study.backbone} | {letters(one.adapter)} | {study.mean(one.adapter):.1f} | {fixes} |")
                gaps += [study.best - study.mean(fix) for fix in one.fixes]
    table = "\n".join(rows)
    return f"""## The proposed repairs

For each unsound combination `inarch check` proposes the smallest changes of the flags, found by search and proved
again, and `inarch check --fix` applies them. Each leads to one of the eight, so its trainings are those of the tables
by backbone.

| backbone | unsound | accuracy, % | repaired, with accuracy, % |
| --- | --- | ---: | --- |
{table}

All {len(gaps)} repairs train: none is more than {max(gaps):.1f} points from the best of its backbone. On the ViT
`residual_before_ln=False` and `original_ln_after=True` repair T F T equally: both give `y = x + h + A(x + h)`. On
BERT both are sound, but the first is `LN(x + h) + A(LN(x + h))`, the second `LN(x + h + A(LN(x + h)))`.
"""


# ----------------------------------------------------------------------------------------------------------------------
# The practices


def _practices(found: list[Study], practices: Record) -> str:
    vit = next(study for study in found if study.backbone == "vit")
    every = joined([vit.record, practices])
    apart = _seeds_apart(vit.record)
    parts = [_rule(found), _reduction(every, apart), _rates(every, apart), _epochs(every), _early(found)]
    head = (
        "Where nothing else is said, measured on the ViT with one seed and 400 held-out images: one is 0.25 points. "
        f"Three seeds of T T T are {apart:.1f} points apart."
    )
    return "\n\n".join(["## The recipe's best practices", head, *(part.strip() for part in parts)])


def _seeds_apart(record: Record) -> float:
    """Between the best and the worst seed of the sound form on the ViT with 400 images held out."""
    points = Study("vit", record, (None,)).points(SOUND)
    return max(points) - min(points)


def _has(every: Record, **changes: float) -> bool:
    """Whether the sound and the unsound form were trained with these changes of the recipe."""
    recipe = {"epochs": RECIPE.epochs, "learning_rate": RECIPE.learning_rate} | changes
    trials = [Trial(backbone="vit", adapter=c, seed=s, **recipe) for c in (SOUND, LOST) for s in PRACTICE_SEEDS]
    return all(trial in every.outcomes for trial in trials)


def _on_vit(every: Record, adapter: str, **changes: float) -> float:
    """The mean accuracy on the ViT with the recipe, but for these changes of it."""
    recipe = {"epochs": RECIPE.epochs, "learning_rate": RECIPE.learning_rate}
    return mean_points(every, PRACTICE_SEEDS, backbone="vit", adapter=adapter, **(recipe | changes))


def _rule(found: list[Study]) -> str:
    both_off = [s.behind(one.adapter) for s in found for one in s.judgements if letters(one.adapter)[:3] == "F F"]
    kept = [s.behind(one.adapter) for s in found for one in s.judgements if letters(one.adapter) == "T F T"]
    freed = [s.best - s.mean(one.adapter) for s in found for one in s.judgements if letters(one.adapter) == "T F F"]
    twice = [gap for s in found for one in _doubled(s) for gap in s.gaps(one)]
    behind = sum(gap > 0 for gap in twice)
    return f"""### At least one of before and after on; after off needs residual off

**Supported, and incomplete.** With neither on, `x` is lost: {min(both_off):.1f} to {max(both_off):.1f} points behind,
over the backbones. With *before* on, *after* off and *residual* on it is lost too: {min(kept):.1f} to
{max(kept):.1f} points behind; with *residual* off it is kept, within {max(freed):.1f} points of the best. But
*before* on, *after* on, *residual* off obeys both sentences and adds `x` twice: behind its repaired form in {behind}
of {len(twice)} pairs of runs, by {sum(twice) / len(twice):.1f} points on average and {max(twice):.1f} at most. The
whole rule, on all arrangements: sound are *before* off with *after* on, and *before* on with *after* and
*residual* alike.
"""


def _reduction(every: Record, apart: float) -> str:
    means, rows = {}, []
    for factor in sorted((*REDUCTION_FACTORS, 16)):
        config = SOUND if factor == 16 else with_reduction(factor)
        size = next(one.parameters for one in every.judgements if one.adapter == config)
        means[factor] = _on_vit(every, config)
        rows.append(f"| {factor} | {size:,} | {means[factor]:.1f} |")
    best = max(means, key=lambda factor: means[factor])
    short = max(means.values()) - max(means[16], means[32])
    table = "\n".join(rows)
    told = "less" if short < apart else "more"
    verdict = "Neither supported nor contradicted" if short < apart else "Contradicted here"
    return f"""### Reduction factor 16 or 32

| reduction factor | adapter parameters | accuracy, % |
| ---: | ---: | ---: |
{table}

**{verdict}**: the better of 16 and 32 is {short:.1f} points from the best, which is {best}, and that is {told} than
seeds differ. The width of the
bottleneck is the model's divided by the factor, so **a smaller factor makes the adapter larger**; advice to lower the
factor for fewer parameters is backwards. This backbone is 128 wide: 64 leaves a bottleneck of 2.
"""


def _rates(every: Record, apart: float) -> str:
    rates = [rate for rate in sorted({*LEARNING_RATES, RECIPE.learning_rate}) if _has(every, learning_rate=rate)]
    means = {rate: [_on_vit(every, config, learning_rate=rate) for config in (SOUND, LOST)] for rate in rates}
    table = "\n".join(f"| {rate:g} | {sound:.1f} | {lost:.1f} |" for rate, (sound, lost) in means.items())
    best = max(rates, key=lambda rate: means[rate][0])
    near = min(rates, key=lambda rate: abs(rate - 1e-3))
    short = means[best][0] - means[near][0]
    verdict = "Right in size" if short < apart else "Not the best here"
    told = "less" if short < apart else "more"
    gap = min(sound - lost for rate, (sound, lost) in means.items() if sound > 90)
    return f"""### Learning rate 1e-3

| learning rate | T T T, % | T F T (skip lost), % |
| ---: | ---: | ---: |
{table}

**{verdict}**: with {RECIPE.epochs} epochs {near:g} is {short:.1f} points behind the best, {best:g}, which is {told}
than seeds differ, and ahead of {rates[0]:g} by {means[near][0] - means[rates[0]][0]:.1f}. None of these rates
repairs a lost skip connection: wherever the sound form exceeds 90 %, the other is at least {gap:.1f} points behind.
"""


def _epochs(every: Record) -> str:
    counts = [count for count in sorted({*EPOCHS, RECIPE.epochs}) if _has(every, epochs=count)]
    if len(counts) < 2:
        return "### More epochs\n\nNot measured yet: `python scripts/norm_flags practices` goes on with it."
    means = {count: [_on_vit(every, config, epochs=count) for config in (SOUND, LOST)] for count in counts}
    table = "\n".join(f"| {n} | {sound:.1f} | {lost:.1f} | {sound - lost:.1f} |" for n, (sound, lost) in means.items())
    first, last = means[counts[0]], means[counts[-1]]
    closes = first[0] - first[1] > last[0] - last[1]
    return f"""### More epochs

| epochs | T T T, % | T F T (skip lost), % | gap, points |
| ---: | ---: | ---: | ---: |
{table}

**{"Supported" if last[0] > first[0] else "Not supported here"}**: from {counts[0]} to {counts[-1]} epochs the sound
form gains {last[0] - first[0]:.1f} points.{_epochs_by_seed()} It is no cure: {_closing(closes, first, last)}
"""


def _epochs_by_seed() -> str:
    """What the demonstration's record says of the same two trainings with three seeds."""
    both = json.loads((FOLDER.parent / "demo.json").read_text(encoding="utf-8"))
    short, longer = ([100 * value for value in both[key]["seq_bn"]["seeds"].values()] for key in ("short", "longer"))
    whole = "whichever seeds are compared" if min(longer) > max(short) else "in the mean"
    return (
        f" The demonstration (`docs/demo.json`) has both with {len(short)} seeds: {statistics.fmean(longer):.1f} % "
        f"after {both['longer']['recipe']['epochs']} epochs, {statistics.fmean(short):.1f} % after "
        f"{both['short']['recipe']['epochs']}, and more is better {whole}."
    )


def _closing(closes: bool, first: list[float], last: list[float]) -> str:
    if not closes:
        return f"the lost skip connection stays {last[0] - last[1]:.1f} points behind."
    return (
        f"the gap closes, from {first[0] - first[1]:.1f} to {last[0] - last[1]:.1f} points, because a backbone this "
        "small can be learned anew through its adapters. That is why this study trains briefly; how it is with a large "
        "model was not measured."
    )


def _early(found: list[Study]) -> str:
    rows, apart, doubled_apart = [], 0, 0
    for study in found:
        sound = [run.training_losses[0] for adapter in study.sound for run in study.runs(adapter)]
        lost = [
            run.training_losses[0] for one in study.verdicts("skip connection lost") for run in study.runs(one.adapter)
        ]
        doubled = [run.training_losses[0] for one in _doubled(study) for run in study.runs(one.adapter)]
        apart += not overlap(sound, lost)
        doubled_apart += not overlap(sound, doubled)
        rows.append(f"| {study.backbone} | {_range(sound)} | {_range(doubled)} | {_range(lost)} |")
    table = "\n".join(rows)
    whole = apart == len(found)
    return f"""### Watch the early loss

Mean training loss of the first epoch, smallest and largest over combinations and seeds:

| backbone | sound | doubled | skip lost |
| --- | ---: | ---: | ---: |
{table}

**{"Supported" if whole else "Supported in part"}**: on {apart} of {len(found)} backbones every run that lost the skip
connection has a higher loss in its first epoch than every sound run; of those that doubled it, the same holds on
{doubled_apart}. It needs a sound run to compare with, and it
does not say what is wrong; the formula does both before the first step.
"""


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _not_measured(found: list[Study]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found[0].record.versions.items())
    return f"""## What was not measured

The case that started this is ViT-B/16, pre-trained on ImageNet-21k, on 10,000 images of CIFAR-100; it was not run
here, for want of its weights and data. These backbones have about a million parameters or less and six layers, their
tasks ten classes. Nothing here says how far behind a large model stays, nor that it catches up. The adapters stand
after the MLP; what the flags do after the attention, or in other adapters, was proved and set against measured outputs
(`docs/validation.md`), not trained. The practices were varied one at a time, on one backbone and one task.

Where the Hub can be reached:

```sh
inarch sweep --study norm-flags --output runs/norm-flags --model google/vit-base-patch16-224-in21k \\
    --data cifar-100-python.tar.gz --num-train 10000 --epochs 10 --learning-rate 1e-3
```

`--num-train 10000` takes as many of the 50,000 images to train on, each of the 100 labels in its share, and accuracy
is that on the archive's own 10,000 test images. A test runs this command with a tiny model and archive.

Measured with {versions}, on a CPU with one thread.
"""


def main() -> None:
    """Write the page and the figure, or compare the page."""
    if write_or_check(PAGE, page, script="docs_norm_flags.py", documentation=__doc__):
        draw(studies(), FIGURE)


if __name__ == "__main__":
    main()
