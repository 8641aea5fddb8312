"""What a training run leaves behind for programs to read: `run.json`, and `study.json` of a sweep, as plain data.

    RunRecord     one training: what was asked for, on what, with what outcome
    SiteRecord    in it: equal sites of the model, and what an adapter makes of them
    SeedsRecord   the same training repeated with several seeds: mean and standard deviation
    TrialRecord   one configuration of a study: what became of it, and who decided that
    StudyRecord   a study over configurations

Only the standard library is needed to read them. A file is written whole or not at all.
"""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from .errors import StateError
from .places import nearest_place

RECORD = "run.json"
STUDY = "study.json"
REPORT = "report.html"
"""The page that `inarch report` makes of a run, beside its record."""
RECORD_VERSION = 1

Status = Literal["running", "finished", "interrupted", "diverged", "stopped"]
"""`running` is also what a killed run says; `diverged` is one whose loss stopped being a number; `stopped` is one that
was ended before: by its monitor or, as a trial of a study, for being behind others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """What was measured at the end of an epoch; epoch 0 is before training."""

    epoch: float
    step: int
    train_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Of the validation images: `loss`, `accuracy` and so on; empty without validation images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """Equal sites of the model and the formula of the adapter there."""

    place: str
    arrangement: str
    pretrained: str
    adapted: str
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingRecord:
    """What will go wrong, or may, and how to mend it."""

    code: str
    level: str
    """`error`, `warning` or `note`."""
    place: str
    message: str
    fixes: tuple[str, ...] = ()
    """Changes of the configuration, each of which clears it."""
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRecord:
    """What was proved of an adapter before it was trained."""

    sound: bool
    groups: tuple[GroupRecord, ...] = ()
    findings: tuple[str, ...] = ()
    """Each as one line."""
    details: tuple[FindingRecord, ...] = ()
    """The same findings by their parts; empty in older records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRecord:
    """What an adapter puts at each of some equal sites."""

    adapter: str
    method: str
    port: str
    """`sublayer`, `linear` or `weight`."""
    role: str
    """Of the projection that is adapted, such as `q`; empty for a sublayer."""
    parameters: int
    """Of one such module."""
    formula: str = ""
    """What it makes of a projection; a sublayer's formula is its site's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRecord:
    """Equal residual sites of some layers of one stack, with what is grafted there."""

    stack: str
    role: str
    kind: str
    layers: tuple[int, ...]
    layer_class: str
    arrangement: str
    width: int
    projections: tuple[str, ...] = ()
    modules: tuple[ModuleRecord, ...] = ()
    pretrained: str = ""
    """What the sum computes without adapters; empty, as the next two, where no adapter touches the sum."""
    adapted: str = ""
    verdict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorRecord:
    """What the steps of a training showed while it went on."""

    verdict: str
    """`undecided`, `learning`, `stalled`, `diverging` or `dead adapter`."""
    step: int | None = None
    """The optimiser step in which it was decided; None while undecided."""
    num_steps: int | None = None
    reason: str = ""
    stopped: bool = False
    """Whether the training was ended for it."""
    reference: float | None = None
    """What the loss is compared with."""
    reference_kind: str | None = None
    """`label entropy`, what the labels' frequencies alone give; or `initial loss`, where that is not known."""
    evidence: Mapping[str, float | None] = field(default_factory=dict)
    """`start`, `recent`, `error` (standard error of `recent`) of the loss, `gain` (share of the reference by which it
    is below); `update` and `drift`, relative to weights and stream: all as they were when the verdict was decided, the
    latest while undecided. And `drift_at_start`."""
    losses: tuple[tuple[int, float | None], ...] = ()
    """The last step of some steps in a row, and their mean training loss."""
    gradients: Mapping[str, float | None] = field(default_factory=dict)
    """The norm of the gradient by site, and of the head, where they were last measured."""
    silent: tuple[str, ...] = ()
    """The sites that no gradient has reached."""
    history: tuple[tuple[int, str], ...] = ()
    """The steps in which the verdict changed, and to what."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record this data describes."""
        known = _known(cls, data)
        for key in ("losses", "history"):
            known[key] = tuple(tuple(row) for row in known.get(key, ()))
        return cls(**{**known, "silent": tuple(known.get("silent", ()))})

    def __str__(self) -> str:
        step = f" at step {self.step}" if self.step is not None else ""
        steps = f" of {self.num_steps}" if step and self.num_steps else ""
        return f"{self.verdict}{step}{steps}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One training run."""

    kind: Literal["run"] = "run"
    status: Status = "running"
    name: str
    """The name of the adapter."""
    trains: str
    """`adapter`, `head` or `full`."""
    adapter: str | None
    """The adapter's configuration as one line; None where no adapter is trained."""
    seed: int
    job: Mapping[str, Any]
    """All that was asked for: what a run is resumed with."""
    command: tuple[str, ...] = ()
    """The command line, where there was one."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """`id`, `revision`, `class`, `type`, `parameters`, `trainable`, `adapter_parameters`, `head_parameters`."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """`name`, `task`, `labels`, `train` and `validation` (numbers of images)."""
    verdict: VerdictRecord | None = None
    monitor: MonitorRecord | None = None
    """None in records from before there was a monitor, and before the first step."""
    sites: tuple[SiteRecord, ...] = ()
    """The model's sites in the order in which they run; empty where none is found, and in older records."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """`device`, `processes`, `threads`, `precision`, `platform`, `python`, `versions`."""
    metric: str | None = None
    """The metric that decides which epoch is the best; higher is better."""
    epochs: tuple[EpochRecord, ...] = ()
    best_epoch: float | None = None
    results: Mapping[str, float | None] = field(default_factory=dict)
    """The metrics of the best epoch or, without validation images, the training loss of the last one."""
    started: str = ""
    finished: str | None = None
    seconds: float = 0.0
    """Time spent in training and evaluation, over all parts of a run that was resumed."""
    images_per_second: float | None = None
    """Trained images by time, evaluation included, in the last part of the run."""
    peak_memory: int | None = None
    """The most memory in bytes: of the GPU, or of the process where there is none."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"format_version": RECORD_VERSION, **_plain(dataclasses.asdict(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record this data describes. Unknown keys, of a later version, are left out."""
        known = _known(cls, data)
        known["epochs"] = tuple(EpochRecord(**_known(EpochRecord, row)) for row in known.get("epochs", ()))
        known["verdict"] = _verdict(known.get("verdict"))
        if known.get("monitor") is not None:
            known["monitor"] = MonitorRecord.from_dict(known["monitor"])
        known["sites"] = tuple(map(_site, known.get("sites", ())))
        known["command"] = tuple(known.get("command", ()))
        return cls(**known)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `run.json` into a folder. Raises `StateError` if that fails; the old file is then still there."""
        return _write(Path(folder) / RECORD, self.to_dict())


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsRecord:
    """One training repeated with several seeds."""

    kind: Literal["seeds"] = "seeds"
    status: Status = "running"
    job: Mapping[str, Any]
    command: tuple[str, ...] = ()
    num_seeds: int
    runs: tuple[RunRecord, ...] = ()
    """The finished runs, in the order of their seeds."""
    mean: Mapping[str, float] = field(default_factory=dict)
    std: Mapping[str, float] = field(default_factory=dict)
    """The sample standard deviation (n - 1) of each result; missing for one seed."""

    @classmethod
    def of(cls, runs: Sequence[RunRecord], num_seeds: int, job: Mapping[str, Any], command: Sequence[str]) -> Self:
        """The summary of the runs that are finished so far."""
        keys = [key for key in (runs[0].results if runs else ()) if all(_finite(run.results.get(key)) for run in runs)]
        values = {key: [float(run.results[key] or 0) for run in runs] for key in keys}
        return cls(
            status="finished" if len(runs) == num_seeds else "running",
            job=job,
            command=tuple(command),
            num_seeds=num_seeds,
            runs=tuple(runs),
            mean={key: statistics.fmean(row) for key, row in values.items()},
            std={key: statistics.stdev(row) for key, row in values.items() if len(row) > 1},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        runs = [run.to_dict() for run in self.runs]
        data = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {"format_version": RECORD_VERSION, **_plain({**data, "runs": runs})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record this data describes."""
        known = _known(cls, data)
        known["runs"] = tuple(RunRecord.from_dict(row) for row in known.get("runs", ()))
        known["command"] = tuple(known.get("command", ()))
        return cls(**known)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `run.json` into a folder. Raises `StateError` if that fails; the old file is then still there."""
        return _write(Path(folder) / RECORD, self.to_dict())


TrialStatus = Literal[
    "waiting", "running", "finished", "diverged", "refused", "repeated", "pruned", "stopped", "failed"
]
"""`refused` before training, by a proof; `repeated`: proved to compute what another trial computes, with its
result; `pruned` and `stopped` during training; `failed`: its training raised an error, or its worker died more often
than it is retried."""

Judge = Literal["", "training", "check", "proof", "hyperband", "monitor", "worker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One configuration of a study."""

    number: int
    """Counted from 0, in the order of the study."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The varied fields, by their names in the study."""
    adapter: str | None = None
    """The whole configuration of the adapter as one line; None until it is known."""
    status: TrialStatus = "waiting"
    decided_by: Judge = ""
    """Who ended it: `training` by coming to its end, `check` or `proof` before it, `hyperband` or `monitor` in it."""
    reason: str = ""
    """Why, as a sentence; empty where training came to its end."""
    same_as: int | None = None
    """The trial that computes the same function, where the result is taken from one."""
    verdict: VerdictRecord | None = None
    """What was proved of it before training."""
    sites: tuple[SiteRecord, ...] = ()
    """The model's sites with what would be grafted there, of a trial that was not trained."""
    value: float | None = None
    """What is maximised: the mean over the seeds of the best epoch's metric; so far, where the trial was ended."""
    std: float | None = None
    """The sample standard deviation over the seeds."""
    seeds: Mapping[str, float] = field(default_factory=dict)
    """By seed: the metric of its best epoch."""
    curve: tuple[tuple[float, float], ...] = ()
    """Of the first seed: epoch, and metric after it."""
    parameters: int | None = None
    """Trained parameters of the adapter."""
    steps: int = 0
    """Optimiser steps spent on it, by all seeds and all attempts."""
    seconds: float = 0.0
    """Time spent on it, by all of them; of an attempt that was cut off, until its last epoch."""
    runs: tuple[str, ...] = ()
    """Folders of its runs, seen from the folder of the study."""
    attempts: int = 0
    """How often a worker began it."""
    worker: str = ""
    """`host:process` of the last one."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record this data describes. Unknown keys, of a later version, are left out."""
        known = _known(cls, data)
        known["verdict"] = _verdict(known.get("verdict"))
        known["sites"] = tuple(map(_site, known.get("sites", ())))
        known["curve"] = tuple((epoch, value) for epoch, value in known.get("curve", ()))
        known["runs"] = tuple(known.get("runs", ()))
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """A study over configurations."""

    kind: Literal["study"] = "study"
    status: Literal["running", "finished", "interrupted"] = "running"
    name: str
    """The name of the study in its storage."""
    job: Mapping[str, Any]
    """All that was asked for: `study` (what is varied, and how), `model`, `data`, `recipe`."""
    command: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    """By varied field: `kind` (`choices` or `range`), and its `choices`, or `low`, `high` and `log`."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """`id`, `class`, `type`, `parameters`, `head_parameters`."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """As in a run's record."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    metric: str = "accuracy"
    """What is maximised."""
    trials: tuple[TrialRecord, ...] = ()
    best: int | None = None
    """The number of the trial with the highest value among those whose training came to its end."""
    steps: int = 0
    """Optimiser steps spent, by all trials."""
    steps_in_full: int | None = None
    """Those that it would take to train every configuration, with every seed, to the end."""
    started: str = ""
    finished: str | None = None
    seconds: float = 0.0
    """Time spent on all trials, by all workers together."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        data = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        trials = [trial.to_dict() for trial in self.trials]
        return {"format_version": RECORD_VERSION, **_plain({**data, "trials": trials})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record this data describes. Unknown keys, of a later version, are left out."""
        known = _known(cls, data)
        known["trials"] = tuple(TrialRecord.from_dict(row) for row in known.get("trials", ()))
        known["command"] = tuple(known.get("command", ()))
        return cls(**known)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `study.json` into a folder. Raises `StateError` if that fails; the old file is then still there."""
        return _write(Path(folder) / STUDY, self.to_dict())


def nothing_to_resume(folder: Path, record: str) -> str:
    """What is said of a folder to go on in that has no `record`: `RECORD` of a run, or `STUDY`."""
    commands = {RECORD: ("run", "train"), STUDY: ("study", "sweep")}
    what, command = commands.pop(record)
    ((other_record, (other, other_command)),) = commands.items()
    if (folder / other_record).is_file():
        got, advice = f"a {other}", f"Go on with it by `inarch {other_command} --output {folder} --resume`."
    else:
        got = "none" if folder.is_dir() else "nothing"
        hint = nearest_place(str(folder), fits=lambda place: (place / record).is_file())
        advice = hint or f"Name the folder of a {what}, or begin one: `inarch {command}` with `--model` and `--data`."
    return f"To resume there must be a {what}; got {got} at `{folder}`. {advice}"


def read_study(place: str | os.PathLike[str]) -> StudyRecord:
    """The record of a study: its folder, or the file in it. Raises `StateError` if there is none that can be read."""
    path = Path(place)
    path = path / STUDY if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
        if version <= RECORD_VERSION and data["kind"] == "study":
            return StudyRecord.from_dict(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(
            f"A study is a folder with a readable `{STUDY}`; got `{path}`: {type(error).__name__}: {error}. "
            "Give the folder that `inarch sweep` wrote."
        ) from None
    raise StateError(
        f"This version reads studies of format 1 to {RECORD_VERSION}; got a {data['kind']} of format {version!r} in "
        f"`{path}`. Give the folder that `inarch sweep` wrote, or update inarch."
    )


def read_record(place: str | os.PathLike[str]) -> RunRecord | SeedsRecord:
    """The record of a run: its folder, or the file in it. Raises `StateError` if there is none that can be read."""
    path = Path(place)
    path = path / RECORD if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
        if version <= RECORD_VERSION:
            return SeedsRecord.from_dict(data) if data["kind"] == "seeds" else RunRecord.from_dict(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(
            f"A run is a folder with a readable `{RECORD}`; got `{path}`: {type(error).__name__}: {error}. "
            "Give the folder that `inarch train` wrote."
        ) from None
    raise StateError(
        f"This version reads runs of format 1 to {RECORD_VERSION}; got {version!r} in `{path}`. Update inarch."
    )


def _verdict(data: Mapping[str, Any] | None) -> VerdictRecord | None:
    if data is None:
        return None
    details = (_known(FindingRecord, row) for row in data.get("details", ()))
    return VerdictRecord(
        sound=data["sound"],
        groups=tuple(GroupRecord(**_known(GroupRecord, row)) for row in data.get("groups", ())),
        findings=tuple(data.get("findings", ())),
        details=tuple(FindingRecord(**{**row, "fixes": tuple(row.get("fixes", ()))}) for row in details),
    )


def _site(data: Mapping[str, Any]) -> SiteRecord:
    known = _known(SiteRecord, data)
    known["layers"] = tuple(map(int, known["layers"]))
    known["projections"] = tuple(known.get("projections", ()))
    known["modules"] = tuple(ModuleRecord(**_known(ModuleRecord, row)) for row in known.get("modules", ()))
    return SiteRecord(**known)


def _known(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(cls)}
    return {key: value for key, value in data.items() if key in names}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _plain(value: Any) -> Any:
    """JSON data; a number that is none (JSON has no NaN) becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write(path: Path, data: Mapping[str, Any]) -> Path:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise StateError(
            f"The record of a run must be writable; got `{path}`: {error.strerror or error}. "
            "Free some space or choose another folder."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return path
