"""Records as the rows of a page: what each run is called, what it was given, how it did, and where the runs differ."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.records import RunRecord, SeedsRecord, SiteRecord

Value = str | float | int | bool | None
_NOT_SETTINGS = ("seeds", "name", "unsound", "adapter", "trains", "recipe.seed", "recipe.workers", "recipe.report_to")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One run, or one training repeated with several seeds."""

    number: int
    """From 1, in the order of the page: what its lines and points are labelled with."""
    name: str
    """The folder's name."""
    place: str
    """Where it was read."""
    record: RunRecord | SeedsRecord

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        """One, or one for each seed that has finished."""
        return self.record.runs if isinstance(self.record, SeedsRecord) else (self.record,)

    @property
    def first(self) -> RunRecord | None:
        """What stands for all seeds; None before the first one has finished."""
        return self.runs[0] if self.runs else None

    @property
    def configuration(self) -> str:
        """What is trained, as one line."""
        trains = self.record.job.get("trains", "adapter")
        if trains != "adapter":
            return {"head": "head only", "full": "whole model"}.get(str(trains), str(trains))
        return (self.first.adapter if self.first is not None else None) or "adapter"

    @property
    def metric(self) -> str:
        """What says how good it is: a metric where higher is better, or the training loss."""
        return (self.first.metric if self.first is not None else None) or "train_loss"

    @property
    def values(self) -> list[float]:
        """The result of each run that has one."""
        found = (run.results.get(self.metric) for run in self.runs)
        return [float(value) for value in found if value is not None]

    @property
    def value(self) -> float | None:
        """The mean over the seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds (n - 1); None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def rank(self) -> tuple[bool, float]:
        """What sorts the best last."""
        if self.value is None:
            return (False, 0.0)
        return (True, -self.value if self.metric == "train_loss" else self.value)

    def number_of(self, key: str) -> int | None:
        """A number of the model's record, such as `trainable`."""
        found = self.first.model.get(key) if self.first is not None else None
        return int(found) if isinstance(found, int | float) else None

    @property
    def seconds(self) -> float | None:
        """The mean time of a run."""
        return statistics.fmean(run.seconds for run in self.runs) if self.runs else None

    @property
    def sound(self) -> bool | None:
        """Whether the pre-trained function was proved to be kept; None where nothing was judged."""
        if self.first is None or self.first.verdict is None:
            return None
        return self.first.verdict.sound

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """The model's sites and what is grafted there."""
        return self.first.sites if self.first is not None else ()

    @property
    def settings(self) -> dict[str, Value]:
        """All that was asked for, by name: `learning_rate`, `reduction_factor`, ..."""
        found: dict[str, Value] = {"configuration": self.configuration}
        found |= {key.rpartition(".")[2]: value for key, value in _flat(self.record.job) if key not in _NOT_SETTINGS}
        adapter = self.record.job.get("adapter")
        methods = adapter.get("methods", ()) if isinstance(adapter, Mapping) else ()
        for method in methods:
            prefix = f"{method.get('method')}." if len(methods) > 1 else ""
            found |= {f"{prefix}{key}": value for key, value in _flat(method)}
        return found


def differing(entries: Sequence[Entry]) -> list[str]:
    """The settings that all entries have and that are not the same in all of them."""
    settings = [entry.settings for entry in entries]
    if len(settings) < 2:
        return []
    shared = [key for key in settings[0] if all(key in one for one in settings)]
    found = [key for key in shared if len({str(one[key]) for one in settings}) > 1]
    # The line of a configuration says nothing more where the fields that differ are all there.
    fields = [key for key in found if key != "configuration"]
    distinct = {tuple(str(one[key]) for key in fields) for one in settings}
    whole = {tuple(str(one[key]) for key in found) for one in settings}
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
