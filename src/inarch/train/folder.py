"""The folder of a run, and what may be done with one that is there already:

    run.json                   the record: what was asked for, the environment, every epoch, the results
    report.html                what `inarch report` made of it
    adapter/                   the best adapter with its task head, labels and image processing
    model/                     instead, the whole model, where a head alone or all of the model is trained
    checkpoints/checkpoint-N/  what training is resumed from
    logs/                      for TensorBoard, where it is asked for
    seed-K/                    with several seeds: such a folder for each

Nothing of another origin is ever deleted.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import StateError
from ..core.records import RECORD, RunRecord, SeedsRecord, nothing_to_resume, read_record

_OWN = re.compile(
    r"run\.json|report\.html|adapter|model|checkpoints|logs|seed-\d+|\.(run\.json|report\.html|adapter|model)\..+"
)

NEUTRAL = ("recipe.workers", "recipe.report_to", "recipe.keep_checkpoints", "recipe.save_steps", "recipe.stop_early")
"""Options that change no weight: a run may be resumed with others."""


class RunFolder:
    """Where one run writes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"

    def seed(self, number: int) -> "RunFolder":
        """The folder of one of several seeds."""
        return RunFolder(self.path / f"seed-{number}")

    def admit(self, job: Mapping[str, Any], *, resume: bool, overwrite: bool) -> RunRecord | SeedsRecord | None:
        """The run to be resumed, or None where a new one may be written. Nothing is changed.

        Raises `StateError` for a folder that cannot be used so.
        """
        self._check_place()
        entries = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        foreign = [name for name in entries if not _OWN.fullmatch(name)]
        if foreign:
            raise StateError(
                f"A run is written to a new folder, or over another run; got `{self.path}`, which holds other things, "
                f"such as `{foreign[0]}`. Name another folder."
            )
        if resume:
            return self._unchanged(job)
        if entries and not overwrite:
            raise StateError(
                f"A run is written to a new folder; got `{self.path}`, which holds {self._description()}. Go on with "
                "it (`--resume`), replace it (`--overwrite`), or name another folder."
            )
        return None

    def begun(self, job: Mapping[str, Any]) -> RunRecord | None:
        """The run in this folder, one of several that are resumed together; None if it has not begun."""
        found = self._unchanged(job) if (self.path / RECORD).is_file() else None
        assert not isinstance(found, SeedsRecord)
        return found

    def make(self) -> None:
        """Make the folder, empty. Raises `StateError` if that cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # The record last: a folder half emptied is still known as a run.
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == RECORD):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError as error:
            raise StateError(self._unusable(error.strerror or str(error))) from None

    def clean(self) -> None:
        """Delete what a killed process left half written."""
        for entry in self.path.iterdir():
            if entry.name.startswith("."):
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _check_place(self) -> None:
        nearest = self.path.absolute()
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        if not nearest.is_dir():
            raise StateError(self._unusable(f"`{nearest}` is no folder"))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise StateError(self._unusable(f"`{nearest}` is not yours to write"))

    def _unusable(self, reason: str) -> str:
        return f"The output folder must be writable; got `{self.path}`: {reason}. Name another folder."

    def resumable(self) -> RunRecord | SeedsRecord:
        """The record of the run in this folder. Raises `StateError` if there is none."""
        if not (self.path / RECORD).is_file():
            raise StateError(nothing_to_resume(self.path, RECORD))
        return read_record(self.path)

    def _unchanged(self, job: Mapping[str, Any]) -> RunRecord | SeedsRecord:
        record = self.resumable()
        changes = [change for change in differences(record.job, job) if not change.startswith(NEUTRAL)]
        if changes:
            raise StateError(
                f"A run is resumed with the options it was started with; got `{self.path}` with {'; '.join(changes)}. "
                "Leave them out, or start another run."
            )
        return record

    def _description(self) -> str:
        try:
            record = read_record(self.path)
        except StateError:
            return "a part of a run"
        return f"a run of {record.job.get('trains')} `{record.job.get('name')}` ({record.status})"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What two nested mappings differ in, in words."""
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key} {now!r} instead of {before!r}"
