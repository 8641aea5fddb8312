"""Records as the rows of a page: what each run is called, what it was given, how it did, and where the runs differ."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.records import MonitorRecord, RunRecord, SeedsRecord, SiteRecord, StudyRecord, TrialRecord, VerdictRecord

Value = str | float | int | bool | None
_NOT_SETTINGS = ("seeds", "name", "unsound", "adapter", "trains", "recipe.seed", "recipe.workers", "recipe.report_to")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One run, one training repeated with several seeds, or one trial of a study."""

    number: int
    """What its lines and points are labelled with: counted from 1 in the order of the page, or, where that shows one
    study and nothing else, the number of the trial."""
    name: str
    """The folder's name."""
    place: str
    """Where it was read."""
    record: RunRecord | SeedsRecord | TrialRecord
    study: StudyRecord | None = None
    """The study, of a trial."""
    trained: tuple[RunRecord, ...] = ()
    """The runs of a trial whose records are there."""

    @property
    def trial(self) -> TrialRecord | None:
        """The record of a trial; None for a run of its own."""
        return self.record if isinstance(self.record, TrialRecord) else None

    @property
    def label(self) -> str:
        """What it is called in a text: its number and its name, or the name that says the number."""
        return self.name if self.name == f"trial {self.number}" else f"{self.number} {self.name}"

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        """One, or one for each seed that has finished."""
        if isinstance(self.record, RunRecord):
            return (self.record,)
        return self.record.runs if isinstance(self.record, SeedsRecord) else self.trained

    @property
    def first(self) -> RunRecord | None:
        """What stands for all seeds; None before the first one has finished, and for a trial that was not trained."""
        return self.runs[0] if self.runs else None

    @property
    def job(self) -> Mapping[str, Any]:
        """All that was asked for."""
        if isinstance(self.record, TrialRecord):
            return self.study.job if self.study is not None else {}
        return self.record.job

    @property
    def configuration(self) -> str:
        """What is trained, as one line."""
        if self.trial is not None:
            return self.trial.adapter or "not yet known"
        trains = self.job.get("trains", "adapter")
        if trains != "adapter":
            return {"head": "head only", "full": "whole model"}.get(str(trains), str(trains))
        return (self.first.adapter if self.first is not None else None) or "adapter"

    @property
    def state(self) -> str:
        """How it ended; of a trial, who decided that where it was not the training itself."""
        status = str(self.record.status)
        judge = self.trial.decided_by if self.trial is not None else ""
        return f"{status} by {judge}" if judge not in ("", "training") else status

    @property
    def metric(self) -> str:
        """What says how good it is: a metric where higher is better, or the training loss."""
        if self.study is not None:
            return self.study.metric
        return (self.first.metric if self.first is not None else None) or "train_loss"

    @property
    def values(self) -> list[float]:
        """The result of each run that has one."""
        if self.trial is not None:
            return list(self.trial.seeds.values()) or ([] if self.trial.value is None else [self.trial.value])
        found = (run.results.get(self.metric) for run in self.runs)
        return [float(value) for value in found if value is not None]

    @property
    def value(self) -> float | None:
        """The mean over the seeds."""
        if self.trial is not None:
            return self.trial.value
        return statistics.fmean(self.values) if self.values else None

    @property
    def is_whole(self) -> bool:
        """Whether the result is that of a training that came to its end."""
        return self.trial is None or self.trial.status in ("finished", "repeated")

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds (n - 1); None for one."""
        if self.trial is not None:
            return self.trial.std
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def rank(self) -> tuple[bool, float]:
        """What sorts the best last."""
        if self.value is None:
            return (False, 0.0)
        return (self.is_whole, -self.value if self.metric == "train_loss" else self.value)

    def number_of(self, key: str) -> int | None:
        """A number of the model's record, such as `trainable`."""
        if self.trial is not None and key == "trainable":
            # Also of trials that were not trained; older studies do not know the size of the head.
            head = self.study.model.get("head_parameters") if self.study is not None else None
            found = None if self.trial.parameters is None else self.trial.parameters + int(head or 0)
        else:
            found = self.first.model.get(key) if self.first is not None else None
        return int(found) if isinstance(found, int | float) else None

    @property
    def seconds(self) -> float | None:
        """The mean time of a run."""
        if self.trial is not None:
            return self.trial.seconds / max(len(self.trial.seeds), 1)
        return statistics.fmean(run.seconds for run in self.runs) if self.runs else None

    @property
    def all_seconds(self) -> float:
        """The time of all its runs."""
        return self.trial.seconds if self.trial is not None else sum(run.seconds for run in self.runs)

    @property
    def verdict(self) -> VerdictRecord | None:
        """What was proved before training."""
        if self.first is not None and self.first.verdict is not None:
            return self.first.verdict
        return self.trial.verdict if self.trial is not None else None

    @property
    def sound(self) -> bool | None:
        """Whether the pre-trained function was proved to be kept; None where nothing was judged."""
        return None if self.verdict is None else self.verdict.sound

    @property
    def monitors(self) -> tuple[tuple[RunRecord, MonitorRecord], ...]:
        """The runs that were watched, each with what was seen of it while it went on."""
        return tuple((run, run.monitor) for run in self.runs if run.monitor is not None)

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """The model's sites and what is grafted there, or would be."""
        if self.first is not None:
            return self.first.sites
        return self.trial.sites if self.trial is not None else ()

    @property
    def model_class(self) -> str:
        """The class of the model; empty where it is not known."""
        model = self.first.model if self.first is not None else self.study.model if self.study is not None else {}
        return str(model.get("class", ""))

    @property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """Epochs and results of a trial, where its runs have left no record."""
        return self.trial.curve if self.trial is not None and not self.runs else ()

    @property
    def settings(self) -> dict[str, Value]:
        """All that was asked for, by name: `learning_rate`, `reduction_factor`, ..."""
        found: dict[str, Value] = {"configuration": self.configuration}
        if self.trial is not None:
            return found | dict(_flat(self.trial.values))
        found |= {key.rpartition(".")[2]: value for key, value in _flat(self.job) if key not in _NOT_SETTINGS}
        adapter = self.job.get("adapter")
        methods = adapter.get("methods", ()) if isinstance(adapter, Mapping) else ()
        for method in methods:
            prefix = f"{method.get('method')}." if len(methods) > 1 else ""
            found |= {f"{prefix}{key}": value for key, value in _flat(method)}
        return found


def differing(entries: Sequence[Entry]) -> list[str]:
    """The settings that are not the same in all entries: of runs those that all have, of trials all that are varied."""
    settings = [entry.settings for entry in entries if entry.trial is None or entry.trial.values]
    if len(settings) < 2:
        return []
    known = list(dict.fromkeys(key for one in settings for key in one))
    if not all(entry.trial is not None for entry in entries):
        known = [key for key in known if all(key in one for one in settings)]
    found = [key for key in known if len({str(one.get(key)) for one in settings}) > 1]
    # The line of a configuration says nothing more where the fields that differ are all there.
    fields = [key for key in found if key != "configuration"]
    distinct = {tuple(str(one.get(key)) for key in fields) for one in settings}
    whole = {tuple(str(one.get(key)) for key in found) for one in settings}
    return fields if len(distinct) == len(whole) and fields else found


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value]]:
    """The plain values of nested mappings; a list is one value, written out."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            if not any(isinstance(item, Mapping) for item in value):
                yield f"{prefix}{key}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{key}", value
