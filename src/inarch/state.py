"""Adapter folders: `adapter.safetensors` and `inarch.json`, written whole or not at all, read strictly.

Tensor keys are `{stack}.{layer}.{site role}.{method}.{parameter}` for adapters and `head.{path}.{parameter}` for the
task head trained with them: positions in the architecture, not names of modules, so that a renaming in the host
library changes nothing. No pickle is ever executed.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .core.drafts import drafted, replace_folder, sync
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
) -> None:
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
    spread = any(is_sharded(tensor) for tensor in tensors.values())
    once(partial(_write, Path(folder), values, record, files, beside or {}), spread=spread)


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


def once(write: Callable[[], object], *, spread: bool) -> None:
    """Write; where weights are spread over processes, which all call this, let the first write and all wait for it.

    Raises in every process the `StateError` of the one that writes.
    """
    if not spread:
        write()
        return
    from torch import distributed

    outcome = [""]
    if distributed.get_rank() == 0:
        try:
            write()
        except StateError as error:
            outcome = [str(error)]
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise StateError(outcome[0])


def _write(
    folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None, files: Files, beside: Beside
) -> None:
    from safetensors.torch import save as to_bytes

    target = check_target(folder, files)
    try:
        with drafted(target) as draft:
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


def _unwritable(folder: str | os.PathLike[str], files: Files, error: Exception) -> StateError:
    return StateError(
        f"The folder of {files.what} must be writable; got `{folder}`: {getattr(error, 'strerror', None) or error}. "
        "Nothing was changed there. Free some space or choose another folder."
    )


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


def write_setup(file: Path, setup: Any) -> None:
    """Write a setup as data, flushed to the disk."""
    file.write_text(json.dumps({"format_version": 1, "setup": setup}, indent=2) + "\n", encoding="utf-8")
    sync(file)


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
