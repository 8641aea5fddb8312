"""Train the demonstration backbone well and badly, and show what `inarch.Monitor` makes of the first steps.

    python scripts/monitor_trials.py train [WORD ...]   trains what build/monitor_trials.jsonl lacks, hours on one core
    python scripts/monitor_trials.py table              writes tests/fixtures/monitor_trials.csv from that file
    python scripts/monitor_trials.py page               writes docs/monitor.md from the table

With words, only trials whose names have all of them. Every trial is a real training on the digits. What became of it is
read from its end, by limits that were written down before the rule of the monitor was made:

    diverging     the loss is no number, or the last tenth of the steps has a mean training loss more than `WORSE` times
                  the entropy of the labels, and above that of the first two steps
    dead adapter  with the adapter's initial weights put back, the logits of the held-out images change by less than
                  `STILL` of their norm
    stalled       the score gains, over always guessing the commonest label, less than `SHARE` of what the trainings
                  with the recipe of the same family gain (the median of three seeds)
    learning      everything else

The limits of the rule were chosen on the families of `DESIGN`. What it got wrong on the others in the first round led
to its last change; what is reported first is how it does on a second round, whose ends had no part in it.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

import inarch
from inarch.data import load_data
from inarch.data.examples import Examples, ImageData
from inarch.train import prognosis
from inarch.train.folder import RunFolder
from inarch.train.image_trainer import make_trainer
from inarch.train.models import load_model, load_processor
from inarch.train.monitor import LATEST, prior_entropy
from inarch.train.monitor import SHARE as SHARE_OF_STEPS
from inarch.train.processes import Processes
from inarch.train.prognosis import AMPLE_STEP, FAILING, FEWEST, GAIN, LOW_STEP, Reading, Signs, Verdict, judge
from inarch.train.prognosis import WORSE as RULE_WORSE
from inarch.train.recipe import Recipe
from inarch.train.signs import HEAD

ROOT = Path(__file__).parent.parent
LOG = ROOT / "build" / "monitor_trials.jsonl"
TABLE = ROOT / "tests" / "fixtures" / "monitor_trials.csv"
PAGE = ROOT / "docs" / "monitor.md"
SOUND = "as it should be"
WORSE, STILL, SHARE = 1.1, 1e-4, 0.5
ROUND = 2
"""Of the trainings to come: the first round made the rule what it is. Who changes it once more begins another."""
RULE = hashlib.blake2b(Path(prognosis.__file__).read_bytes(), digest_size=8).hexdigest()
DESIGN = ("seq_bn", "lora")
RATE = 2e-3
BASE = Recipe(epochs=3, batch_size=32, learning_rate=RATE, warmup=0.1, schedule="cosine", device="cpu")

LOST = {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": True}
DOUBLED = {"original_ln_before": True, "original_ln_after": True, "residual_before_ln": False}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train, sound or not."""

    name: str
    broken: bool
    recipe: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    on_model: Callable[[nn.Module, Any], object] | None = None
    on_data: Callable[[ImageData], ImageData] | None = None
    on_processor: Callable[[Any], object] | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Trainings that are compared with each other."""

    name: str
    adapter: str | None
    fields: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    trains: str = "adapter"
    multi_label: bool = False


FAMILIES = (
    Family("seq_bn", "seq_bn"),
    Family("lora", "lora"),
    Family("double_seq_bn", "double_seq_bn"),
    Family("adapter_plus", "adapter_plus", {"reduction_factor": 16}),
    Family("par_bn", "par_bn", {"reduction_factor": 8}),
    Family("ia3", "ia3", {}, {"learning_rate": 1e-2}),
    Family("several labels", "seq_bn", {}, {}, multi_label=True),
    Family("longer", "seq_bn", {"reduction_factor": 8}, {"epochs": 6, "batch_size": 64}),
    Family("head", None, {}, {"learning_rate": 1e-2}, trains="head"),
    Family("full", None, {}, {"learning_rate": 5e-4}, trains="full"),
)


def shuffle_labels(images: ImageData) -> ImageData:
    """Give every training image the label of another."""
    targets = list(images.train.targets)
    random.Random(0).shuffle(targets)
    train = Examples(images.train.images, targets, images.train.num_labels)
    return dataclasses.replace(images, train=train)


def freeze_head(model: nn.Module, _: Any) -> None:
    """Leave the random head as it is."""
    model.classifier.requires_grad_(False)


def block_gradients(_: nn.Module, handle: Any) -> None:
    """No gradient reaches the adapter."""
    for parameter in handle["adapter"].values():
        parameter.register_hook(torch.zeros_like)


def zero_tensors(_: nn.Module, handle: Any) -> None:
    """All weights and biases of the adapter are 0."""
    for parameter in handle["adapter"].values():
        nn.init.zeros_(parameter)


def drown(_: nn.Module, handle: Any) -> None:
    """Biases so low that no unit of a rectifier is ever active."""
    for key, parameter in handle["adapter"].items():
        if key.endswith("down.bias"):
            nn.init.constant_(parameter, -20.0)


def forget(model: nn.Module, handle: Any) -> None:
    """A backbone with random weights."""
    own = {id(p) for p in handle["adapter"].values()} if handle is not None else set()
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in own:
            nn.init.normal_(parameter, std=0.02)


def unnormalised(processor: Any) -> None:
    """Pixels from 0 to 1, where the backbone expects -1 to 1."""
    processor.do_normalize = False


def raw(processor: Any) -> None:
    """Pixels from 0 to 255."""
    processor.do_normalize = processor.do_rescale = False


def dark(processor: Any) -> None:
    """Pixels scaled twice: all images are nearly the same."""
    processor.rescale_factor = processor.rescale_factor / 255


def ways(family: Family) -> list[Way]:
    """The ways in which a family is trained."""
    rate = family.recipe.get("learning_rate", RATE)
    lr = lambda factor: {"learning_rate": rate * factor}  # noqa: E731
    ways = [
        Way(SOUND, False),
        Way("a constant rate, no warm-up", False, {"schedule": "constant", "warmup": 0.0}),
        Way("half the rate", False, lr(0.5)),
        Way("rate / 30", True, lr(1 / 30)),
        Way("rate / 100", True, lr(1 / 100)),
        Way("rate x 100", True, lr(100)),
        Way("rate x 1000", True, lr(1000)),
        Way("labels shuffled", True, on_data=shuffle_labels),
        Way("images scaled twice", True, on_processor=dark),
    ]
    if family.name in ("seq_bn", "lora", "double_seq_bn", "adapter_plus"):
        ways += [
            Way("smaller batches in parts", False, {"batch_size": 16, "accumulation": 2}),
            Way("bfloat16", False, {"precision": "bf16"}),
            Way("smoothed labels", False, {"label_smoothing": 0.1}),
            Way("rate / 10", True, lr(1 / 10)),
            Way("rate x 10", True, lr(10)),
            Way("images not normalised", True, on_processor=unnormalised),
            Way("pixels from 0 to 255", True, on_processor=raw),
            Way("backbone of random weights", True, on_model=forget),
        ]
    if family.trains == "adapter":
        ways += [
            Way("head frozen and random", True, on_model=freeze_head),
            Way("no gradient reaches the adapter", True, on_model=block_gradients),
        ]
    if family.name in ("seq_bn", "double_seq_bn", "longer", "several labels"):
        ways += [
            Way("skip connection lost", True, adapter=LOST),
            Way("skip connection doubled", True, adapter=DOUBLED),
            Way("scale 0", True, adapter={"scaling": 0.0}),
            Way("dropout of nearly 1", True, adapter={"dropout": 1 - 1e-9}),
        ]
    if family.name in ("seq_bn", "lora", "adapter_plus"):
        ways += [Way("adapter tensors all 0", True, on_model=zero_tensors)]
    if family.name in ("seq_bn", "par_bn"):
        ways += [Way("no unit of the rectifier active", True, on_model=drown)]
    return ways


def trials() -> list[tuple[Family, Way, int]]:
    """Every training: the broken ways with one seed or two, the sound ones with three."""
    found = []
    for family in FAMILIES:
        for way in ways(family):
            seeds = 3 if way.name == SOUND else 1
            found += [(family, way, seed) for seed in range(seeds)]
    random.Random(0).shuffle(found)  # so that the first of them are a fair part
    return found


def name_of(family: Family, way: Way, seed: int) -> str:
    """What a trial is called in the log."""
    return f"{family.name} / {way.name} / {seed}"


def several_labels(images: ImageData) -> ImageData:
    """The digits with three labels each may have: even, above four, and prime."""
    names = ["even", "high", "prime"]

    def tell(examples: Examples) -> Examples:
        targets = [
            tuple(i for i, has in enumerate((d % 2 == 0, d > 4, d in (2, 3, 5, 7))) if has)
            for d in (int(target) for target in examples.targets)
        ]
        return Examples(examples.images, targets, len(names))

    return dataclasses.replace(
        images, task="multi_label", labels=names, train=tell(images.train), validation=tell(images.validation)
    )


def train(family: Family, way: Way, seed: int) -> dict[str, Any]:
    """One training; the log of all that the monitor saw, and how it ended."""
    images = load_data("digits")
    if family.multi_label:
        images = several_labels(images)
    images = way.on_data(images) if way.on_data else images
    recipe = BASE.replace(**{**family.recipe, **way.recipe, "seed": seed})
    set_seed(seed)
    model = load_model("demo", images.labels, task=images.task)
    processor = load_processor("demo")
    if way.on_processor:
        way.on_processor(processor)
    handle = None
    if family.adapter is not None:
        handle = inarch.attach(model)
        fields = {**family.fields, **way.adapter}
        config = family.adapter + (f"[{','.join(f'{k}={v}' for k, v in fields.items())}]" if fields else "")
        handle.add("adapter", config, unsound="allow")
        handle.train("adapter")
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(family.trains == "full" or name.startswith("classifier"))
    if way.on_model:
        way.on_model(model, handle)
    initial = {} if handle is None else {k: p.detach().clone() for k, p in handle["adapter"].items()}
    recorder = Recorder(
        label_prior=[count / len(images.train) for count in label_counts(images)],
        multi_label=family.multi_label,
        label_smoothing=recipe.label_smoothing,
    )
    with tempfile.TemporaryDirectory() as place:
        trainer = make_trainer(
            model, processor, images, recipe, trains=family.trains, folder=RunFolder(place),
            processes=Processes(recipe), callbacks=[recorder], is_resumed=False,
        )  # fmt: skip
        trainer.args.save_strategy, trainer.args.load_best_model_at_end = "no", False
        trainer.args.eval_on_start = False
        trainer.train()
        if math.isfinite(recorder.losses[-1]):
            score = trainer.evaluate()["eval_mean_average_precision" if family.multi_label else "eval_accuracy"]
            change = None if handle is None else change_without(trainer, handle, initial)
        else:  # there is nothing to be scored
            score, change = 0.0, None
    return {
        "trial": name_of(family, way, seed),
        "round": ROUND,
        "rule": RULE,
        "counts": label_counts(images),
        "num_images": len(images.train),
        "recipe": recipe.to_dict(),
        "num_steps": trainer.state.max_steps,
        "score": score,
        "adapter_change": change,
        "memory": {"losses": recorder.losses, "rates": recorder.rates, "samples": recorder.samples},
        "history": recorder.memory["history"],
    }


class Recorder(inarch.Monitor):
    """A monitor that keeps all that it is told."""

    def __init__(self, model: nn.Module | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.samples: list[dict[str, Any]] = []

    def step(self, loss: Any, *, rate: float = 1.0) -> None:
        self.losses.append(float(torch.as_tensor(loss).detach()))
        self.rates.append(rate)
        super().step(loss, rate=rate)

    def _note(self, kind: str, step: int, values: list[float]) -> None:
        parameters = self._parameters
        if kind == "drift":
            kept: dict[str, Any] = {"stream": max(values)}
        elif kind == "gradient":
            kept = parameters.by_place(values)
        else:
            half = len(values) // 2
            changes, sizes = parameters.by_place(values[:half]), parameters.by_place(values[half : 2 * half])
            kept = {place: (changes[place], sizes[place]) for place in changes}
        self.samples.append({"step": step, "kind": kind, "values": kept})
        super()._note(kind, step, values)


def change_without(trainer: Any, handle: Any, initial: dict[str, Any]) -> float:
    """How much the logits of the held-out images change, relative to their norm, without the adapter's training."""
    trained = torch.tensor(trainer.predict(trainer.eval_dataset).predictions)
    with torch.no_grad():
        for key, parameter in handle["adapter"].items():
            parameter.copy_(initial[key])
    untrained = torch.tensor(trainer.predict(trainer.eval_dataset).predictions)
    return float((trained - untrained).norm() / trained.norm())


def label_counts(images: ImageData) -> list[int]:
    """How many training images each label is on."""
    counts = [0] * len(images.labels)
    for target in images.train.targets:
        for label in (target,) if isinstance(target, int) else target:
            counts[label] += 1
    return counts


def train_all(words: list[str]) -> None:
    """Train what is missing."""
    torch.set_num_threads(1)
    LOG.parent.mkdir(exist_ok=True)
    done = {row["trial"] for row in read_log()}
    for family, way, seed in trials():
        name = name_of(family, way, seed)
        if name in done or not all(word in name for word in words):
            continue
        row = train(family, way, seed)
        with LOG.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:60} score {row['score']:.3f} {row['history']}", flush=True)


def read_log() -> list[dict[str, Any]]:
    """What has been trained."""
    return [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()] if LOG.exists() else []


# The table


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the table keeps of a training: how it ended, and what the monitor was told in the first epoch."""

    family: str
    way: str
    seed: int
    round: int
    broken: bool
    num_steps: int
    steps_per_epoch: int
    entropy: float
    chance: float
    """The score of always guessing by the labels' frequencies."""
    score: float
    """Accuracy, or mean average precision, on the held-out images after the last step."""
    first_loss: float
    last_loss: float
    """Mean training losses of the first two steps, and of the last tenth."""
    change: float | None
    """Of the logits, where the adapter's initial weights are put back."""
    places: int
    """Sites with an adapter, or modules beside the head that are trained."""
    has_head: bool
    drift: float | None
    losses: tuple[float, ...]
    """Of each step of the first epoch."""
    silent: tuple[int, ...]
    """Sites that no gradient has reached by the steps 1, 2, 4, 8, ..."""
    updates: tuple[float, ...]
    """The largest relative update in these steps, divided by the learning rate's share of the highest."""

    def signs(self, step: int) -> Signs:
        """What a monitor knows in that step."""
        gradients = [n for power, n in enumerate(self.silent) if 2**power <= step]
        updates = [size for power, size in enumerate(self.updates) if 2**power < step]
        known = [size for size in updates if math.isfinite(size)]
        return Signs(
            readings=[Reading(number, 1, loss) for number, loss in enumerate(self.losses[:step], 1)],
            entropy=self.entropy,
            num_places=self.places,
            has_head=self.has_head,
            silent=range(gradients[-1]) if len(gradients) > 1 else (),  # the rule only counts them
            still=bool(self.places) and len(updates) > 3 and not any(known),
            update=known[-1] if known else None,
            drift=self.drift,
        )

    @property
    def due(self) -> int:
        """A tenth of the steps."""
        return min(round(SHARE_OF_STEPS * self.num_steps), self.steps_per_epoch)

    @property
    def last_call(self) -> int:
        """A third of the steps, or the end of the first epoch if that comes before."""
        return max(self.due, min(round(LATEST * self.num_steps), self.steps_per_epoch))

    def verdict(self, step: int) -> Verdict:
        """What the monitor says in that step of the first epoch."""
        said: Verdict = "undecided"
        for number in range(1, step + 1):
            is_last = number >= self.last_call
            found = judge(self.signs(number), is_due=number >= self.due, is_last=is_last).verdict
            if not (said == "learning" and found not in ("diverging", "dead adapter")) and found != "undecided":
                said = found
        return said


def ending(trial: Trial, baseline: float) -> Verdict:
    """What became of a training, by the limits above; `baseline` is the score that its family reaches."""
    last = trial.last_loss
    if not math.isfinite(last) or (last > WORSE * trial.entropy and last > trial.first_loss):
        return "diverging"
    if trial.change is not None and trial.change < STILL:
        return "dead adapter"
    gained = (trial.score - trial.chance) / (baseline - trial.chance)
    return "stalled" if gained < SHARE else "learning"


def endings(table: list[Trial]) -> list[Verdict]:
    """What became of each."""
    scores: dict[str, list[float]] = {}
    for trial in table:
        if trial.way == SOUND:
            scores.setdefault(trial.family, []).append(trial.score)
    return [ending(trial, statistics.median(scores[trial.family])) for trial in table]


def digest(row: dict[str, Any]) -> Trial:
    """What the table keeps of a line of the log. Raises `ValueError` where the table would say what no monitor said."""
    name, way, seed = row["trial"].split(" / ")[0], " / ".join(row["trial"].split(" / ")[1:-1]), row["trial"][-1]
    family = next(family for family in FAMILIES if family.name == name)
    prior = [count / row["num_images"] for count in row["counts"]]
    smoothing = row["recipe"]["label_smoothing"]
    losses, rates, per_epoch = (
        row["memory"]["losses"],
        row["memory"]["rates"],
        row["num_steps"] // row["recipe"]["epochs"],
    )
    highest = row["recipe"]["learning_rate"] if "history" not in row else 1.0
    samples: dict[str, dict[int, Any]] = {"gradient": {}, "update": {}, "drift": {}}
    for sample in row["memory"]["samples"]:
        step = sample["step"]
        if step & (step - 1) == 0 and step <= per_epoch:
            samples[sample["kind"]][step] = sample["values"]
    places = [place for place in samples["gradient"][1] if place != HEAD]
    reached: set[str] = set()
    silent, updates = [], []
    for _, norms in sorted(samples["gradient"].items()):
        reached |= {place for place, norm in norms.items() if norm != 0}
        silent.append(sum(place not in reached for place in places))
    for step, sizes in sorted(samples["update"].items()):
        share = rates[step - 1] / highest
        known = [change / size / share for place, (change, size) in sizes.items()
                 if (place != HEAD or not places) and size and share]  # fmt: skip
        updates.append(max(known, default=math.nan))
    drift = samples["drift"].get(1)
    tail = losses[-max(1, len(losses) // 10) :]
    trial = Trial(
        family=name, way=way, seed=int(seed), round=row["round"],
        broken=next(w.broken for w in ways(family) if w.name == way),
        num_steps=row["num_steps"], steps_per_epoch=per_epoch,
        entropy=prior_entropy(prior, family.multi_label, smoothing),
        chance=statistics.fmean(prior) if family.multi_label else max(prior),
        score=row["score"], first_loss=statistics.fmean(losses[:2]), last_loss=statistics.fmean(tail),
        change=row["adapter_change"], places=len(places),
        has_head=HEAD in samples["gradient"][1], drift=max(drift.values()) if drift else None,
        losses=tuple(losses[:per_epoch]), silent=tuple(silent), updates=tuple(updates),
    )  # fmt: skip
    told = [verdict for step, verdict in row.get("history", ()) if step <= per_epoch]
    if told and row.get("rule") == RULE and told[-1] != trial.verdict(per_epoch):
        raise ValueError(f"{row['trial']}: the monitor said {told[-1]}, and the table says {trial.verdict(per_epoch)}")
    return trial


def write_table() -> None:
    """Write the table."""
    table = sorted(map(digest, read_log()), key=lambda one: (one.family not in DESIGN, one.family, one.way, one.seed))
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(item.name for item in dataclasses.fields(Trial))
        writer.writerows([_cell(getattr(one, item.name)) for item in dataclasses.fields(Trial)] for one in table)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_cell, value))
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def read_table(path: Path = TABLE) -> list[Trial]:
    """The trials that the project keeps."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Trial(**{key: _value(key, text) for key, text in row.items()}) for row in csv.DictReader(file)]


def _value(key: str, text: str) -> Any:
    if key in ("losses", "updates"):
        return tuple(float(word) for word in text.split())
    if key == "silent":
        return tuple(int(word) for word in text.split())
    if key in ("family", "way"):
        return text
    if key in ("broken", "has_head"):
        return text == "True"
    number = float(text) if text else None
    return (
        int(number)
        if number is not None and key in ("seed", "round", "num_steps", "steps_per_epoch", "places")
        else number
    )


# The page


VERDICTS: tuple[Verdict, ...] = ("learning", "stalled", "diverging", "dead adapter")


def confusion(pairs: list[tuple[Verdict, Verdict]]) -> list[str]:
    """How often each ending got each verdict, with the recall of each ending and the precision of each verdict."""
    said = (*VERDICTS, "undecided")
    lines = [f"| ended as | {' | '.join(said)} | recall |", f"| --- |{' --- |' * (len(said) + 1)}"]
    for truth in VERDICTS:
        counts = [sum(pair == (truth, verdict) for pair in pairs) for verdict in said]
        lines.append(
            f"| {truth} | {' | '.join(map(str, counts))} | {share(counts[VERDICTS.index(truth)], sum(counts))} |"
        )
    shares = [share(pairs.count((v, v)), sum(verdict == v for _, verdict in pairs)) for v in VERDICTS]
    return [*lines, f"| precision | {' | '.join(shares)} | | |"]


def share(part: int, whole: int) -> str:
    """A share in percent with its counts."""
    return f"{part / whole:.0%} ({part} of {whole})" if whole else "none"


def stops(pairs: list[tuple[Verdict, Verdict]]) -> str:
    """What `--stop-early` would have done, in words."""
    stopped = [truth for truth, verdict in pairs if verdict in FAILING]
    failed = [truth for truth, _ in pairs if truth in FAILING]
    good = sum(truth in FAILING for truth in stopped)
    return (
        f"`--stop-early` ends {len(stopped)} of {len(pairs)} of them, {share(good, len(stopped))} rightly, and catches "
        f"{share(good, len(failed))} of those that come to nothing."
    )


def page(table: list[Trial]) -> str:
    """The page of the documentation."""
    truths = endings(table)
    soon = [trial.verdict(trial.due) for trial in table]
    late = [trial.verdict(trial.steps_per_epoch) for trial in table]
    others = sorted({trial.family for trial in table} - set(DESIGN))

    def part(title: str, said: list[Verdict], of: Callable[[Trial], bool]) -> list[str]:
        pairs = [(truth, found) for trial, truth, found in zip(table, truths, said, strict=True) if of(trial)]
        return [title.format(num=len(pairs)), "\n".join(confusion(pairs)), stops(pairs)]

    is_second = lambda trial: trial.round == ROUND  # noqa: E731
    is_design = lambda trial: trial.family in DESIGN  # noqa: E731
    is_tried = lambda trial: not is_second(trial) and not is_design(trial)  # noqa: E731
    wrong = [
        f"| {trial.family} | {trial.way} | {trial.seed} | {trial.score:.3f} | {truth} | {first} | {second} |"
        for trial, truth, first, second in zip(table, truths, soon, late, strict=True)
        if first not in (truth, "undecided") or second != truth
    ]
    every = [
        f"| {trial.family} | {trial.way} | {trial.seed} | {trial.score:.3f} | {truth} | {first} | {second} |"
        for trial, truth, first, second in zip(table, truths, soon, late, strict=True)
    ]
    header = ["| family | trained | seed | score | ended as | at 10 % | first epoch |", "| --- |" + " --- |" * 6]
    parts = [
        INTRODUCTION.format(
            num=len(table), broken=sum(trial.broken for trial in table), design=" and ".join(f"`{d}`" for d in DESIGN),
            others=", ".join(f"`{one}`" for one in others), gain=GAIN,
            worse=RULE_WORSE, low=LOW_STEP, ample=AMPLE_STEP, fewest=FEWEST, end=WORSE, still=STILL, share=SHARE,
            used=sum(map(is_design, table)), tried=sum(map(is_tried, table)), second=sum(map(is_second, table)),
        ),
        *part("## At 10 % of the steps, the second round ({num} trainings)", soon, is_second),
        *part("## At the end of the first epoch, the second round", late, is_second),
        *part("## At 10 % of the steps, the families tried in the first round ({num} trainings)", soon, is_tried),
        *part("## At the end of the first epoch, the families tried in the first round", late, is_tried),
        *part("## At 10 % of the steps, the families the limits were chosen on ({num} trainings)", soon, is_design),
        *part("## At the end of the first epoch, the families the limits were chosen on", late, is_design),
        "## What it gets wrong",
        WRONG,
        "\n".join([*header, *wrong]),
        "## Every training",
        "\n".join([*header, *every]),
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts) + "\n"


INTRODUCTION = """
# What the first steps say

`inarch.Monitor` says of a training, while it goes on, whether it is *learning*, *stalled* or *diverging*, or trains a
*dead adapter*; *undecided* before there is evidence. This page is written by `scripts/monitor_trials.py page` from
`tests/fixtures/monitor_trials.csv`, and a test derives it anew.

```python
trainer = Trainer(..., callbacks=[inarch.Monitor(labels=labels, stop=True)])  # any trainer of transformers

monitor = inarch.Monitor(model, num_steps=1000, labels=labels)  # any other loop
loss.backward()
monitor.step(loss)  # once in an optimiser step, before the gradients are cleared
optimizer.step()
optimizer.zero_grad()
print(monitor)  # learning at step 62 of 1000: the loss is 1.9 against 2.3 of what the labels' frequencies alone give
```

`inarch train` watches every run, prints the verdict and writes it to `run.json`; with `--stop-early` it ends a run that
comes to nothing. (`--patience` is another thing: it looks at the validation images after each epoch.)

## The rule

* **dead adapter**: no gradient reaches any site of the adapter in two sampled steps; or the optimiser moves none in
  four.
* **diverging**: the loss is no number; or, at a tenth of the steps or later, it is more than {worse} times the
  reference and the first losses.
* **learning**: the mean loss of the last third of the steps so far is at least {gain:.0%} below the reference, beyond
  two standard errors, and has fallen, beyond three.
* **stalled**: at a tenth of the steps it is none of these and does not fall, two standard errors leave no room for that
  gain either, and the steps were ample, with an update of {ample} of the weights or more. After smaller steps, or where
  no head is trained, the verdict waits until the first epoch ends, or a third of the steps is done; where an update is
  less than {low} of the weights, it says meanwhile that the learning rate may be raised.

The reference is the entropy of the labels' frequencies: the least loss for which no input is needed. Where they are not
known (a regression, a language model), or where the head knows the task already, it is the loss of the first two steps,
and the record says so. Nothing is said of the loss before step {fewest}. What is learning or stalled may be diverging
later, and a stalled training that falls after all is learning.

What it costs is measured by `bench/monitor.py`, two trainings of the demonstration backbone side by side, 88 steps at
batch 32 on one core, a busy one: 1.014 times the time of the one without (quartiles 0.992 to 1.027), of which 1.5 %
were spent in the monitor. Nearly all of it is the drift of the stream, a forward of two samples in the steps 1, 4, 16
and so on.

## How it was measured

{num} trainings of the demonstration backbone on the digits, {broken} of them broken from the start: learning rates of a
hundredth to a thousand times the recipe's, lost and doubled skip connections, scale 0, dropout of nearly 1, adapter
tensors that are 0 or get no gradient, rectifiers that never open, a frozen random head, shuffled labels, images not
normalised, not scaled or nearly black, a backbone of random weights. What became of each was read from its end, by
limits that were written down before the rule was made:

* *diverging*: the loss is no number, or that of the last tenth of the steps is over {end} times the labels' entropy and
  over that of the first two steps;
* *dead adapter*: initial adapter weights put back change the logits of the held-out images by less than {still:g} of
  their norm;
* *stalled*: less than {share:.0%} of the gain in score, over guessing the commonest label, that the family's recipe
  reaches;
* *learning*: the rest.

So the score of a dead adapter may be good, which is the head's alone; and a broken training that makes up for its start
is learning.

The limits were chosen on {used} trainings of {design}, and tried on {tried} of other families:
{others}.
(`longer` and `several labels` train `seq_bn` too, with larger batches, and with three labels an image may have.) At a
tenth of the steps 25 of 29 stops were right there, and three of the other four were of a low learning rate: an update
below {low} of the weights counted as hopeless then, and how small is too small differs between methods. So that limit
went, and none was put in its place: a slow training is waited for. Nor is a loss called stalled any more that scatters
so much that it may have fallen. What the rule as it is says of those {tried} is no test of it, for it was changed after
them. The second round is one: {second} more trainings of these families, whose ends had no part in the rule. There the
rule of before would have ended 23 at a tenth of the steps, 19 rightly; what the present one does comes first below.

All are of one small backbone and short, 132 steps with a tenth of them for the warm-up. Nothing was measured on larger
models.
"""


WRONG = """
The trainings that were judged wrongly at 10 %, or not rightly by the end of the first epoch. With a rate a hundred
times too high, some recover late, and whether the end is called stalled or diverging is nearly chance. What a slow
training costs before it is given up is a third of the steps, or the first epoch, and not a tenth.
"""


def main() -> None:
    """Train, or write the table or the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "table", "page"))
    parser.add_argument("words", nargs="*", help="train only trials whose names have all of them")
    arguments = parser.parse_args()
    if arguments.action == "train":
        train_all(arguments.words)
    elif arguments.action == "table":
        write_table()
    else:
        PAGE.write_text(page(read_table()), encoding="utf-8")


if __name__ == "__main__":
    main()
