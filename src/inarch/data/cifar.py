"""The official CIFAR-10 and CIFAR-100 archives for Python, read without trusting them.

They are pickles written by Python 2, and unpickling runs whatever a file asks for. Ours can build nothing but plain
containers and an inert record of an array, whose bytes are then checked; the archive is never unpacked on disk.
"""

import pickle
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import numpy as np

from ..core.errors import DataError
from .examples import Examples, ImageData, Target, divide, quoted
from .images import Pixels

MAX_MEMBER_BYTES = 1 << 28
"""The largest file read from an archive; the largest official one, `cifar-100-python/train`, has 155 MB."""

WIDTH = 32


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of one of the data sets, and the keys in them."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    keys: Mapping[str, tuple[str, str]]
    """By granularity: the key of the labels in a batch, and of their names in the meta file."""


LAYOUTS = (
    Layout(
        "cifar-10",
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        "batches.meta",
        {"fine": ("labels", "label_names")},
    ),
    Layout(
        "cifar-100",
        "cifar-100-python",
        ("train",),
        "test",
        "meta",
        {"fine": ("fine_labels", "fine_label_names"), "coarse": ("coarse_labels", "coarse_label_names")},
    ),
)


@dataclass(frozen=True, slots=True)
class PixelRows:
    """Images stored as rows of 3072 bytes: the red, the green and the blue plane."""

    rows: Pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pixels:
        return np.ascontiguousarray(self.rows[index].reshape(3, WIDTH, WIDTH).transpose(1, 2, 0))


def is_cifar_folder(folder: Path) -> bool:
    """Whether a folder is an unpacked archive."""
    return any((folder / layout.meta).is_file() and (folder / layout.test).is_file() for layout in LAYOUTS)


def load_cifar(path: Path, granularity: str, *, validation: float | None, seed: int) -> ImageData:
    """The data of an archive or of its unpacked folder; the official test part is the one to validate on."""
    files = _folder_files(path) if path.is_dir() else _archive_files(path)
    layout = next((layout for layout in LAYOUTS if {layout.meta, layout.test, *layout.train} <= files.keys()), None)
    if layout is None:
        wanted = " or ".join(f"`{layout.folder}`" for layout in LAYOUTS)
        raise DataError(
            f"An archive must be a whole official CIFAR archive for Python ({wanted}); "
            f"got one with {quoted(sorted(files)) or 'none of their files'} at `{path}`. "
            "Download it again, or unpack an archive of images and name the folder."
        )
    if granularity not in layout.keys:
        raise DataError(
            f"`labels=` must be `fine` for `{layout.name}`; got `{granularity}` at `{path}`. "
            "Only CIFAR-100 has coarse labels."
        )
    contents = {name: _Batch(files[name], f"{path}: {name}") for name in (layout.meta, layout.test, *layout.train)}
    label_key, names_key = layout.keys[granularity]
    labels = contents[layout.meta].names(names_key)
    train = _joined([contents[name].examples(label_key, len(labels)) for name in layout.train], labels)
    test = _joined([contents[layout.test].examples(label_key, len(labels))], labels)
    parts = divide(path, labels, train, test, share=validation, seed=seed)
    return ImageData(name=layout.name, task="single_label", labels=labels, train=parts[0], validation=parts[1])


def _joined(batches: list[tuple[Pixels, list[Target]]], labels: list[str]) -> Examples:
    rows = np.concatenate([rows for rows, _ in batches])
    return Examples(PixelRows(rows), [target for _, targets in batches for target in targets], len(labels))


def _known_names() -> set[str]:
    return {name for layout in LAYOUTS for name in (layout.meta, layout.test, *layout.train)}


def _folder_files(folder: Path) -> dict[str, bytes]:
    paths = {name: folder / name for name in _known_names() if (folder / name).is_file()}
    for path in paths.values():
        _refuse_large(path.stat().st_size, path)
    return {name: path.read_bytes() for name, path in paths.items()}


def _archive_files(path: Path) -> dict[str, bytes]:
    """The files we know by name, read in the one pass that a compressed archive allows without starting again."""
    folders = {layout.folder for layout in LAYOUTS}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                if member.isfile() and place.parent.name in folders and place.name in _known_names():
                    _refuse_large(member.size, f"{path}: {member.name}")
                    content = archive.extractfile(member)
                    assert content is not None  # only of a member that is no file
                    files[place.name] = content.read()
            # The checksum is at the very end, beyond where an archive of files ends.
            while archive.fileobj is not None and archive.fileobj.read(1 << 20):
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"An archive must be a whole tar file; got `{error}` at `{path}`. Download it again.") from None
    return files


def _refuse_large(size: int, place: object) -> None:
    if size > MAX_MEMBER_BYTES:
        raise DataError(
            f"A file of a CIFAR archive must not have more than {MAX_MEMBER_BYTES:,} bytes; got {size:,} at `{place}`. "
            "Download the archive again."
        )


class _Batch:
    """One unpickled file, each value checked when it is asked for."""

    def __init__(self, content: bytes, place: str) -> None:
        self.place = place
        try:
            loaded = _InertUnpickler(BytesIO(content), encoding="bytes").load()
        except DataError as error:
            raise DataError(f"{error} at `{place}`. Download the archive from its official page.") from None
        except Exception as error:  # noqa: BLE001  a damaged pickle can raise nearly anything
            self._refuse("a pickle that can be read", repr(error))
        if not isinstance(loaded, dict):
            self._refuse("a dictionary", type(loaded).__name__)
        self.values = {_text(key): value for key, value in loaded.items()}

    def names(self, key: str) -> list[str]:
        """The names of the labels."""
        names = self._value(key)
        if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
            self._refuse(f"a list of names under `{key}`", type(names).__name__)
        return [_text(name) for name in names]

    def examples(self, key: str, num_labels: int) -> tuple[Pixels, list[Target]]:
        """The images as rows of bytes, and their labels."""
        data, labels = self._value("data"), self._value(key)
        if not isinstance(data, _InertArray):
            self._refuse("an array under `data`", type(data).__name__)
        rows = data.rows()
        if rows is None:
            self._refuse(f"rows of {3 * WIDTH * WIDTH} bytes under `data`", data.description())
        if not isinstance(labels, list) or len(labels) != len(rows):
            got = f"{len(labels)}" if isinstance(labels, list) else type(labels).__name__
            self._refuse(f"a list of {len(rows)} labels under `{key}`", got)
        wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < num_labels]
        if wrong:
            self._refuse(f"labels from 0 to {num_labels - 1} under `{key}`", repr(wrong[0]))
        return rows, labels

    def _value(self, key: str) -> Any:
        if key not in self.values:
            self._refuse(f"a value under `{key}`", quoted(sorted(self.values)) or "nothing")
        return self.values[key]

    def _refuse(self, wanted: str, got: str) -> Any:
        raise DataError(
            f"A file of a CIFAR archive must hold {wanted}; got {got} at `{self.place}`. Download the archive again."
        )


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _InertDtype:
    """Stands in for `numpy.dtype`: keeps its name."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # the byte order and the fields: a byte has neither


class _InertArray:
    """Stands in for an array under construction: keeps its state, checks and copies nothing."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def description(self) -> str:
        """The shape and type it claims."""
        match self.state:
            case (_, tuple() as shape, _InertDtype(code=code), *_):
                return f"an array of shape {shape} and type {_text(code)}"
        return "an array without content"

    def rows(self) -> Pixels | None:
        """The rows of an array of bytes as wide as an image; none of any other array."""
        match self.state:
            case (_, (int() as num, int() as width), _InertDtype(code=code), fortran, bytes() as raw):
                order: Literal["C", "F"] = "F" if fortran else "C"
                if _text(code) == "u1" and width == 3 * WIDTH * WIDTH and num > 0 and len(raw) == num * width:
                    return np.frombuffer(raw, dtype=np.uint8).reshape((num, width), order=order)
        return None


class _InertUnpickler(pickle.Unpickler):
    """Builds containers, text, numbers and inert arrays, and refuses to look up anything else."""

    INERT: ClassVar[dict[tuple[str, str], type]] = {
        ("numpy.core.multiarray", "_reconstruct"): _InertArray,
        ("numpy._core.multiarray", "_reconstruct"): _InertArray,
        ("numpy", "ndarray"): _InertArray,
        ("numpy", "dtype"): _InertDtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The inert stand-in for one of the four names that an array needs."""
        if (module, name) not in self.INERT:
            raise DataError(f"A CIFAR archive must hold nothing but arrays, numbers and text; got `{module}.{name}`")
        return self.INERT[module, name]
