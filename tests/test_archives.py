"""Adapters packed in one file, here and at an address: what is read, and what is refused before it does harm."""

import http.server
import io
import random
import shutil
import socketserver
import stat
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel
from typer.testing import CliRunner

import inarch
from inarch import archives
from inarch.archives import unpacked
from inarch.cli import app
from inarch.testing import tiny

ADAPTERHUB = Path(__file__).parent / "fixtures" / "adapterhub" / "bert"
PEFT = Path(__file__).parent / "fixtures" / "peft" / "ia3_bert"
FORMATS = {".zip": "zip", ".tar": "tar", ".tar.gz": "gztar", ".tar.xz": "xztar"}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made, to see that none stays."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert not list(place.iterdir())


def packed(source, place, kind="zip"):
    return Path(shutil.make_archive(str(place), kind, source.parent, source.name))


@pytest.fixture(scope="module")
def bert():
    model = AutoModel.from_pretrained(ADAPTERHUB / "base").eval()
    return model, inarch.attach(model)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_archive_of_a_folder_is_read_as_the_folder(bert, tmp_path, suffix):
    model, adapters = bert
    file = packed(ADAPTERHUB / "lora_gate", tmp_path / "lora", FORMATS[suffix])
    assert file.name == f"lora{suffix}"
    name = adapters.load(file)
    inputs, outputs = (load_file(ADAPTERHUB / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    with adapters.using(name), torch.no_grad():
        found = model(**inputs).last_hidden_state
    adapters.remove(name)
    torch.testing.assert_close(found, outputs["lora_gate"], atol=1e-5, rtol=0)


def test_the_files_may_lie_in_no_folder_and_an_adapter_without_a_name_has_the_archives(tmp_path):
    adapters = inarch.attach(tiny("bert"))
    assert adapters.load(shutil.make_archive(str(tmp_path / "mine"), "zip", PEFT)) == "mine"


def test_check_and_convert_read_archives(tmp_path):
    file = packed(ADAPTERHUB / "lora_gate", tmp_path / "lora")
    base = str(ADAPTERHUB / "base")
    result = CliRunner().invoke(app, ["check", base, "--adapter", str(file)])
    assert result.exit_code == 0 and "lora[" in result.output
    result = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "new"), "--to", "inarch", "--model", base])
    assert result.exit_code == 0, result.output
    assert inarch.attach(AutoModel.from_pretrained(base)).load(tmp_path / "new") == "a"


def test_an_archive_holds_one_adapter(tmp_path):
    adapters = inarch.attach(tiny("bert"))
    for case in ("ia3_bert", "bert_task"):
        shutil.copytree(PEFT.parent / case, tmp_path / "both" / case)
    (tmp_path / "none").mkdir()
    with pytest.raises(inarch.StateError, match=r"one adapter; got `both/bert_task`, `both/ia3_bert` in .*Unpack"):
        adapters.load(packed(tmp_path / "both", tmp_path / "two"))
    with pytest.raises(inarch.StateError, match="holds one adapter; got none in"):
        adapters.load(packed(tmp_path / "none", tmp_path / "empty"))


# What is refused


def zipped(file, *entries):
    with zipfile.ZipFile(file, "w") as archive:
        for name, content, mode in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, content)
    return file


def tarred(file, *members):
    with tarfile.open(file, "w") as archive:
        for name, kind, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            archive.addfile(member, io.BytesIO(b""))
    return file


PLAIN = stat.S_IFREG | 0o644


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "C:evil"])
def test_what_would_lie_outside_is_refused_and_not_written(tmp_path, name):
    for file in (
        zipped(tmp_path / "a.zip", ("b", "", PLAIN), (name, "evil", PLAIN)),
        tarred(tmp_path / "a.tar", ("b", tarfile.REGTYPE, ""), (name, tarfile.REGTYPE, "")),
    ):
        with pytest.raises(inarch.StateError, match="would lie outside of its folder, at"), unpacked(file):
            pass
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with (
        pytest.raises(inarch.StateError, match="got `link`, which is no plain file, at"),
        unpacked(tarred(tmp_path / "a.tar", ("link", kind, "/etc/hostname"))),
    ):
        pass
    with (
        pytest.raises(inarch.StateError, match="got `link`, which is no plain file, at"),
        unpacked(zipped(tmp_path / "a.zip", ("link", "/etc/hostname", stat.S_IFLNK | 0o777))),
    ):
        pass


def test_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 1000)
    with (
        pytest.raises(inarch.StateError, match="got more than 1000 bytes at"),
        unpacked(zipped(tmp_path / "a.zip", ("a", bytes(600), PLAIN), ("b", bytes(600), PLAIN))),
    ):
        pass
    monkeypatch.setattr(archives, "MOST_FILES", 1)
    file = zipped(tmp_path / "b.zip", ("a", b"", PLAIN), ("b", b"", PLAIN))
    with pytest.raises(inarch.StateError, match="got more than 1 files at"), unpacked(file):
        pass
    monkeypatch.setattr(archives, "MOST_FILES", 2)
    with unpacked(file) as folder:  # as many as may be
        assert len(list(folder.iterdir())) == 2


def test_an_archive_that_lies_about_its_size_is_refused(tmp_path):
    file = zipped(tmp_path / "a.zip", ("a", b"12345678", PLAIN))
    content = bytearray(file.read_bytes())
    place = content.index(b"PK\x01\x02") + 24  # the size in the directory
    content[place : place + 4] = (3).to_bytes(4, "little")
    file.write_bytes(content)
    with (
        pytest.raises(inarch.StateError, match="got (one that cannot be read|a damaged one)"),
        unpacked(file),
    ):
        pass


def test_one_name_twice_is_refused(tmp_path):
    file = tarred(tmp_path / "a.tar", ("a", tarfile.REGTYPE, ""), ("./a", tarfile.REGTYPE, ""))
    with pytest.raises(inarch.StateError, match=r"got `\.?/?a` twice at"), unpacked(file):
        pass


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x05\x06"])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    with (
        pytest.raises(inarch.StateError, match="a zip or tar archive of plain files; got"),
        unpacked(tmp_path / "a.zip"),
    ):
        pass


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
@pytest.mark.parametrize("place", [0.5, 0.9999])
def test_a_damaged_archive_is_refused_whose_entries_can_all_be_read(tmp_path, kind, place):
    """The sum of the whole stands behind the last entry, where reading entries does not come."""
    content, file = random.Random(0).randbytes(300_000), tmp_path / f"a.tar.{kind}"
    with tarfile.open(file, f"w:{kind}") as archive:
        member = tarfile.TarInfo("adapter.safetensors")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with unpacked(file) as folder:
        assert (folder / "adapter.safetensors").read_bytes() == content
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 255
    file.write_bytes(data)
    with pytest.raises(inarch.StateError, match="a zip or tar archive of plain files; got .*Unpack"), unpacked(file):
        pass


# Addresses


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, and the address that it is served at."""
    place = tmp_path / "served"
    place.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(place))

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield place, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_archive_at_an_address_is_read(served):
    place, address = served
    packed(PEFT, place / "ia3")
    adapters = inarch.attach(tiny("bert"))
    assert adapters.load(f"{address}/ia3.zip") == "ia3_bert"
    with pytest.raises(inarch.StateError, match=r"which cannot: HTTPError: HTTP Error 404.*Check the address"):
        adapters.load(f"{address}/other.zip")


def test_an_address_is_not_read_offline_and_its_size_is_bounded(served, monkeypatch):
    place, address = served
    packed(PEFT, place / "ia3")
    adapters = inarch.attach(tiny("bert"))
    with monkeypatch.context() as patch:
        patch.setattr(archives, "MOST_BYTES", 100)
        with pytest.raises(inarch.StateError, match="got more than 100 bytes at `http"):
            adapters.load(f"{address}/ia3.zip")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(inarch.StateError, match="which cannot: `HF_HUB_OFFLINE` or .* is set. Check the address"):
        adapters.load(f"{address}/ia3.zip")
    assert not adapters.names


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nPK", "it ended after 2 of 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nPK", "IncompleteRead"),
        (b"nonsense\r\n\r\n", "BadStatusLine"),
    ],
)
def test_an_answer_that_breaks_off_or_is_none_is_told_of(served, answer, reason):
    class Broken(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            self.request.sendall(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with (
            pytest.raises(inarch.StateError, match=f"which cannot: {reason}"),
            unpacked(f"http://127.0.0.1:{server.server_address[1]}/a.tar"),
        ):
            pass
        thread.join()


def test_other_schemes_are_no_addresses(tmp_path):
    file = packed(PEFT, tmp_path / "a")
    with pytest.raises(inarch.StateError, match="An adapter is a folder, an archive or a Hub repository"):
        inarch.attach(tiny("bert")).load(f"file://{file}")
