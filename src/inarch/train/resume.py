"""Checkpoints on disk: each is there as a whole or not at all.

A checkpoint is written under a hidden name, flushed to the disk, and then renamed: whoever sees `checkpoint-40` sees
all of it. One that is dropped is renamed before it is deleted, so that no half of it keeps the name.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..core.drafts import replace_folder, sync
from ..core.errors import StateError

ADAPTERS, TRAINABLE = "adapters", "trainable.safetensors"
STATE, OPTIMISER, SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"

_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN = re.compile(r"\.checkpoint-\d+\..+")


def draft_of(folder: Path) -> Path:
    """The folder in which a checkpoint is written before it is committed: the same for all processes."""
    return folder.with_name(f".{folder.name}.draft")


def begin(folder: Path) -> None:
    """Make an empty place for the draft of a checkpoint."""
    shutil.rmtree(draft_of(folder), ignore_errors=True)
    draft_of(folder).mkdir(parents=True)


def commit(folder: Path) -> None:
    """Make the folder of that name in the draft the checkpoint."""
    written = draft_of(folder) / folder.name
    for path in (*sorted(written.rglob("*")), written):
        sync(path)
    replace_folder(written, folder)
    shutil.rmtree(draft_of(folder), ignore_errors=True)


def drop(folder: Path) -> None:
    """Delete a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def checkpoints(place: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    found = [
        (int(match[1]), path)
        for path in _entries(place)
        if (match := _NAME.fullmatch(path.name)) and (path / STATE).is_file()
    ]
    return [path for _, path in sorted(found)]


def latest(place: Path) -> Path | None:
    """The newest whole checkpoint of a folder."""
    found = checkpoints(place)
    return found[-1] if found else None


def rotate(place: Path, keep: int | None, best: Path | None) -> None:
    """Drop the oldest checkpoints beyond `keep`, but never the best nor the newest."""
    found = checkpoints(place)
    spare = [path for path in found[:-1] if best is None or path.name != best.name]
    for path in spare[: max(0, len(found) - keep) if keep else 0]:
        drop(path)


def clean(place: Path) -> None:
    """Delete what killed processes left behind."""
    for path in _entries(place):
        if _HIDDEN.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def require(folder: str | os.PathLike[str]) -> Path:
    """A checkpoint to resume from. Raises `StateError` if it is none."""
    path = Path(folder)
    missing = [name for name in (STATE, OPTIMISER, SCHEDULER) if not (path / name).is_file()]
    if missing:
        raise StateError(
            f"A checkpoint holds `{STATE}`, `{OPTIMISER}` and `{SCHEDULER}`; got no `{missing[0]}` in `{path}`. "
            "Give a checkpoint that the trainer wrote, or resume from the one before it."
        )
    return path


def _entries(place: Path) -> Iterator[Path]:
    return place.iterdir() if place.is_dir() else iter(())
