"""A study from what it asks for to its record; the same for one worker and for one of many."""

import dataclasses
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..core.errors import ConfigError, DataError, StateError
from ..core.records import REPORT, STUDY, StudyRecord, TrialRecord, read_study
from ..data import load_data
from ..data.examples import ImageData
from ..methods import read_config
from ..train.folder import NEUTRAL, differences
from ..train.image_trainer import resolve_precision
from ..train.ledger import describe_data, describe_environment, now
from ..train.metrics import BEST
from ..train.order import num_batches
from ..train.processes import Processes
from ..train.recipe import DataConfig, Recipe
from .judge import Bench
from .pruning import Hyperband
from .space import Space, encode
from .storage import Board, Claim, Taken, optuna, storage_url
from .study import StudyConfig
from .trial import Ahead, Audience, Deferred, Trials

TRIALS = "trials"
OWN = (STUDY, TRIALS, REPORT, "study.db", "study.db-journal", "study.db.lock")
"""What a study's folder holds."""

GRACE = 120.0


def run_study(
    study: StudyConfig,
    recipe: Recipe,
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | DataConfig,
    output: str | os.PathLike[str],
    *,
    storage: str | None = None,
    name: str | None = None,
    grace: float = GRACE,
    overwrite: bool = False,
    audience: Audience | None = None,
    command: Sequence[str] = (),
) -> StudyRecord:
    """Try configurations of an adapter, and write what became of each to a folder.

    **Arguments**

    - `study`: what is varied, how configurations are chosen, when a trial is given up.
    - `recipe`, `model`, `data`: as for `train_run`; the data need images to validate on.
    - `output`: the folder of the study; each trial is a run folder below `trials/`.
    - `storage`: where the study is kept: none takes a file in the folder; the URL of a database lets workers on several
      machines take part, each of which calls this with the same arguments.
    - `name`: the study's name in a database; none takes that of the folder.
    - `grace`: seconds without a sign of life after which a worker on another machine counts as dead.
    - `overwrite`: replace the study; else one that is there is gone on with, by as many workers as there are.

    Returns the record when nothing is left to do. Ctrl-C leaves a study that is gone on with by the same call.

    Raises `InarchError` of every kind for whatever cannot be used.
    """
    given = data if isinstance(data, DataConfig) else DataConfig(data=os.fspath(data))
    space = Space.of(study.vary, read_config(study.adapter), recipe)
    queue = _queue(study, space)
    study = study.replace(vary={one.name: one.written() for one in space.dimensions})
    job = _job(study, recipe, os.fspath(model), given)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"A study trains each trial in one process; got {os.environ['WORLD_SIZE']} that train together. Start the "
            "command several times with one `storage`, without `accelerate launch` or `torchrun`."
        )
    folder = Path(output).expanduser()
    _admit(folder)
    images = _images(given)
    allows = study.allow_unsound or not study.check
    bench = Bench(os.fspath(model), images, allow_unsound=allows, search=space.learning_rates)
    bench.warn(space.adapter, recipe)
    board = Board(storage_url(storage, folder), name or _name(storage, folder), grace=grace)
    try:
        _open(board, folder, job, queue, overwrite=overwrite)
        trials = Trials(
            study=study,
            space=space,
            model=os.fspath(model),
            data=given,
            images=images,
            bench=bench,
            pruner=_pruner(study, space, images, board),
            folder=folder / TRIALS,
            worker=board.shown,
            command=tuple(command),
            audience=audience or Audience(),
        )
        return _Worker(trials, board, job, folder, tuple(command)).work()
    finally:
        board.close()


def _job(study: StudyConfig, recipe: Recipe, model: str, data: DataConfig) -> dict[str, Any]:
    job = {"study": study.to_dict(), "recipe": recipe.to_dict(), "model": model, "data": data.to_dict()}
    made: dict[str, Any] = json.loads(json.dumps(job))
    return made


def _queue(study: StudyConfig, space: Space) -> list[dict[str, Any]]:
    """What each trial takes, as Optuna keeps it; a sampler is left to choose."""
    if study.sampler != "grid":
        return [{} for _ in range(study.trials or 0)]
    return [{key: encode(value) for key, value in values.items()} for values in space.grid()]


def _images(data: DataConfig) -> ImageData:
    images = load_data(**data.arguments())
    if not len(images.validation):
        raise DataError(
            f"A study compares trials on images to validate on; got none in `{images.name}`. Give a `validation` above "
            "0."
        )
    return images


def _admit(folder: Path) -> None:
    """Refuse a folder that holds anything but a study."""
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in entries if name not in OWN and not name.startswith(f".{STUDY}.")]
    if folder.exists() and not folder.is_dir():
        foreign = ["no folder but a file"]
    if foreign:
        raise StateError(
            f"A study is written to a new folder, or goes on in its own; got `{folder}`, which holds `{foreign[0]}`. "
            "Name another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(
            f"The folder of a study must be writable; got `{folder}`: {error.strerror or error}. Name another folder."
        ) from None


def _name(storage: str | None, folder: Path) -> str:
    """In a database a study goes by the name of its folder; a file has one study, wherever the folder is moved."""
    return "study" if storage is None else folder.absolute().name


def _open(board: Board, folder: Path, job: Mapping[str, Any], queue: list[dict[str, Any]], *, overwrite: bool) -> None:
    """Make the study in its storage, or take part in the one that is there, if it asks for the same."""
    if overwrite:
        board.delete()
        shutil.rmtree(folder / TRIALS, ignore_errors=True)
        (folder / STUDY).unlink(missing_ok=True)
    board.create(job, queue)
    changes = [change for change in differences(board.job(), job) if not change.startswith(NEUTRAL)]
    if changes:
        raise StateError(
            f"A study goes on with the options it was begun with; got `{folder}` with {'; '.join(changes)}. Leave them "
            "out, replace the study (`--overwrite`), or begin another one."
        )


def _pruner(study: StudyConfig, space: Space, images: ImageData, board: Board) -> Hyperband | None:
    if study.pruner == "none":
        return None
    epochs = _epochs(space.configure(_longest(space))[1], images)
    return Hyperband(board, first_look=study.first_look, factor=study.pruning_factor, max_epochs=epochs)


def _longest(space: Space) -> dict[str, Any]:
    """Values with the most epochs that a trial may have."""
    longest: dict[str, Any] = {}
    for one in space.dimensions:
        values = one.values if isinstance(one.values, tuple) else (one.values.high,)
        if one.field in ("epochs", "max_steps") and one.kind == "recipe":
            longest[one.name] = max(values, key=lambda value: value or 0)
    return longest


def _epochs(recipe: Recipe, images: ImageData) -> int:
    steps = num_batches(images.train, recipe.batch_size)
    return -(-recipe.max_steps // steps) if recipe.max_steps else recipe.epochs


def _steps(recipe: Recipe, images: ImageData) -> int:
    return recipe.max_steps or num_batches(images.train, recipe.batch_size) * recipe.epochs


def sampler_of(study: StudyConfig, index: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler for one trial, with a seed of its own: what a trial gets depends on the results before it, not
    on who asks."""
    seed = (study.sampler_seed + 7919 * index) % 2**32
    if study.sampler != "tpe":
        return optuna.samplers.RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns of what it may still change
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


@dataclasses.dataclass(frozen=True, slots=True)
class _Worker:
    """Takes trials from the queue until none is left."""

    trials: Trials
    board: Board
    job: Mapping[str, Any]
    folder: Path
    command: tuple[str, ...]
    deferred: dict[int, str] = dataclasses.field(default_factory=dict)
    """By number: the signatures of trials whose like another worker was training."""

    def work(self) -> StudyRecord:
        audience = self.trials.audience
        begun = self._write("running")
        records = self.board.records()
        study = self.trials.study
        ahead = Ahead(
            seeds=study.seeds,
            steps=max(0, (begun.steps_in_full or 0) - begun.steps),
            unsound=study.allow_unsound or not study.check,
        )
        audience.begin(len(records), sum(one.status not in ("waiting", "running") for one in records), ahead)
        while True:
            claim = self.board.claim(partial(sampler_of, self.trials.study), later=self._later())
            if claim is not None:
                self._try(claim)
            elif self.board.is_over():
                return self._write("finished")
            else:
                audience.wait(sum(one.status == "running" for one in self.board.records()))
                time.sleep(min(2.0, self.board.grace / 4))

    def _later(self) -> list[int]:
        """The trials that still wait for the result of another."""
        twins = {index: self.board.twin(signature, index) for index, signature in self.deferred.items()}
        return [index for index, twin in twins.items() if twin is not None and twin.status == "running"]

    def _try(self, claim: Claim) -> None:
        try:
            with claim:
                trial = self.trials.run(claim)
                claim.finish(trial)
        except Taken:
            return
        except Deferred as wait:
            claim.release()
            self.deferred[claim.index] = str(wait)
            return
        except BaseException as error:
            claim.release()
            self._write("interrupted" if isinstance(error, KeyboardInterrupt) else "running")
            raise
        self.trials.audience.finish(trial)
        self._write("running")

    def _write(self, status: Literal["running", "finished", "interrupted"]) -> StudyRecord:
        """Write `study.json` as the storage knows the study."""
        records = self.board.records()
        for_all = self.trials
        ended = [one for one in records if one.status == "finished" and one.value is not None]
        best = max(ended, key=lambda one: (one.value or 0, -one.number), default=None)
        processes = Processes(for_all.space.recipe)
        place = self.folder / STUDY
        earlier = read_study(place) if place.is_file() else None
        record = StudyRecord(
            status=status,
            name=self.board.name,
            job=self.job,
            command=self.command,
            fields={one.name: one.describe() for one in for_all.space.dimensions},
            model=for_all.bench.model,
            data=describe_data(for_all.images),
            environment=describe_environment(
                processes, resolve_precision(for_all.space.recipe, processes.state.device)
            ),
            metric=BEST[for_all.images.task],
            trials=tuple(records),
            best=best.number if best else None,
            steps=sum(one.steps for one in records),
            steps_in_full=self._steps_in_full(records),
            started=earlier.started if earlier else now(),
            finished=now() if status == "finished" else None,
            seconds=sum(one.seconds for one in records),
        )
        record.save(self.folder)
        return record

    def _steps_in_full(self, records: Sequence[TrialRecord]) -> int:
        """Of trials whose values are not known yet, as many as the recipe says."""
        total = 0
        for record in records:
            try:
                recipe = self.trials.space.configure(record.values)[1]
            except ConfigError:  # values that do not go together
                recipe = self.trials.space.recipe
            total += _steps(recipe, self.trials.images) * self.trials.study.seeds
        return total
