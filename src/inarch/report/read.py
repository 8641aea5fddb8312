"""Finds the records of runs in folders."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..core.errors import StateError
from ..core.records import RECORD, STUDY, RunRecord, SeedsRecord, read_record, read_study
from .entries import Entry


def read_entries(places: Sequence[str | os.PathLike[str]]) -> list[Entry]:
    """The runs in some places: folders of runs or of studies, their files, or folders with such folders at any depth.

    Each run once, in the order of the places; a study as its trials. Raises `StateError` for a place without a run, and
    for a record that cannot be read.
    """
    folders = [folder for place in places for folder in _runs(Path(place).expanduser())]
    distinct = list({folder.resolve(): folder for folder in folders}.items())
    names = _names([resolved for resolved, _ in distinct])
    entries: list[Entry] = []
    for (_, folder), name in zip(distinct, names, strict=True):
        if (folder / STUDY).is_file():
            entries += _trials(folder, name, len(entries) + 1) if len(distinct) > 1 else _trials(folder, "", 0)
        else:
            entries.append(Entry(number=len(entries) + 1, name=name, place=str(folder), record=read_record(folder)))
    return entries


def _trials(folder: Path, name: str, first: int) -> Iterator[Entry]:
    """The trials of a study, with the records of the runs that are there."""
    study = read_study(folder)
    for number, trial in enumerate(study.trials, start=first):
        records = [read_record(folder / run) for run in trial.runs if (folder / run / RECORD).is_file()]
        runs: list[RunRecord] = []
        for record in records:
            runs += record.runs if isinstance(record, SeedsRecord) else (record,)
        yield Entry(
            number=number,
            name=f"{name} trial {trial.number}".strip(),
            place=str(folder),
            record=trial,
            study=study,
            trained=tuple(runs),
        )


def _runs(place: Path) -> list[Path]:
    if place.is_file() and place.name in (RECORD, STUDY):
        return [place.parent]
    found = list(_below(place))
    if not found:
        reason = "which holds no run" if place.is_dir() else "where there is none" if not place.exists() else "a file"
        raise StateError(
            f"A report is of runs; got `{place}`, {reason}. Name the output folder of `inarch train` or "
            "`inarch sweep`, or a folder with such folders."
        )
    return found


def _below(place: Path) -> Iterator[Path]:
    """The folders of runs at or below a folder; the seeds of a run and the trials of a study are a part of it."""
    if (place / RECORD).is_file() or (place / STUDY).is_file():
        yield place
    elif place.is_dir():
        for entry in sorted(place.iterdir()):
            if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                yield from _below(entry)


def _names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths below the folder that they share."""
    if len(folders) == 1:
        return [folders[0].name]
    shared = os.path.commonpath(folders)
    return [folder.relative_to(shared).as_posix() for folder in folders]
