"""What inarch does, shown in a minute: a backbone that knows letters learns digits in three ways.

A new head alone does well, an adapter (`seq_bn`) does better. The same adapter, wired so that every layer loses its
skip connection, destroys what the backbone knows, as the checker says beforehand. The sound adapter is then loaded in
a fresh process, where it predicts what it predicted here.
"""

import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..check import Report
from ..core.drafts import drafted, replace_folder
from ..core.errors import InarchError, StateError
from ..core.records import REPORT, RunRecord
from ..data import load_data
from ..data.examples import ImageData
from ..data.images import open_image
from ..handle import check
from ..state import TENSORS
from .models import load_model, load_processor
from .pictures import Curve, Shown, draw_curves, draw_predictions
from .predict import Prediction, Predictor
from .recipe import Recipe, Trains
from .run import train_run, train_seeds

MODEL, DATA = "demo", "digits"
SOUND = "seq_bn"
UNSOUND = "seq_bn[original_ln_after=False,residual_before_ln=True]"
NUM_SEEDS = 3
RECIPE = Recipe(epochs=3, batch_size=32, learning_rate=2e-3, warmup=0.1, schedule="cosine")
"""Short, because a model this small can be trained anew in little time: after 12 epochs the unsound adapter has made up
for most of what its wiring destroys (96 % against 99 %), and says less about larger models."""

RESULTS, DIGITS, CURVES, IMAGES, ADAPTER = "results.json", "digits.png", "curves.png", "images", "adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One of the ways to adapt the backbone."""

    key: str
    """Its name, and that of its folder."""
    trains: Trains
    adapter: str | None
    repeats: bool = False
    """Whether it is trained with several seeds."""


WAYS = (
    Way(key="head_only", trains="head", adapter=None),
    Way(key="seq_bn", trains="adapter", adapter=SOUND, repeats=True),
    Way(key="unsound", trains="adapter", adapter=UNSOUND),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one way."""

    way: Way
    report: Report | None
    runs: tuple[RunRecord, ...]

    @property
    def accuracies(self) -> list[float]:
        """By seed: the accuracy after the last epoch, which no choice among epochs has flattered."""
        return [curve[-1] for curve in self.curves]

    @property
    def best_accuracies(self) -> list[float]:
        """By seed: the accuracy of the epoch that is saved, chosen on the same held-out images."""
        return [run.results.get("accuracy") or 0.0 for run in self.runs]

    @property
    def accuracy(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def best_accuracy(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.best_accuracies)

    @property
    def curves(self) -> list[list[float]]:
        """By seed: the accuracy before training and after each epoch."""
        return [[epoch.metrics.get("accuracy") or 0.0 for epoch in run.epochs] for run in self.runs]

    @property
    def trainable_parameters(self) -> int:
        return int(self.runs[0].model["trainable"])

    @property
    def seconds(self) -> float:
        """The time to train once."""
        return statistics.fmean(run.seconds for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        groups = self.report.sites if self.report is not None else ()
        return {
            "configuration": self.way.adapter,
            "sound": self.report.sound if self.report is not None else True,
            "formulas": [f"y = {group.proof.formula.adapted}" for group in groups],
            "verdicts": [group.proof.verdict for group in groups],
            "accuracy": self.accuracy,
            "best_accuracy": self.best_accuracy,
            "trainable_parameters": self.trainable_parameters,
            "seconds": self.seconds,
            "seeds": {str(run.seed): accuracy for run, accuracy in zip(self.runs, self.accuracies, strict=True)},
            "curves": {str(run.seed): curve for run, curve in zip(self.runs, self.curves, strict=True)},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """Whether a fresh process predicts what this one does."""

    num_images: int
    identical_labels: bool
    max_probability_difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """All that the demonstration found; `folder` has it as files."""

    folder: Path
    outcomes: tuple[Outcome, ...]
    reload: Reload
    adapter_bytes: int
    num_held_out: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        first = self.outcomes[0].runs[0]
        return {
            **{outcome.way.key: outcome.to_dict() for outcome in self.outcomes},
            "adapter_bytes": self.adapter_bytes,
            "reload": dataclasses.asdict(self.reload),
            "data": {key: first.data[key] for key in ("name", "train", "validation")},
            "recipe": first.job["recipe"],
            "seeds": [run.seed for outcome in self.outcomes if outcome.way.repeats for run in outcome.runs],
            "seconds": self.seconds,
            "versions": {"python": platform.python_version(), **first.environment["versions"]},
        }


class Audience:
    """Told what goes on. Does nothing unless a subclass does."""

    def begin(self, way: Way, report: Report | None, num_runs: int) -> None:
        """A way is about to be tried; `report` is what was proved of it."""

    def step(self, run: int, done: int, total: int, accuracy: float | None) -> None:
        """`done` of `total` steps of a run, counted from 1, are trained; `accuracy` is the latest one."""

    def finish(self, outcome: Outcome) -> None:
        """A way has been tried."""

    def reload(self) -> None:
        """The adapter is about to be loaded in a fresh process."""


def run_demo(
    output: str | os.PathLike[str],
    *,
    audience: Audience | None = None,
    recipe: Recipe = RECIPE,
    num_seeds: int = NUM_SEEDS,
    data: ImageData | None = None,
    command: Sequence[str] = (),
) -> DemoResult:
    """Run the demonstration and write it to a folder, in the place of an earlier one.

    **Arguments**: `recipe`, `num_seeds` and `data` make it shorter; `command` is the command line, for the records.
    Until it has finished, the folder is as it was.

    Raises `StateError` for a folder with anything else in it.
    """
    audience, target, start = audience or Audience(), Path(output).expanduser(), time.perf_counter()
    _check_replaceable(target)
    images = data or load_data(DATA)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # a model this small gains little from more, and loses much where they are not free
        with drafted(target) as draft:
            stage = _Stage(draft, images, recipe, num_seeds, audience, command=command)
            outcomes = tuple(stage.try_way(way) for way in WAYS)
            audience.reload()
            shutil.copytree(draft / SOUND / "seed-0" / ADAPTER, draft / ADAPTER)
            reload = stage.reload()
            title = "One small backbone that knows letters, three ways to teach it digits"
            draw_curves([Curve(o.way.key, o.curves) for o in outcomes], draft / CURVES, title=title)
            result = DemoResult(
                folder=target,
                outcomes=outcomes,
                reload=reload,
                adapter_bytes=(draft / ADAPTER / TENSORS).stat().st_size,
                num_held_out=len(images.validation),
                seconds=time.perf_counter() - start,
            )
            (draft / RESULTS).write_text(
                json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8"
            )
            replace_folder(draft, target)
    finally:
        torch.set_num_threads(threads)
    return result


def _check_replaceable(target: Path) -> None:
    """Refuse a folder that holds anything but an earlier demonstration."""
    if not target.exists():
        return
    own = {RESULTS, DIGITS, CURVES, IMAGES, ADAPTER, REPORT, *(way.key for way in WAYS)}
    found = {entry.name for entry in target.iterdir()} if target.is_dir() else {"no folder but a file"}
    foreign = sorted(found - own)
    if foreign:
        raise StateError(
            f"The demonstration is written to a new folder, or over an earlier one; got `{target}`, which holds "
            f"`{foreign[0]}`. Name another folder with `--output`."
        )


class _Stage:
    """Where the ways are tried."""

    def __init__(
        self,
        folder: Path,
        images: ImageData,
        recipe: Recipe,
        num_seeds: int,
        audience: Audience,
        *,
        command: Sequence[str],
    ) -> None:
        self.folder, self.images, self.recipe, self.audience = folder, images, recipe, audience
        self.num_seeds, self.command = num_seeds, command
        self.network = load_model(MODEL, images.labels, task=images.task)
        self.trained: Any = None

    def try_way(self, way: Way) -> Outcome:
        """Prove, train and keep one way."""
        report = None if way.adapter is None else check(self.network, way.adapter, measure=False)
        num_runs = self.num_seeds if way.repeats else 1
        self.audience.begin(way, report, num_runs)
        watch = _Watch(self.audience)
        options: dict[str, Any] = {"trains": way.trains, "unsound": "allow", "callbacks": [watch], "name": "digits"}
        options["command"] = self.command
        given = (self.recipe, MODEL, self.images, way.adapter, self.folder / way.key)
        if way.repeats:
            runs = train_seeds(*given, num_seeds=num_runs, **options).runs
        else:
            runs = (train_run(*given, **options),)
        if way.adapter == SOUND:
            self.trained = watch.models[0]
        for checkpoints in self.folder.glob(f"{way.key}/**/checkpoints"):
            shutil.rmtree(checkpoints, ignore_errors=True)
        outcome = Outcome(way=way, report=report, runs=tuple(runs))
        self.audience.finish(outcome)
        return outcome

    def reload(self) -> Reload:
        """Predict ten images with the trained model and with the adapter in a fresh process; draw them."""
        held = self.images.validation
        first = {held.label(index): index for index in reversed(range(len(held)))}
        shown = [first[label] for label in sorted(first)]
        names = [self.images.labels[int(held.label(index))] for index in shown]
        (self.folder / IMAGES).mkdir()
        paths = [self.folder / IMAGES / f"{name}.png" for name in names]
        for index, path in zip(shown, paths, strict=True):
            open_image(held.images[index]).save(path)
        here = Predictor(self.trained, load_processor(MODEL), self.images.labels, self.images.task)
        ours = list(here.predict(paths, top=len(self.images.labels)))
        theirs = _predict_in_fresh_process(self.folder / ADAPTER, paths, len(self.images.labels))
        pixels = [np.asarray(open_image(path)) for path in paths]
        digits = [
            Shown(picture, name, one.top[0][0], one.top[0][1])
            for picture, name, one in zip(pixels, names, theirs, strict=True)
        ]
        title = "Ten held-out digits, predicted by the adapter in a fresh process"
        draw_predictions(digits, self.folder / DIGITS, title=title)
        return compare(ours, theirs)


def compare(ours: Sequence[Prediction], theirs: Sequence[Prediction]) -> Reload:
    """How far two lists of predictions of the same images agree."""
    differences = [
        abs(share - dict(there.top)[label])
        for here, there in zip(ours, theirs, strict=True)
        for label, share in here.top
    ]
    return Reload(
        num_images=len(ours),
        identical_labels=[one.top[0][0] for one in ours] == [one.top[0][0] for one in theirs],
        max_probability_difference=max(differences),
    )


def _predict_in_fresh_process(adapter: Path, images: Sequence[Path], num_labels: int) -> list[Prediction]:
    command = [sys.executable, "-m", "inarch", "predict", str(adapter), *map(str, images), "--json"]
    done = subprocess.run(  # noqa: S603  our own module, with paths of our own
        [*command, "--top", str(num_labels)], capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise InarchError(
            f"A fresh process must be able to predict with the adapter; got exit code {done.returncode}: "
            f"{done.stderr.strip() or 'no message'}. Run `{' '.join(command[1:5])} ...` to see it."
        )
    return [
        Prediction(row["image"], tuple((one["label"], one["probability"]) for one in row["top"]))
        for row in json.loads(done.stdout)
    ]


class _Watch(TrainerCallback):
    """Passes on how far a training is, and keeps the trained models."""

    def __init__(self, audience: Audience) -> None:
        self.audience = audience
        self.run = 0
        self.accuracy: float | None = None
        self.models: list[Any] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.run += 1
        self.accuracy = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.audience.step(self.run, state.global_step, state.max_steps, self.accuracy)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self.accuracy = (others.get("metrics") or {}).get("eval_accuracy")
        self.audience.step(self.run, state.global_step, state.max_steps, self.accuracy)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if not self.models:  # the first is the one whose adapter is kept
            self.models.append(others["model"])
