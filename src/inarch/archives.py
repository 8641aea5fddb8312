"""An adapter folder packed in one file, here or at an address: unpacked to be read, and gone afterwards.

    .zip  .tar  .tar.gz  .tgz  .tar.bz2  .tar.xz

Nothing of an archive is trusted: one that its own sums call damaged, an entry that is no plain file, that would lie
outside of the folder, or that is there twice, refuses the whole, and so does more than `MOST_BYTES` or `MOST_FILES`,
counted as they are unpacked.
"""

import http.client
import os
import re
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from .core.errors import StateError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MOST_BYTES = 2**34
MOST_FILES = 10_000
_TIMEOUT = 30
"""Seconds without a byte, after which an address counts as out of reach."""
_PIECE = 2**20
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_TRUE = ("1", "ON", "YES", "TRUE")


def is_address(text: object) -> bool:
    """Whether a text is an address on the web."""
    return isinstance(text, str) and _ADDRESS.match(text) is not None


def is_packed(source: object) -> bool:
    """Whether a place is an archive: a file by its name, or an address."""
    if not isinstance(source, str | os.PathLike):
        return False
    text = os.fspath(source)
    return is_address(text) or (text.lower().endswith(SUFFIXES) and Path(text).expanduser().is_file())


@contextmanager
def unpacked(source: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder that an archive holds, which is deleted when the block ends.

    Raises `StateError` for an address that cannot be read, and for what is no archive, or none that may be unpacked.
    """
    text = os.fspath(source)
    with tempfile.TemporaryDirectory(prefix="inarch-") as place:
        name = PurePosixPath(urlsplit(text).path).name if is_address(text) else Path(text).name
        file = Path(place) / "archive" if is_address(text) else Path(text).expanduser()
        if is_address(text):
            _download(text, file)
        folder = Path(place) / (_stem(name) or "adapter")
        folder.mkdir()
        try:
            _unpack(file, folder, text)
        except StateError:
            raise
        except (tarfile.TarError, zipfile.BadZipFile) as error:
            raise _refusal(f"a damaged one ({error})", text) from None
        except Exception as error:  # noqa: BLE001  unpacking fails in as many ways as a file can be damaged or crafted
            raise _refusal(f"one that cannot be read ({error})", text) from None
        yield folder


def _stem(name: str) -> str:
    """The name of an archive without what says that it is one."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)].strip(". ")


def _refusal(got: str, source: str) -> StateError:
    return StateError(
        f"A packed adapter is a zip or tar archive of plain files; got {got} at `{source}`. Unpack it by hand, if you "
        "trust it, and give the folder."
    )


# What is at an address


def _download(address: str, file: Path) -> None:
    """Put what is at an address into a file. Raises `StateError` where that cannot be had."""
    if any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        raise _out_of_reach(address, "`HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` is set")
    request = urllib.request.Request(address, headers={"User-Agent": "inarch"})  # noqa: S310 - an address of http or https
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer, file.open("xb") as target:  # noqa: S310 - as above
            if not is_address(answer.url):
                raise _out_of_reach(address, f"it leads to `{answer.url}`")
            length, wanted = _copy(answer, target, MOST_BYTES, address), answer.headers.get("Content-Length")
            if wanted is not None and wanted.isdecimal() and length != int(wanted):
                raise _out_of_reach(address, f"it ended after {length} of {wanted} bytes")
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise _out_of_reach(address, f"{type(error).__name__}: {error}") from None


def _out_of_reach(address: str, reason: str) -> StateError:
    return StateError(
        f"An address is read where it can be reached; got `{address}`, which cannot: {reason}. Check the address and "
        "the connection, or download it elsewhere and give the file."
    )


# What is in an archive


def _unpack(file: Path, folder: Path, source: str) -> None:
    left = MOST_BYTES
    names: set[str] = set()
    for name, size, content in _entries(file, source):
        path = _inside(name, source)
        if path.as_posix().lower() in names or len(names) >= MOST_FILES or size > left:
            many = f"more than {MOST_FILES} files" if len(names) >= MOST_FILES else f"`{name}` twice"
            raise _refusal(f"more than {MOST_BYTES} bytes" if size > left else many, source)
        names.add(path.as_posix().lower())
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with content as stream, target.open("xb") as opened:
            left -= _copy(stream, opened, left, source)


def _entries(file: Path, source: str) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and content of every file. Raises `StateError` for an entry that is neither a file nor a folder."""
    if tarfile.is_tarfile(file):  # first, because one that holds a zip at its end looks like a zip
        with tarfile.open(file) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is None and not member.isdir():
                    raise _refusal(f"`{member.name}`, which is no plain file,", source)
                if content is not None:
                    yield member.name, member.size, content
            rest: Any = archive.fileobj
            _copy(rest, None, MOST_BYTES, source)  # the sum that tells of damage stands at its very end
    elif zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                kind = (entry.external_attr >> 16) & 0o170000  # the kind of file, where Unix wrote it
                if kind not in (0, 0o100000, 0o040000):
                    raise _refusal(f"`{entry.filename}`, which is no plain file,", source)
                if not entry.is_dir():
                    yield entry.filename, entry.file_size, archive.open(entry)
    else:
        raise _refusal("something else", source)


def _inside(name: str, source: str) -> PurePosixPath:
    """The path of an entry below the folder. Raises `StateError` for one that leads out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or any(letter in name for letter in "\\:\0"):
        raise _refusal(f"`{name}`, which would lie outside of its folder,", source)
    return path


def _copy(source: IO[bytes], target: IO[bytes] | None, most: int, place: str) -> int:
    """Copy a stream, or only read it; returns its length. Raises `StateError` for one of more than `most` bytes."""
    length = 0
    while piece := source.read(_PIECE):
        length += len(piece)
        if length > most:
            raise _refusal(f"more than {MOST_BYTES} bytes", place)
        if target is not None:
            target.write(piece)
    return length
