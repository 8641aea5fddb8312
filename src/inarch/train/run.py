"""One training from the data to the adapter folder, or the same one with several seeds.

`train_run` does what `inarch train` does, without printing. Started by `accelerate launch` or `torchrun` on several
processes, it computes what it computes on one: the batch size is that of all processes together. A training sets
torch's global random state, so there is one at a time in a process.
"""

import contextlib
import dataclasses
import gc
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState, set_seed

from ..check import Data, Training
from ..core.drafts import replace_folder
from ..core.errors import ConfigError, DataError, SetupError, SiteError, StateError
from ..core.records import RunRecord, SeedsRecord, SiteRecord, Status
from ..core.table import counted
from ..data import load_data
from ..data.examples import ImageData
from ..handle import Adapters, Unsound, attach
from ..heads import task_head
from ..methods import AdapterConfig, ConfigLike, read_config
from ..sites import probe
from . import resume as checkpoints
from .callbacks import Divergence, Patience, Report
from .folder import RunFolder
from .image_trainer import ImageTrainer, make_trainer, reports, resolve_precision
from .known import check_taken, known_data, sample_batch
from .ledger import Ledger, describe_data, describe_environment, describe_model, describe_sites, describe_verdict, now
from .metrics import BEST
from .models import load_model, load_processor
from .monitor import Monitor
from .processes import Processes
from .quiet import quiet
from .recipe import DataConfig, Recipe, Trains

logger = logging.getLogger(__name__)

Events = Sequence[TrainerCallback]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that is asked for."""

    recipe: Recipe
    model: str
    data: DataConfig | ImageData
    adapter: AdapterConfig | None
    trains: Trains
    name: str
    unsound: Unsound

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: str | os.PathLike[str],
        data: str | os.PathLike[str] | DataConfig | ImageData,
        adapter: ConfigLike | None,
        **options: Any,
    ) -> "Job":
        """A job from whatever describes its parts. Raises `ConfigError` for what cannot be."""
        given = data if isinstance(data, DataConfig | ImageData) else DataConfig(data=os.fspath(data))
        config = None if adapter is None else read_config(adapter)
        trains = options["trains"]
        if (config is None) != (trains != "adapter"):
            raise ConfigError(
                "A configuration is given where an adapter is trained, and only there; got "
                f"{f'`{config}`' if config else 'none'} to train the {trains}. "
                + ("Give one, as in `seq_bn`." if config is None else "Leave it out.")
            )
        return cls(recipe=recipe, model=os.fspath(model), data=given, adapter=config, **options)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data. Data that came as an object is told by its name."""
        data = self.data.to_dict() if isinstance(self.data, DataConfig) else {"object": self.data.name}
        return {
            "model": self.model,
            "data": data,
            "adapter": None if self.adapter is None else self.adapter.to_dict(),
            "trains": self.trains,
            "name": self.name,
            "unsound": self.unsound,
            "recipe": self.recipe.to_dict(),
        }


def train_run(
    recipe: Recipe,
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | DataConfig | ImageData,
    adapter: ConfigLike | None,
    output: str | os.PathLike[str],
    *,
    trains: Trains = "adapter",
    name: str = "adapter",
    unsound: Unsound = "refuse",
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Events = (),
    command: Sequence[str] = (),
    images: ImageData | None = None,
) -> RunRecord:
    """Train a classifier of images and write it, with a record of the training, to a folder.

    **Arguments**

    - `model`: a folder, the id of a model on the Hub, or `demo`.
    - `data`: what `load_data` reads, with options as a `DataConfig`, or data already loaded.
    - `adapter`: a configuration; None where `trains` is `head` or `full`, for comparison.
    - `name`: the name of the adapter.
    - `unsound`: `allow` takes a configuration that provably does not keep the pre-trained function.
    - `resume`: go on with the run in the folder; `overwrite`: replace it.
    - `callbacks`: of the transformers trainer, for example to show progress. One with a method `on_verdict` is given
      the monitor when its verdict changes, one with a method `on_known` what the rules of a check know of the images.
    - `command`: the command line, for the record.
    - `images`: what `data` describes, where that is loaded already.

    Returns the record. Its status is `finished`, or `diverged` where the loss stopped being a number, or `stopped`
    where the recipe's `stop_early` ended it, for which `monitor` has the reason; such a run goes on where it is resumed
    with `stop_early=False`. Ctrl-C leaves the newest checkpoint, the status `interrupted`, and raises
    `KeyboardInterrupt`.

    Raises `InarchError` of every kind for whatever cannot be used; nothing is written then.
    """
    job = Job.of(recipe, model, data, adapter, trains=trains, name=name, unsound=unsound)
    folder = RunFolder(output)
    processes = Processes(recipe)
    earlier = processes.agree(lambda: folder.admit(job.to_dict(), resume=resume, overwrite=overwrite))
    if isinstance(earlier, SeedsRecord):
        raise StateError(
            f"A run of several seeds is resumed with as many; got one for `{folder.path}`, which has "
            f"{earlier.num_seeds}. Call `train_seeds`."
        )
    return _Run(job, _load(job, images), folder, processes, tuple(callbacks), tuple(command)).train(earlier)


def train_seeds(
    recipe: Recipe,
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | DataConfig | ImageData,
    adapter: ConfigLike | None,
    output: str | os.PathLike[str],
    *,
    num_seeds: int,
    trains: Trains = "adapter",
    name: str = "adapter",
    unsound: Unsound = "refuse",
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Events = (),
    command: Sequence[str] = (),
) -> SeedsRecord:
    """Train with `num_seeds` seeds, from that of the recipe on, each in a folder of its own below `output`.

    The data are divided alike for all seeds. Resuming leaves finished seeds alone.
    """
    job = Job.of(recipe, model, data, adapter, trains=trains, name=name, unsound=unsound)
    if num_seeds < 2:
        raise ConfigError(f"Several seeds are at least 2; got {num_seeds}. Use `train_run` for one.")
    whole = {**job.to_dict(), "seeds": num_seeds}
    folder = RunFolder(output)
    processes = Processes(recipe)
    earlier = processes.agree(lambda: folder.admit(whole, resume=resume, overwrite=overwrite))
    images = _load(job)
    runs: list[RunRecord] = []

    def summarise() -> None:
        SeedsRecord.of(runs, num_seeds, whole, command).save(folder.path)

    def begin() -> None:
        folder.make()
        summarise()

    for seed in range(recipe.seed, recipe.seed + num_seeds):
        one = dataclasses.replace(job, recipe=recipe.replace(seed=seed))
        place = folder.seed(seed)
        going = None if earlier is None else processes.agree(partial(place.begun, one.to_dict()))
        run = _Run(one, images, place, processes, tuple(callbacks), tuple(command))
        runs.append(run.train(going, begin if earlier is None and not runs else None))
        processes.agree(summarise)
    return SeedsRecord.of(runs, num_seeds, whole, command)


def _load(job: Job, images: ImageData | None = None) -> ImageData:
    """The images; refused where they do not go with the recipe."""
    if images is None:
        images = job.data if isinstance(job.data, ImageData) else load_data(**job.data.arguments())
    if job.recipe.patience is not None and not len(images.validation):
        raise ConfigError(
            f"`Recipe.patience` needs images to validate on; got none in `{images.name}`. Give a `validation` above 0."
        )
    if job.recipe.label_smoothing and images.task == "multi_label":
        raise ConfigError(
            f"`Recipe.label_smoothing` is for one label an image; got several in `{images.name}`. Set it to 0."
        )
    return images


@dataclass(frozen=True, slots=True)
class _Run:
    """One run, from the model to the written result."""

    job: Job
    images: ImageData
    folder: RunFolder
    processes: Processes
    callbacks: tuple[TrainerCallback, ...]
    command: tuple[str, ...]

    def train(self, earlier: RunRecord | None, begin: Callable[[], None] | None = None) -> RunRecord:
        """Train, or go on with an earlier part. Everything is checked before `begin` or this writes anything."""
        if earlier is not None and (
            earlier.status == "finished" or (earlier.status == "stopped" and self.job.recipe.stop_early)
        ):
            logger.info("The run in `%s` is %s already.", self.folder.path, earlier.status)
            return earlier
        if earlier is not None:
            _check_same(earlier, self.images, self.processes)
        reports(self.job.recipe)
        set_seed(self.job.recipe.seed)
        network = load_model(self.job.model, self.images.labels, task=self.images.task)
        processor = load_processor(self.job.model)
        batch = sample_batch(self.images.train, processor, 1 if self.job.adapter is None else None)
        check_taken(network, batch, self.job.model)
        handle = _make_trainable(network, self.job)
        data = known_data(batch, processor, self.images.labels)
        for one in self.callbacks:
            if hasattr(one, "on_known"):
                one.on_known(data)
        record = earlier or self._new_record(network, handle, data)
        ledger = Ledger(
            self.folder, dataclasses.replace(record, status="running", job=self.job.to_dict(), finished=None)
        )

        def start() -> None:
            if begin is not None:
                begin()
            if earlier is None:
                self.folder.make()
            self.folder.clean()
            ledger.write()

        self.processes.agree(start)
        return self._finish(network, processor, handle, ledger)

    def _finish(self, network: nn.Module, processor: Any, handle: Adapters | None, ledger: Ledger) -> RunRecord:
        checkpoint = checkpoints.latest(self.folder.checkpoints)
        monitor = Monitor(
            label_prior=_label_prior(self.images),
            multi_label=self.images.task == "multi_label",
            label_smoothing=self.job.recipe.label_smoothing,
            stop=self.job.recipe.stop_early,
        )
        listeners = [one.on_verdict for one in self.callbacks if hasattr(one, "on_verdict")]
        monitor.listeners = listeners or monitor.listeners
        ledger.watched = monitor.record
        trainer = make_trainer(
            network,
            processor,
            self.images,
            self.job.recipe,
            trains=self.job.trains,
            folder=self.folder,
            processes=self.processes,
            callbacks=[monitor, *([Report(ledger.update)] if self.processes.is_main else []), *self.callbacks],
            is_resumed=checkpoint is not None,
        )
        try:
            with _collecting_little():
                _go_on(trainer, checkpoint, ledger)
        except KeyboardInterrupt:
            if self.processes.is_main:
                ledger.update(trainer.state, status="interrupted")
            raise
        status: Status = "stopped" if monitor.record().stopped else "finished"
        if any(isinstance(one, Divergence) and one.has_diverged for one in trainer.callback_handler.callbacks):
            status = "diverged"
            logger.warning(
                "The loss of a training must stay a number; got none in `%s`, epoch %g. Lower `learning_rate` from %g.",
                self.folder.path, trainer.state.epoch or 0, self.job.recipe.rate(self.job.trains),
            )  # fmt: skip
        if status != "diverged" or trainer.state.best_model_checkpoint:
            self.processes.agree(lambda: _write_result(self.job.name, self.folder, network, handle, processor))
        return self.processes.agree(lambda: ledger.update(trainer.state, status))

    def _new_record(self, network: nn.Module, handle: Adapters | None, data: Data) -> RunRecord:
        job = self.job
        precision = resolve_precision(job.recipe, self.processes.state.device)
        report = None
        if handle is not None:
            report = handle.check(
                training=Training(learning_rate=job.recipe.rate(job.trains)),
                data=data,
                measure=False,
            )
        return RunRecord(
            name=job.name,
            trains=job.trains,
            adapter=None if job.adapter is None else str(job.adapter),
            seed=job.recipe.seed,
            job=job.to_dict(),
            command=self.command,
            model=describe_model(job.model, network, handle),
            data=describe_data(self.images),
            verdict=None if report is None else describe_verdict(report),
            sites=_bare_sites(network) if handle is None else describe_sites(handle.sites, report),
            environment=describe_environment(self.processes, precision),
            metric=BEST[self.images.task] if len(self.images.validation) else None,
            started=now(),
        )


def _bare_sites(network: nn.Module) -> tuple[SiteRecord, ...]:
    """Where adapters could be, of a model that is trained without; nothing for one that has no place for them."""
    try:
        return describe_sites(probe(network))
    except SiteError:
        return ()


@contextlib.contextmanager
def _collecting_little() -> Iterator[None]:
    """Spare the garbage collector what is there already: the trainer calls it at every start, 0.3 s each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _go_on(trainer: ImageTrainer, checkpoint: Path | None, ledger: Ledger) -> None:
    """Train from a checkpoint, or from the start, to the end."""
    if checkpoint is None:
        ledger.start(0)
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoints.require(checkpoint) / checkpoints.STATE))
    logger.info("Going on from `%s`.", checkpoint)
    ledger.start(state.global_step)
    patience = [one for one in trainer.callback_handler.callbacks if isinstance(one, Patience)]
    if any(one.is_exhausted(state) for one in patience):
        # It had stopped early, at the end of an epoch: what is left is to load the best checkpoint.
        trainer.args.num_train_epochs = round(state.epoch or 0)
        trainer.args.max_steps = -1
    trainer.train(resume_from_checkpoint=str(checkpoint))


def _check_same(earlier: RunRecord, images: ImageData, processes: Processes) -> None:
    """Refuse to go on with other data; announce what makes the result another one in the last digits."""
    described = describe_data(images)
    for key, before in earlier.data.items():
        if described.get(key) != before:
            raise DataError(
                f"A run is resumed with the data it was started with; got other `{key}` in `{images.name}`: "
                f"{_brief(described.get(key))} instead of {_brief(before)}. Restore the data, or start another run."
            )
    number = earlier.environment.get("processes")
    if number != processes.number and processes.is_main:
        logger.warning(
            "The result is the same to the last bit only on as many processes; this run, begun on %s, goes on with %d.",
            number, processes.number,
        )  # fmt: skip


def _label_prior(images: ImageData) -> list[float]:
    """How often each label occurs in training."""
    counts: Counter[int] = Counter()
    for target in images.train.targets:
        counts.update((target,) if isinstance(target, int) else target)
    return [counts[label] / len(images.train) for label in range(len(images.labels))]


def _brief(value: object) -> str:
    return f"{counted(len(value), 'label')}, {str(value)[:80]}" if isinstance(value, list) else repr(value)


def _make_trainable(network: nn.Module, job: Job) -> Adapters | None:
    """Add the adapter, and freeze what is not trained."""
    if not task_head(network):
        raise SetupError(
            f"A model to classify images must have a task head; got {type(network).__name__} of `{job.model}`, where "
            "none is known. Use another model."
        )
    if job.adapter is None:
        head = {id(p) for path in task_head(network) for p in network.get_submodule(path).parameters()}
        for parameter in network.parameters():
            parameter.requires_grad_(job.trains == "full" or id(parameter) in head)
        return None
    handle = attach(network)
    handle.add(job.name, job.adapter, unsound=job.unsound)
    handle.train(job.name)
    return handle


def _write_result(name: str, folder: RunFolder, network: nn.Module, handle: Adapters | None, processor: Any) -> None:
    """Write the best adapter or, where there is none, the whole model."""
    if handle is not None:
        handle.save(name, folder.adapter, processor=processor)
        return
    draft = folder.path / ".model.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        with quiet():
            network.save_pretrained(draft)  # type: ignore[operator]
        processor.save_pretrained(draft)
        replace_folder(draft, folder.model)
    except OSError as error:
        raise StateError(
            f"The trained model must be writable; got `{folder.model}`: {error.strerror or error}. Free some space, "
            "and resume the run to write it."
        ) from None
