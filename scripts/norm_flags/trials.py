"""One training of the study: what is to be trained, what is proved of it, and what came of it."""

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import inarch
from inarch.data import load_data
from inarch.data.examples import Examples, ImageData, Target, hold_out
from inarch.methods import read_config
from inarch.train.demo import RECIPE
from inarch.train.run import train_run

from . import texts
from .subjects import DIGITS, SUBJECTS, sites_of, untrained

FLAGS = ("original_ln_before", "original_ln_after", "residual_before_ln")
SEEDS = (0, 1, 2)
Fold = tuple[int, int]
"""A part of all examples that is held out: which, from 0, of how many equal ones."""
HALVES: tuple[Fold, ...] = ((0, 2), (1, 2))
FIFTHS: tuple[Fold, ...] = tuple((index, 5) for index in range(5))
DIVIDING_SEED = 0
"""Decides which of the digits are in which part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is trained. `adapter` None is a new head alone."""

    backbone: str
    adapter: str | None
    seed: int
    fold: Fold | None = None
    """The part of the examples that is held out; None holds out 400 of them."""
    epochs: int = RECIPE.epochs
    learning_rate: float = RECIPE.learning_rate or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a trial; lists begin before training and go on with each epoch."""

    trial: Trial
    num_held_out: int
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]
    """On the held-out examples."""
    training_losses: tuple[float, ...]
    """Mean of each epoch."""

    @property
    def accuracy(self) -> float:
        """After the last epoch: no choice among epochs has flattered it."""
        return self.accuracies[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Outcome":
        """The outcome this data describes."""
        lists = {key: tuple(data[key]) for key in ("accuracies", "losses", "training_losses")}
        fold = data["trial"]["fold"]
        trial = Trial(**data["trial"] | {"fold": fold and (fold[0], fold[1])})
        return cls(trial=trial, num_held_out=data["num_held_out"], **lists)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What is known of a configuration before anything is trained."""

    backbone: str
    adapter: str
    parameters: int
    formula: str
    verdict: str
    fixes: tuple[str, ...]
    """The configurations with each of the proposed smallest repairs made."""


def adapter(*, before: bool, after: bool, residual: bool) -> str:
    """The configuration with these flags."""
    values = ",".join(f"{name}={value}" for name, value in zip(FLAGS, (before, after, residual), strict=True))
    return f"seq_bn[{values}]"


def flags_of(config: str) -> tuple[bool, ...]:
    """The three flags of a configuration."""
    (part,) = read_config(config).parts
    return tuple(bool(getattr(part, name)) for name in FLAGS)


def judge(backbone: str, config: str) -> Judgement:
    """Prove a configuration. The groups of a backbone's sites are of one kind, so they share formula and verdict."""
    report = inarch.check(untrained(backbone), config, layout=sites_of(backbone), measure=False)
    (formula,) = {str(group.proof.formula.adapted) for group in report.sites}
    (verdict,) = {group.proof.verdict for group in report.sites}
    found = [finding for finding in report.findings if finding.code == "unsound-wiring"]
    repaired = [repair.apply(read_config(config)) for repair in (found[0].fixes if found else ())]
    return Judgement(
        backbone=backbone,
        adapter=config,
        parameters=report.num_parameters,
        formula=f"y = {formula}",
        verdict=verdict,
        fixes=tuple(_in_flags(one) for one in repaired),
    )


def _in_flags(config: Any) -> str:
    before, after, residual = flags_of(str(config))
    return adapter(before=before, after=after, residual=residual)


def run(trial: Trial) -> Outcome:
    """Train."""
    subject = SUBJECTS[trial.backbone]
    recipe = RECIPE.replace(seed=trial.seed, epochs=trial.epochs, learning_rate=trial.learning_rate)
    if subject.data == "titles":
        titles = texts.split(trial.fold)
        logged = texts.train_texts(subject.place, trial.adapter, recipe, *titles)
        return Outcome(
            trial=trial,
            num_held_out=len(titles[1]),
            accuracies=tuple(row["eval_accuracy"] for row in logged if "eval_accuracy" in row),
            losses=tuple(row["eval_loss"] for row in logged if "eval_loss" in row),
            training_losses=tuple(row["loss"] for row in logged if "loss" in row),
        )
    images = _digits(trial.fold)
    with tempfile.TemporaryDirectory() as folder:
        record = train_run(
            recipe,
            subject.place,
            images,
            trial.adapter,
            Path(folder) / "run",
            trains="head" if trial.adapter is None else "adapter",
            unsound="allow",
        )
    return Outcome(
        trial=trial,
        num_held_out=len(images.validation),
        accuracies=tuple(epoch.metrics["accuracy"] or 0.0 for epoch in record.epochs),
        losses=tuple(_number(epoch.metrics["loss"]) for epoch in record.epochs),
        training_losses=tuple(_number(epoch.train_loss) for epoch in record.epochs[1:]),
    )


def _number(value: float | None) -> float:
    return float("inf") if value is None else value


@cache
def _digits(fold: Fold | None) -> ImageData:
    """The digits, with their own 400 held out, or a part of all."""
    images = load_data("digits")
    assert tuple(images.labels) == DIGITS
    if fold is None:
        return images
    sides = (images.train, images.validation)
    every = Examples(
        [image for side in sides for image in side.images],
        [target for side in sides for target in side.targets],
        len(images.labels),
    )
    index, number = fold
    parts = _parts(every.targets, number)
    rest = sorted(one for other, part in enumerate(parts) if other != index for one in part)
    return dataclasses.replace(images, train=every.pick(rest), validation=every.pick(parts[index]))


def _parts(targets: Sequence[Target], number: int) -> list[list[int]]:
    """Indices of equal parts, with every label evenly in each."""
    if number == 1:
        return [list(range(len(targets)))]
    rest, last = hold_out(targets, 1 / number, DIVIDING_SEED)
    others = _parts([targets[index] for index in rest], number - 1)
    return [*([rest[index] for index in part] for part in others), last]
