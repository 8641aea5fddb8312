"""Folders that are written beside their place and put there whole, so that a reader sees the old one or the new one.

A process keeps a lock on its drafts, which the system takes back when it ends, however it ends. So a draft that another
process left behind is known by its lock, and goes when the next folder is written to the same place.
"""

import ctypes
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where drafts of killed processes stay
    fcntl = None  # type: ignore[assignment]


@contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` for the length of a block, to be filled and put there, and gone afterwards.

    Raises `OSError` where there can be none.
    """
    _clear(target)
    draft = _hidden(target, "draft")
    draft.mkdir(parents=True)
    lock = _lock(draft)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def replace_folder(draft: Path, target: Path) -> None:
    """Put the finished folder `draft` in the place of `target` by renaming, and make the renaming durable."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and _exchange(draft, target):
        old = draft
    elif target.exists():
        old = _hidden(target, "old")
        target.rename(old)
        try:
            draft.rename(target)
        except OSError:
            old.rename(target)
            raise
    else:
        draft.rename(target)
        old = None
    sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.{kind}"


def _clear(target: Path) -> None:
    """Delete what processes that were killed have left of earlier writings to the same place."""
    hidden = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.(draft|old)")
    for path in list(target.parent.iterdir()) if target.parent.is_dir() else ():
        match = hidden.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        if match[1] == "old" and target.exists():  # else it is the only one, between two renames
            shutil.rmtree(path, ignore_errors=True)
        # One without anything in it may be about to be locked.
        elif match[1] == "draft" and any(path.iterdir()) and (lock := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """The descriptor that holds the lock on a folder; None where another has it, or the file system has none."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _RENAME_EXCHANGE) == 0


_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2(2)
