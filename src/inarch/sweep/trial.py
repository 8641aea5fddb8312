"""One trial: a configuration is judged, trained with every seed, and given up where it is not worth it."""

import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.config import thaw
from ..core.errors import ConfigError, InarchError
from ..core.records import RECORD, RunRecord, SeedsRecord, TrialRecord, read_record
from ..data.examples import ImageData
from ..methods import AdapterConfig
from ..train.folder import RunFolder
from ..train.ledger import now
from ..train.metrics import BEST
from ..train.recipe import DataConfig, Recipe
from ..train.run import Job, train_run
from .judge import Bench
from .pruning import Hyperband
from .space import Space
from .storage import Claim, Taken
from .study import StudyConfig

ADAPTER_NAME = "adapter"
_OVER = ("finished", "diverged", "stopped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What a study is about to do."""

    seeds: int
    """With how many each configuration is trained."""
    steps: int
    """Of training, if none is given up and none is refused."""
    unsound: bool
    """Whether configurations that are proved to lose the pre-trained function are trained all the same."""


class Audience:
    """Told what goes on. Does nothing unless a subclass does."""

    def begin(self, total: int, done: int, ahead: "Ahead") -> None:
        """`done` of `total` trials of the study are over."""

    def judged(self, trial: TrialRecord) -> None:
        """A trial is about to be trained: its values and verdict are known."""

    def step(self, trial: TrialRecord, seed: int, done: int, total: int, value: float | None) -> None:
        """`done` of `total` steps of a seed are trained; `value` is the latest of the metric."""

    def finish(self, trial: TrialRecord) -> None:
        """A trial is over."""

    def wait(self, running: int) -> None:
        """Nothing is left to begin; other workers are at so many trials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """All that the trials of a study share."""

    study: StudyConfig
    space: Space
    model: str
    data: DataConfig
    images: ImageData
    bench: Bench
    pruner: Hyperband | None
    folder: Path
    worker: str
    command: tuple[str, ...]
    audience: Audience

    @property
    def metric(self) -> str:
        """What is maximised."""
        return BEST[self.images.task]

    def run(self, claim: Claim) -> TrialRecord:
        """Judge and train one, and say what became of it.

        Raises `Taken` where another worker has taken it over, `Deferred` where another one is training what is proved
        to compute the same, and `InarchError` or `OSError` for what no other trial will find better.
        """
        values = self.space.assign(lambda dimension: dimension.suggest(claim.trial))
        shown = {name: thaw(value) for name, value in values.items()}
        trial = TrialRecord(number=claim.index, values=shown, worker=self.worker)
        try:
            config, recipe = self.space.configure(values)
        except ConfigError as error:
            return dataclasses.replace(trial, status="refused", decided_by="check", reason=str(error))
        judged = self.bench.judge(config, recipe)
        trial = dataclasses.replace(trial, adapter=str(config), verdict=judged.verdict, parameters=judged.parameters)
        if self.study.check and judged.refusal:
            trial = dataclasses.replace(trial, sites=judged.sites, reason=judged.refusal)
            return dataclasses.replace(trial, status="refused", decided_by="check")
        if self.study.reuse and judged.signature:
            claim.sign(judged.signature)
            twin = claim.board.twin(judged.signature, claim.index)
            if twin is not None and twin.status == "running":
                raise Deferred(judged.signature)
            if twin is not None:
                return _like(dataclasses.replace(trial, sites=judged.sites), twin)
        self.audience.judged(trial)
        return self._train(claim, trial, config, recipe)

    def _train(self, claim: Claim, trial: TrialRecord, config: AdapterConfig, recipe: Recipe) -> TrialRecord:
        folder = self.folder / f"{claim.index:04d}"
        watch = _Watch(claim, self.metric, self.pruner, lambda *news: self.audience.step(trial, *news))
        runs: list[RunRecord] = []
        changes: dict[str, Any] = {"status": "finished", "decided_by": "training"}
        for seed in range(recipe.seed, recipe.seed + self.study.seeds):
            place = folder if self.study.seeds == 1 else folder / f"seed-{seed}"
            try:
                runs.append(self._train_seed(watch, place, config, recipe.replace(seed=seed)))
            except _GivenUp:
                runs.append(_close(place))
                reason = f"behind other trials at epoch {watch.epoch}, with {self.metric} {watch.value:.4f}"
                changes = {"status": "pruned", "decided_by": "hyperband", "reason": reason}
            except ConfigError as error:  # of a study without a check: what cannot be made at all
                changes = {"status": "refused", "decided_by": "check", "reason": str(error)}
            except (Taken, InarchError, OSError, torch.AcceleratorError):
                raise  # nothing that this configuration has done: another trial would fare alike
            except Exception as error:  # noqa: BLE001  one that no model can be trained with ends no study
                changes = {"status": "failed", "decided_by": "training", "reason": _told(error)}
            else:
                changes = _end(runs[-1]) or changes
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
            if changes["status"] != "finished":
                break
        if self.study.seeds > 1:
            whole = Job.of(recipe, self.model, self.data, config, **self._options()).to_dict()
            SeedsRecord.of(runs, self.study.seeds, {**whole, "seeds": self.study.seeds}, self.command).save(folder)
        found = {str(run.seed): value for run in runs if (value := run.results.get(self.metric)) is not None}
        return dataclasses.replace(
            trial,
            **changes,
            value=statistics.fmean(found.values()) if found else None,
            std=statistics.stdev(found.values()) if len(found) > 1 else None,
            seeds=found,
            curve=_curve(runs[0], self.metric) if runs else (),
            steps=watch.steps,
            seconds=watch.seconds,
            runs=(str(folder.relative_to(self.folder.parent)),),
        )

    def _train_seed(self, watch: "_Watch", place: Path, config: AdapterConfig, recipe: Recipe) -> RunRecord:
        """Train, or go on where another attempt left off."""
        begun = (place / RECORD).is_file()
        if begun and isinstance(earlier := read_record(place), RunRecord) and earlier.status in _OVER:
            watch.seed += 1
            return earlier
        try:
            return train_run(
                recipe,
                self.model,
                self.data,
                config,
                place,
                resume=begun,
                overwrite=not begun,
                callbacks=[watch],
                command=self.command,
                images=self.images,
                **self._options(),
            )
        finally:
            watch.seed += 1

    def _options(self) -> dict[str, Any]:
        unsound = "allow" if self.study.allow_unsound or not self.study.check else "refuse"
        return {"trains": "adapter", "name": ADAPTER_NAME, "unsound": unsound}


def _told(error: Exception) -> str:
    """What a training ended with, as a reason."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error):
        return "the device has too little memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _like(trial: TrialRecord, twin: TrialRecord) -> TrialRecord:
    """The trial with the result of another that computes the same."""
    how = "" if twin.status == "finished" else f", which was {twin.status}: {twin.reason}"
    return dataclasses.replace(
        trial,
        status="repeated",
        decided_by="proof",
        reason=f"computes what trial {twin.number} computes{how}",
        same_as=twin.number,
        value=twin.value if twin.status == "finished" else None,
        std=twin.std if twin.status == "finished" else None,
        seeds=twin.seeds if twin.status == "finished" else {},
    )


def _end(run: RunRecord) -> dict[str, Any]:
    """What a run says of its trial, where it did not come to its end."""
    if run.status == "diverged":
        return {"status": "diverged", "decided_by": "training", "reason": "the loss stopped being a number"}
    if run.status == "stopped" and run.monitor is not None and run.monitor.stopped:
        return {"status": "stopped", "decided_by": "monitor", "reason": f"{run.monitor.verdict}: {run.monitor.reason}"}
    if run.status == "stopped":  # by an attempt whose worker ended before it could say so
        return {"status": "pruned", "decided_by": "hyperband", "reason": "behind other trials"}
    return {}


def _close(place: Path) -> RunRecord:
    """Write down that a run was given up."""
    record = read_record(place)
    assert isinstance(record, RunRecord)
    closed = dataclasses.replace(record, status="stopped", finished=now())
    closed.save(RunFolder(place).path)
    return closed


def _curve(run: RunRecord, metric: str) -> tuple[tuple[float, float], ...]:
    return tuple((one.epoch, value) for one in run.epochs if (value := one.metrics.get(metric)) is not None)


class Deferred(Exception):  # noqa: N818  no error: a decision
    """Another worker is training what is proved to compute the same; its signature."""


class _GivenUp(Exception):  # noqa: N818  no error: a decision
    """The pruner has given a trial up."""


class _Watch(TrainerCallback):
    """Counts steps; after each epoch of the first seed, tells the study how it went and asks whether to go on."""

    def __init__(
        self,
        claim: Claim,
        metric: str,
        pruner: Hyperband | None,
        tell: Callable[[int, int, int, float | None], None],
    ) -> None:
        self.claim, self.metric, self.pruner, self.tell = claim, metric, pruner, tell
        self.seed = 0
        self.steps = 0
        self.start = time.perf_counter()
        self.epoch = 0
        self.value: float | None = None
        self.is_behind = False

    @property
    def seconds(self) -> float:
        """Time since the trial was begun."""
        return time.perf_counter() - self.start

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.value = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps += 1
        self.tell(args.seed, state.global_step, state.max_steps, self.value)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self.value = (others.get("metrics") or {}).get(f"eval_{self.metric}")
        self.claim.spend(self.steps, self.seconds)
        if self.seed or not state.global_step or self.value is None or not math.isfinite(self.value):
            return
        self.epoch = max(1, math.ceil((state.epoch or 0) - 1e-6))
        self.claim.report(self.value, self.epoch)
        is_at_end = state.global_step >= state.max_steps
        if self.pruner is not None and not is_at_end and self.pruner.gives_up(self.claim):
            self.is_behind = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Here, after the record of the run has been written, and not in the evaluation before it.
        if self.is_behind:
            raise _GivenUp
