"""The official CIFAR archives: read as numpy would read them, and never obeyed."""

import gzip
import os
import pickle

import numpy as np
import pytest
from little_cifar import archive, cifar10, cifar100, dump, rows, unpacked

from inarch.core.errors import DataError
from inarch.data import cifar, load_data


def test_the_fixture_is_what_numpy_reads():
    """The files of these tests are pickles of arrays under keys of bytes, as the official ones."""
    content = cifar10()["data_batch_1"]
    assert content.startswith(b"\x80\x02") and b"numpy.core.multiarray\n_reconstruct" in content
    loaded = pickle.loads(content, encoding="bytes")
    assert np.array_equal(loaded[b"data"], rows(1))


@pytest.mark.parametrize("packed", [True, False])
def test_cifar_10(tmp_path, packed):
    """Five batches to train on and one to validate on, each image with its planes as channels."""
    path = (
        archive(tmp_path / "c.tar.gz", cifar10(), "cifar-10-batches-py")
        if packed
        else unpacked(tmp_path / "c", cifar10())
    )
    data = load_data(path)
    assert (data.name, data.labels, data.mirror_safe) == ("cifar-10", ["airplane", "automobile", "bird"], True)
    assert (len(data.train), len(data.validation)) == (20, 4)
    image, label = data.train[4]
    assert label == 2
    assert image.shape == (32, 32, 3)
    for channel in range(3):
        assert np.array_equal(image[..., channel].ravel(), rows(2)[0, 1024 * channel : 1024 * (channel + 1)])
    assert np.array_equal(data.validation[3][0][0, 0], rows(6)[3, [0, 1024, 2048]])


def test_cifar_100_has_two_granularities(tmp_path):
    """Fine labels unless coarse ones are asked for."""
    path = archive(tmp_path / "c.tar.gz", cifar100(), "cifar-100-python")
    assert load_data(path).labels == ["apple", "pear", "whale"]
    data = load_data(path, labels="coarse")
    assert (data.name, data.labels) == ("cifar-100", ["fruit", "sea"])
    assert [data.train[index][1] for index in range(6)] == [0, 0, 1, 0, 0, 1]


def test_part_of_the_training_images_can_be_held_out(tmp_path, caplog):
    """With a share the official test part is left alone."""
    path = archive(tmp_path / "c.tar.gz", cifar100(), "cifar-100-python")
    data = load_data(path, validation=0.5)
    assert (len(data.train), len(data.validation)) == (3, 3)
    assert "6 images for validation" in caplog.text


def test_arrays_in_the_order_of_fortran_are_read(tmp_path):
    """Either order of bytes in the file is the same array."""
    files = cifar100() | {
        "test": dump({"fine_labels": [0] * 6, "coarse_labels": [0] * 6, "data": np.asfortranarray(rows(2, 6))})
    }
    data = load_data(unpacked(tmp_path / "c", files))
    assert np.array_equal(data.validation[5][0][0, 0], rows(2, 6)[5, [0, 1024, 2048]])


class Payload:
    """What a malicious pickle holds: a call of anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_pickle_that_calls_something_is_refused_and_not_obeyed(tmp_path, name):
    """The call is named, and it has not happened."""
    proof = tmp_path / "proof"
    bad = pickle.dumps({"data": Payload(proof)}, protocol=2)
    path = archive(tmp_path / "c.tar.gz", cifar10() | {name: bad}, "cifar-10-batches-py")
    with pytest.raises(DataError, match=rf"nothing but arrays, numbers and text; got `\w+.system` at `.*: {name}`"):
        load_data(path)
    assert not proof.exists()


def test_the_malicious_pickle_would_have_worked(tmp_path):
    """The test above can fail: plain unpickling obeys."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "proof"), protocol=2))
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct.__init__.__globals__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x17ndarray.__class__.__mro__\x93.",
        b"\x80\x02\x82\x01.",
        b"Pid\n.",
        b"cnumpy\ndtype\n}S'x'\nI1\nsb.",
    ],
)
def test_other_attacks_are_refused(tmp_path, attack):
    """Other calls, attributes of what is allowed, extensions, persistent ids and state set on a class."""
    with pytest.raises(DataError, match="at `.*: meta`"):
        load_data(unpacked(tmp_path / "c", cifar100() | {"meta": attack}))


def test_an_array_of_objects_is_not_built(tmp_path):
    """An array of anything but bytes is described, not made."""
    files = cifar100() | {"test": dump({"fine_labels": [0], "data": np.array([["x"]], dtype=object)})}
    with pytest.raises(DataError, match=r"rows of 3072 bytes under `data`; got an array of shape \(1, 1\) and type O8"):
        load_data(unpacked(tmp_path / "c", files))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test", b"", "must hold a pickle that can be read; got EOFError"),
        ("test", dump([1]), "must hold a dictionary; got list"),
        ("test", dump({"x": 1}), "must hold a value under `data`; got `x` at"),
        ("test", dump({"data": [1], "fine_labels": [0]}), "must hold an array under `data`; got list"),
        ("test", dump({"data": rows(0)[:, :30], "fine_labels": [0]}), r"got an array of shape \(4, 30\) and type u1"),
        ("test", dump({"data": rows(0), "fine_labels": [0]}), "a list of 4 labels under `fine_labels`; got 1"),
        ("test", dump({"data": rows(0), "fine_labels": 3}), "a list of 4 labels under `fine_labels`; got int"),
        ("test", dump({"data": rows(0), "fine_labels": [0, 1, 2, 3]}), "labels from 0 to 2 under `fine_labels`; got 3"),
        ("meta", dump({"fine_label_names": [1]}), "a list of names under `fine_label_names`"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content, message):
    """What the file should hold, and what it holds."""
    with pytest.raises(DataError, match=message):
        load_data(unpacked(tmp_path / "c", cifar100() | {name: content}))


def test_an_incomplete_archive_is_refused(tmp_path):
    """A batch that is missing, and an archive of something else."""
    files = cifar10()
    del files["data_batch_4"]
    path = archive(tmp_path / "c.tar.gz", files, "cifar-10-batches-py")
    with pytest.raises(DataError, match="whole official CIFAR archive for Python .*got one with `batches.meta`, `data"):
        load_data(path)
    path = archive(tmp_path / "d.tar.gz", {"cat.png": b"x"}, "images")
    with pytest.raises(DataError, match="got one with none of their files at .*unpack an archive of images"):
        load_data(path)


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_truncated_archive_is_refused(tmp_path, share):
    """A download that broke off is not a smaller data set."""
    path = tmp_path / "c.tar.gz"
    archive(path, cifar10(), "cifar-10-batches-py")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="must be a whole tar file; got `.*` at `.*c.tar.gz`. Download it again"):
        load_data(str(path))


def test_a_damaged_archive_is_refused(tmp_path):
    """Bytes that changed on the way are noticed."""
    path = tmp_path / "c.tar.gz"
    archive(path, cifar10(), "cifar-10-batches-py")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(DataError, match="must be a whole tar file; got `CRC check failed"):
        load_data(str(path))


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    """Neither from an archive nor from a folder."""
    monkeypatch.setattr(cifar, "MAX_MEMBER_BYTES", 1000)
    path = archive(tmp_path / "c.tar.gz", cifar100(), "cifar-100-python")
    with pytest.raises(DataError, match="must not have more than 1,000 bytes; got .* at `.*: cifar-100-python/train`"):
        load_data(path)
    with pytest.raises(DataError, match="must not have more than 1,000 bytes"):
        load_data(unpacked(tmp_path / "c", cifar100()))


def test_nothing_is_written_next_to_an_archive(tmp_path):
    """Reading unpacks nothing, and a member with a path of its own reaches nothing."""
    path = tmp_path / "c.tar.gz"
    archive(path, cifar100() | {"../../../escape": b"x"}, "cifar-100-python")
    load_data(str(path))
    assert list(tmp_path.iterdir()) == [path]


def test_cifar_10_has_no_coarse_labels(tmp_path):
    """The option is refused where it would be ignored."""
    with pytest.raises(DataError, match="`labels=` must be `fine` for `cifar-10`; got `coarse`"):
        load_data(unpacked(tmp_path / "c", cifar10()), labels="coarse")


def test_an_uncompressed_archive_is_read(tmp_path):
    """The compression does not matter."""
    archive(tmp_path / "c.tar.gz", cifar100(), "cifar-100-python")
    (tmp_path / "c.tar").write_bytes(gzip.decompress((tmp_path / "c.tar.gz").read_bytes()))
    assert len(load_data(str(tmp_path / "c.tar")).train) == 6
