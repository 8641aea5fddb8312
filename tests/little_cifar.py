"""Tiny archives in the format of the official CIFAR ones, which Python 2 wrote."""

import io
import pickle
import struct
import tarfile
from typing import ClassVar

import numpy as np


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did, which wrote the official files."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def dump(value):
    """A pickle in the official format: protocol 2, with the name numpy had then."""
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def rows(number, count=4):
    """Random images as rows of bytes."""
    return np.random.default_rng(number).integers(0, 256, (count, 3072), dtype=np.uint8)


def cifar10():
    """The files of a tiny CIFAR-10."""
    batches = {f"data_batch_{number}": number for number in range(1, 6)} | {"test_batch": 6}
    files = {
        name: {"batch_label": name, "labels": [number % 3, 0, 1, 2], "data": rows(number), "filenames": ["x.png"] * 4}
        for name, number in batches.items()
    }
    meta = {"num_cases_per_batch": 4, "label_names": ["airplane", "automobile", "bird"], "num_vis": 3072}
    return {name: dump(content) for name, content in files.items()} | {"batches.meta": dump(meta)}


def cifar100():
    """The files of a tiny CIFAR-100."""
    files = {
        name: dump({"filenames": ["x"] * 6, "batch_label": name, "fine_labels": [0, 1, 2, 0, 1, 2],
                    "coarse_labels": [0, 0, 1, 0, 0, 1], "data": rows(number, 6)})
        for name, number in (("train", 1), ("test", 2))
    }  # fmt: skip
    meta = {"fine_label_names": ["apple", "pear", "whale"], "coarse_label_names": ["fruit", "sea"]}
    return files | {"meta": dump(meta)}


def archive(path, files, folder):
    """A compressed archive with the files in their folder."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def unpacked(path, files):
    """The unpacked folder."""
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return str(path)
