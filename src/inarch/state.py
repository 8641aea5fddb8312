"""Adapter folders: `adapter.safetensors` and `inarch.json`, written whole or not at all, read strictly.

Tensor keys are `{stack}.{layer}.{site role}.{method}.{parameter}` for adapters and `head.{path}.{parameter}` for the
task head trained with them: positions in the architecture, not names of modules, so that a renaming in the host
library changes nothing. No pickle is ever executed.
"""

import ctypes
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .core.errors import StateError
from .tensors import is_sharded, read_tensors, whole

TENSORS, RECORD, SETUP = "adapter.safetensors", "inarch.json", "setup.json"
FORMAT_VERSION = 2
"""Of the first, which was never released, nothing is read."""


Beside = Mapping[str, bytes] | Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Stored:
    """The contents of an adapter folder."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    folder: Path

    def stacks(self) -> set[str]:
        """The stacks of the base that the adapter touches."""
        return {key.partition(".")[0] for key in self.tensors if not key.startswith("head.")}


@dataclass(frozen=True, slots=True)
class Files:
    """The names of the two files of an adapter folder, and of others that may lie beside them."""

    tensors: str = TENSORS
    record: str = RECORD
    others: tuple[str, ...] = ()
    what: str = "an adapter"
    """What the folder holds."""


def write(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any] | None,
    files: Files = Files(),
    *,
    beside: Beside | None = None,
) -> Path:
    """Write an adapter folder whole or not at all: a reader sees the old folder or the new one, never a part of one.

    Arguments: `files` names its files where it is one of another library; `beside` are more files, by name, or what
    writes them into the folder; a `record` of None is not written.

    Where the system cannot let two folders change places (Linux can, on most file systems), there is an instant between
    two renames in which a reader sees none.

    Where several processes hold parts of the tensors, every process calls this, and the first one writes.

    Raises `StateError` if the folder holds something else, or cannot be written, or tensors are not in memory.
    """
    offloaded = [key for key, tensor in tensors.items() if tensor.is_meta]
    if offloaded:
        raise StateError(
            f"{files.what.capitalize()} is saved from memory; got {len(offloaded)} tensors without values, first "
            f"`{offloaded[0]}`, which are offloaded or on the meta device. Add or load the adapter after the model is "
            "offloaded."
        )
    values = {key: whole(tensor) for key, tensor in tensors.items()}
    if any(is_sharded(tensor) for tensor in tensors.values()):
        return _write_once(Path(folder), values, record, files, beside or {})
    return _write(Path(folder), values, record, files, beside or {})


def check_target(folder: str | os.PathLike[str], files: Files = Files()) -> Path:
    """The place of an adapter folder to be written, behind any links. Raises `StateError` for what is not replaced."""
    target = Path(folder).expanduser()
    try:
        is_free, found = not target.exists() or _replaceable(target, files), target.resolve()
    except (OSError, RuntimeError) as error:  # the latter for links that go round
        raise _unwritable(folder, files, error) from None
    if not is_free:
        raise StateError(
            f"{files.what.capitalize()} is saved into a new folder, an empty one, or over {files.what}; got "
            f"`{target}`, which holds {_contents(target)}. Choose another folder."
        )
    if found == Path.cwd():
        raise StateError(
            f"The folder of {files.what} is replaced as a whole; got `{target}`, the folder that the process is in, "
            "which would be left without one. Name a folder in it."
        )
    return found


def _write_once(
    folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None, files: Files, beside: Beside
) -> Path:
    """Let the first process write, and all of them know when it has, or why it could not."""
    from torch import distributed

    outcome = [""]
    if distributed.get_rank() == 0:
        try:
            _write(folder, tensors, record, files, beside)
        except StateError as error:
            outcome = [str(error)]
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise StateError(outcome[0])
    return folder


def _write(
    folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None, files: Files, beside: Beside
) -> Path:
    from safetensors.torch import save as to_bytes

    target = check_target(folder, files)
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True)
        # As bytes, because safetensors' own writer makes a file that only its owner can read.
        plain = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
        (draft / files.tensors).write_bytes(to_bytes(plain))
        version = {"format_version": FORMAT_VERSION} if files == Files() else {}
        if record is not None:
            (draft / files.record).write_text(
                json.dumps({**version, **record}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        if callable(beside):
            beside(draft)
        else:
            for name, content in beside.items():
                (draft / name).write_bytes(content)
        for path in draft.rglob("*"):
            sync(path)
        replace_folder(draft, target)
    except OSError as error:
        raise _unwritable(folder, files, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _unwritable(folder: str | os.PathLike[str], files: Files, error: Exception) -> StateError:
    return StateError(
        f"The folder of {files.what} must be writable; got `{folder}`: {getattr(error, 'strerror', None) or error}. "
        "Nothing was changed there. Free some space or choose another folder."
    )


def replace_folder(draft: Path, target: Path) -> None:
    """Put the finished folder `draft` in the place of `target` by renaming, and make the renaming durable."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and _exchange(draft, target):
        old = draft
    elif target.exists():
        old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
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


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _RENAME_EXCHANGE) == 0


_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2(2)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replaceable(target: Path, files: Files) -> bool:
    return target.is_dir() and {entry.name for entry in target.iterdir()} <= {
        files.tensors,
        files.record,
        *files.others,
    }


def _contents(target: Path) -> str:
    if not target.is_dir():
        return "a file"
    entries = sorted(entry.name for entry in target.iterdir())
    return ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")


def write_setup(folder: Path, setup: Any) -> None:
    """Write a setup, as data, into a folder: whole or not at all."""
    draft = folder / f".{SETUP}.{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"format_version": 1, "setup": setup}, indent=2) + "\n", encoding="utf-8")
        sync(draft)
        draft.replace(folder / SETUP)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise StateError(
            f"The folder of a setup must be writable; got `{folder}`: {error.strerror or error}. Choose another folder."
        ) from None


def read_setup(folder: Path) -> Any:
    """The data of the setup in a folder. Raises `StateError` where there is none that can be read."""
    file = folder / SETUP
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version, setup = record["format_version"], record["setup"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise StateError(
            f"A folder of a setup holds `{SETUP}`, as `save_setup` writes it; got `{file}`: {type(error).__name__}: "
            f"{error}. Give the folder of a setup; `load` reads that of one adapter."
        ) from None
    if version != 1:
        raise StateError(f"This version reads setups of format 1; got {version!r} in `{file}`. Update inarch.")
    return setup


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is in this format."""
    return (Path(folder) / RECORD).is_file()


def read(folder: str | os.PathLike[str]) -> Stored:
    """The contents of an adapter folder.

    Raises `StateError` for anything missing, damaged, of a later format, or not what it says it is.
    """
    path = Path(folder)
    record = read_record(path)
    return Stored(read_tensors(path / TENSORS), record, path)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an adapter folder. Raises `StateError` for one that is missing, damaged or of a later format."""
    file = folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StateError(
            f"An adapter folder holds `{RECORD}` and `{TENSORS}`; got no `{RECORD}` in `{file.parent}`. "
            "Give the folder that `save` wrote."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"`{RECORD}` must be readable JSON; got `{file}`: {error}. Save the adapter again.") from None
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise StateError(
            f"This version reads adapter format {FORMAT_VERSION}; got {version!r} in `{file}`. "
            "Read it with the version of inarch that wrote it."
        )
    missing = [key for key in ("config", "sites", "base") if not isinstance(record.get(key), dict)]
    if missing:
        raise StateError(
            f"`{RECORD}` has the entries `config`, `sites` and `base`; got none for {', '.join(missing)} in `{file}`. "
            "Save the adapter again."
        )
    return dict(record)


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], place: str) -> None:
    """Raise `StateError` that lists every missing, unexpected and wrongly shaped tensor."""
    problems = [f"`{key}` is missing" for key in wanted if key not in found]
    problems += [f"`{key}` is unexpected" for key in found if key not in wanted]
    problems += [
        f"`{key}` has shape {tuple(found[key].shape)}, the model wants {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in found and found[key].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise StateError(
            f"The tensors of an adapter must be those its configuration makes on this model; got `{place}`, where "
            f"{'; '.join(problems[:6])}{more}. Load it on the base model it was trained on."
        )
