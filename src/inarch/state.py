"""Adapter folders: `adapter.safetensors` and `inarch.json`, written whole or not at all, read strictly.

Tensor keys are `{stack}.{layer}.{site role}.{method}.{parameter}` for adapters and `head.{path}.{parameter}` for the
task head trained with them: positions in the architecture, not names of modules, so that a renaming in the host
library changes nothing. No pickle is ever executed.
"""

import json
import math
import os
import shutil
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .core.errors import StateError
from .core.site import Sites

TENSORS, RECORD = "adapter.safetensors", "inarch.json"
FORMAT_VERSION = 1
_HEADER_LIMIT = 16 * 2**20
_SAMPLED_MAPS, _SAMPLED_VALUES = 32, 4


@dataclass(frozen=True, slots=True)
class Stored:
    """The contents of an adapter folder."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    folder: Path


def write(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write an adapter folder whole or not at all: a reader sees the old folder or the new one, never a part of one.

    Where an old one is replaced, there is an instant between the two renames in which a reader sees none.

    Raises `StateError` if the folder holds something else, or cannot be written.
    """
    from safetensors.torch import save as to_bytes

    target = Path(folder)
    if target.exists() and not _replaceable(target):
        raise StateError(
            f"An adapter is saved into a new folder, an empty one, or over an adapter; got `{target}`, which holds "
            f"{_contents(target)}. Choose another folder."
        )
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True)
        # As bytes, because safetensors' own writer makes a file that only its owner can read.
        plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        (draft / TENSORS).write_bytes(to_bytes(plain))
        (draft / RECORD).write_text(
            json.dumps({"format_version": FORMAT_VERSION, **record}, indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        for file in (draft / TENSORS, draft / RECORD):
            sync(file)
        replace_folder(draft, target)
    except OSError as error:
        raise StateError(
            f"An adapter folder must be writable; got `{target}`: {error.strerror or error}. Nothing was changed "
            "there. Free some space or choose another folder."
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def replace_folder(draft: Path, target: Path) -> None:
    """Put the finished folder `draft` in the place of `target` by renaming, and make the renaming durable."""
    target.parent.mkdir(parents=True, exist_ok=True)
    old = None
    if target.exists():
        old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
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


def _replaceable(target: Path) -> bool:
    return target.is_dir() and {entry.name for entry in target.iterdir()} <= {TENSORS, RECORD}


def _contents(target: Path) -> str:
    if not target.is_dir():
        return "a file"
    entries = sorted(entry.name for entry in target.iterdir())
    return ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")


def locate(source: str | os.PathLike[str]) -> Path:
    """The local folder of an adapter: the folder itself, or a snapshot of the Hub repository of that name.

    Raises `StateError` if there is neither.
    """
    path = Path(source).expanduser()
    if os.fspath(source) and path.is_dir():
        return path
    text = os.fspath(source)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise StateError(
            f"An adapter is a folder or a Hub repository `owner/name`; got `{text}`, which is neither. "
            "Give the folder that `save` wrote."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except Exception as error:  # noqa: BLE001 - the client raises errors of several libraries: all mean that it cannot be had
        raise StateError(
            f"An adapter is a folder, or a Hub repository that can be reached or is cached; got `{text}`, which is no "
            f"folder here: {type(error).__name__}: {str(error).splitlines()[0]}. Check the name and the connection."
        ) from None


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is in this format."""
    return (Path(folder) / RECORD).is_file()


def read(folder: str | os.PathLike[str]) -> Stored:
    """The contents of an adapter folder.

    Raises `StateError` for anything missing, damaged, of a later format, or not what it says it is.
    """
    path = Path(folder)
    return Stored(read_tensors(path / TENSORS), _read_record(path / RECORD), path)


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StateError(
            f"An adapter folder holds `{RECORD}` and `{TENSORS}`; got no `{RECORD}` in `{file.parent}`. "
            "Give the folder that `save` wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise StateError(f"`{RECORD}` must be readable JSON; got `{file}`: {error}. Save the adapter again.") from None
    version = record.get("format_version") if isinstance(record, dict) else None
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise StateError(
            f"This version reads adapter format 1 to {FORMAT_VERSION}; got {version!r} in `{file}`. Update inarch."
        )
    missing = [key for key in ("config", "sites", "base") if not isinstance(record.get(key), dict)]
    if missing:
        raise StateError(
            f"`{RECORD}` has the entries `config`, `sites` and `base`; got none for {', '.join(missing)} in `{file}`. "
            "Save the adapter again."
        )
    return dict(record)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `StateError` for a missing, truncated, corrupt or disguised one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with file.open("rb") as stream:
            head = stream.read(10)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise StateError(
            f"An adapter folder holds `{file.name}`; got `{file.parent}`: {error.strerror or error}. "
            "Save the adapter again."
        ) from None
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and not _is_header(head, size):
        raise StateError(
            f"`{file.name}` must be a safetensors file; got a pickle or zip archive at `{file}`. It was not opened, "
            "because a pickle can run code. Save the adapter again as safetensors."
        )
    if not _is_header(head, size):
        raise StateError(
            f"A safetensors file begins with the length of its header, at most {_HEADER_LIMIT:,} bytes and less than "
            f"the file; got {head[:8].hex() or 'nothing'} in {size:,} bytes at `{file}`. The file is damaged: copy it "
            "again."
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"`{file.name}` must be a whole safetensors file; got `{file}`: {error}. The file is damaged: "
            "copy it again."
        ) from None


def _is_header(head: bytes, size: int) -> bool:
    if len(head) < 10:
        return False
    length = struct.unpack("<Q", head[:8])[0]
    return 2 <= length <= min(_HEADER_LIMIT, size - 8) and head[8:9] == b"{"


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


def describe_sites(sites: Sites) -> dict[str, Any]:
    """What an adapter file keeps of the sites it was made for: enough to say how another model differs."""
    return {site.key: [site.width, site.arrangement] for site in sites}


def fingerprint(model: nn.Module, sites: Sites) -> dict[str, list[float]] | str:
    """Some values of some projection matrices, by site and role; "unknown" for a quantised or unmaterialised base.

    Depends on the weights and on the architecture, not on the names of modules, and is compared within the tolerance of
    the dtype, so the same weights loaded in half precision agree.
    """
    maps = [
        (f"{site.key}.{role}", model.get_submodule(site.absolute(parts[0].path)), parts[0])
        for site in sites
        for role, parts in sorted(site.projections.items())
    ]
    step = max(1, math.ceil(len(maps) / _SAMPLED_MAPS))
    found: dict[str, list[float]] = {}
    for key, module, projection in maps[::step]:
        holder, _, name = (projection.weight or "weight").rpartition(".")
        weight = getattr(module.get_submodule(holder), name, None)
        if not isinstance(weight, Tensor) or weight.device.type == "meta" or weight.dtype not in _TOLERANCE:
            return "unknown"
        if weight.dim() != 2 or weight.shape[0] * weight.shape[1] != projection.in_features * projection.out_features:
            return "unknown"
        count = projection.in_features * projection.out_features
        places = [(2 * place + 1) * count // (2 * _SAMPLED_VALUES) for place in range(_SAMPLED_VALUES)]
        rows = [place // projection.in_features for place in places]
        columns = [place % projection.in_features for place in places]
        values = weight.detach()[columns, rows] if projection.transposed else weight.detach()[rows, columns]
        found[key] = [float(value) for value in values.double().cpu()]
    return found or "unknown"


_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def compare_bases(stored: Mapping[str, Any], sites: Sites, model: nn.Module) -> str:
    """How the base of an adapter differs from this model, as a sentence; empty if it does not, or none can tell."""
    own = describe_sites(sites)
    theirs = stored["sites"]
    differing = [key for key in theirs if own.get(key) != theirs[key]] + [key for key in own if key not in theirs]
    if differing:
        key = differing[0]
        return (
            f"the sites of an adapter's base and of the model must agree; got {len(differing)} that differ, first "
            f"`{key}`: {theirs.get(key, 'absent')} in the adapter, {own.get(key, 'absent')} in {sites.model_class}"
        )
    before, now = stored["base"].get("fingerprint", "unknown"), fingerprint(model, sites)
    if isinstance(before, str) or isinstance(now, str):
        return ""
    tolerance = max(_TOLERANCE.get(p.dtype, 1e-6) for p in model.parameters())
    tolerance = max(tolerance, _TOLERANCE.get(getattr(torch, str(stored["base"].get("dtype")), None), 1e-6))  # type: ignore[arg-type]
    for key in before.keys() & now.keys():
        if any(abs(a - b) > tolerance * max(abs(a), abs(b), 1e-3) for a, b in zip(before[key], now[key], strict=True)):
            return (
                f"the weights of an adapter's base and of the model must agree; got others at `{key}`: "
                f"{before[key][0]:.6g} in the adapter, {now[key][0]:.6g} in {sites.model_class}"
            )
    return ""
