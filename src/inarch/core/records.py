"""What a training run leaves behind for programs to read: `run.json`, as plain data.

    RunRecord     one training: what was asked for, on what, with what outcome
    SeedsRecord   the same training repeated with several seeds: mean and standard deviation

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

RECORD = "run.json"
RECORD_VERSION = 1

Status = Literal["running", "finished", "interrupted", "diverged", "stopped"]
"""`running` is also what a killed run says; `diverged` is one whose loss stopped being a number; `stopped` one that its
monitor ended early."""


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
class VerdictRecord:
    """What was proved of an adapter before it was trained."""

    sound: bool
    groups: tuple[GroupRecord, ...] = ()
    findings: tuple[str, ...] = ()


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
    is below); `update` and `drift`, relative to weights and stream, and `drift_at_start`."""
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
    """`id`, `revision`, `class`, `type`, `parameters`, `trainable`, `adapter_parameters`."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """`name`, `task`, `labels`, `train` and `validation` (numbers of images)."""
    verdict: VerdictRecord | None = None
    monitor: MonitorRecord | None = None
    """None in records from before there was a monitor, and before the first step."""
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
        verdict = known.get("verdict")
        if verdict is not None:
            groups = tuple(GroupRecord(**_known(GroupRecord, row)) for row in verdict.get("groups", ()))
            known["verdict"] = VerdictRecord(
                sound=verdict["sound"], groups=groups, findings=tuple(verdict.get("findings", ()))
            )
        if known.get("monitor") is not None:
            known["monitor"] = MonitorRecord.from_dict(known["monitor"])
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
