"""A folder is put in its place whole, and what killed processes leave behind goes, and nothing else."""

import subprocess
import sys
import threading

import pytest

from inarch.core import drafts

KILLED = """
import os, signal, sys
from pathlib import Path
from inarch.core.drafts import drafted

with drafted(Path(sys.argv[1])) as draft:
    (draft / "half").write_text("written")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def write(target, text):
    with drafts.drafted(target) as draft:
        (draft / text).write_text(text)
        drafts.replace_folder(draft, target)


@pytest.mark.skipif(drafts.fcntl is None, reason="this system has no locks that end with a process")
def test_the_draft_of_a_killed_process_goes_with_the_next_writing(tmp_path):
    target = tmp_path / "target"
    assert subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False).returncode < 0
    (left,) = tmp_path.iterdir()
    assert names(left) == ["half"]
    write(tmp_path / "other", "new")
    assert left.exists()  # it is of another place
    write(target, "new")
    assert names(tmp_path) == ["other", "target"] and names(target) == ["new"]


def test_the_draft_of_a_living_process_stays(tmp_path):
    target = tmp_path / "target"
    with drafts.drafted(target) as first, drafts.drafted(target) as empty:
        (first / "a").write_text("a")
        write(target, "b")
        assert names(first) == ["a"] and empty.is_dir()
        drafts.replace_folder(first, target)
    assert names(tmp_path) == ["target"] and names(target) == ["a"]


def test_an_old_folder_that_a_killed_process_left_goes_unless_it_is_the_only_one(tmp_path):
    target, old = tmp_path / "target", tmp_path / ".target.0123abcd.old"
    old.mkdir()
    (old / "a").write_text("a")
    with drafts.drafted(target):
        assert old.exists()
    write(target, "b")
    write(target, "c")
    assert names(tmp_path) == ["target"]


def test_what_looks_like_a_draft_and_is_none_stays(tmp_path):
    others = [".target.notes.draft", ".targets.0123abcd.draft", "target.0123abcd.draft", ".target.0123abcd"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / ".target.0123abcd.draft").write_text("a file")
    write(tmp_path / "target", "new")
    assert names(tmp_path) == sorted([*others, ".target.0123abcd.draft", "target"])


@pytest.mark.skipif(drafts.fcntl is None, reason="this system has no locks that end with a process")
def test_where_there_are_no_locks_nothing_is_cleared(tmp_path, monkeypatch):
    target = tmp_path / "target"
    left = tmp_path / ".target.0123abcd.draft"
    left.mkdir()
    (left / "half").write_text("written")
    monkeypatch.setattr(drafts, "fcntl", None)
    write(target, "new")
    assert left.exists()


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_is_replaced_whole_and_nothing_is_left_over(in_one_step, tmp_path, monkeypatch):
    if not in_one_step:
        monkeypatch.setattr("inarch.core.drafts._exchange", lambda *_: False)
    target = tmp_path / "target"
    for text in ("old", "new"):
        draft = tmp_path / "draft"
        draft.mkdir()
        (draft / text).write_text(text)
        drafts.replace_folder(draft, target)
        assert [file.name for file in target.iterdir()] == [text]
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets two folders change places in one step")
def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path, monkeypatch):
    target, looks = tmp_path / "target", []
    for folder in (target, tmp_path / "other"):
        folder.mkdir()
    if not drafts._exchange(target, tmp_path / "other"):
        pytest.skip("this file system does not let two folders change places")

    def never(*_):
        raise AssertionError("after a first renaming there is no folder until the second")

    monkeypatch.setattr("pathlib.Path.rename", never)
    done = threading.Event()

    def look():
        while not done.is_set():
            looks.append(target.exists())

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(50):
        draft = tmp_path / f"draft{number}"
        draft.mkdir()
        drafts.replace_folder(draft, target)
    done.set()
    reader.join()
    assert looks and all(looks)
