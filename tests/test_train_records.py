"""`run.json`: read by programs that have no torch, written whole or not at all."""

import errno
import json
import math
import os
import statistics
import subprocess
import sys

import pytest

from inarch.core import records
from inarch.core.errors import StateError
from inarch.core.records import EpochRecord, GroupRecord, RunRecord, SeedsRecord, VerdictRecord, read_record


def run(seed=0, **results):
    group = GroupRecord(
        place="image0 mlp", arrangement="pre", pretrained="y = x", adapted="y = x + A(x)", verdict="preserved"
    )
    return RunRecord(
        status="finished",
        name="a",
        trains="adapter",
        adapter="seq_bn",
        seed=seed,
        job={"recipe": {"epochs": 2}},
        command=("inarch", "train"),
        data={"labels": ["no", "sí"]},
        verdict=VerdictRecord(sound=True, groups=(group,), findings=("one",)),
        epochs=(EpochRecord(epoch=1.0, step=3, train_loss=0.5, metrics={"accuracy": 0.5}),),
        results=results,
    )


def test_a_record_is_read_back_as_it_was(tmp_path):
    record = run(accuracy=0.5)
    assert record.save(tmp_path) == tmp_path / "run.json"
    assert read_record(tmp_path) == read_record(tmp_path / "run.json") == record


def test_a_record_of_seeds_is_read_back_with_its_runs(tmp_path):
    runs = [run(seed, accuracy=value) for seed, value in enumerate((0.5, 0.7, 0.9))]
    record = SeedsRecord.of(runs, 3, {"seeds": 3}, ["inarch"])
    record.save(tmp_path)
    assert read_record(tmp_path) == record
    assert record.status == "finished"
    assert record.mean == {"accuracy": pytest.approx(0.7)}
    assert record.std == {"accuracy": pytest.approx(statistics.stdev([0.5, 0.7, 0.9]))}


def test_a_summary_of_some_seeds_is_not_finished():
    assert SeedsRecord.of([], 2, {}, []).status == "running"
    one = SeedsRecord.of([run(accuracy=0.5)], 2, {}, [])
    assert (one.status, one.mean, one.std) == ("running", {"accuracy": 0.5}, {})


def test_a_number_that_is_none_is_null_in_the_file_and_left_out_of_means(tmp_path):
    record = run(accuracy=0.5, loss=math.nan)
    record.save(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["results"] == {"accuracy": 0.5, "loss": None}
    assert SeedsRecord.of([run(accuracy=0.5, loss=1.0), read_record(tmp_path)], 2, {}, []).mean == {"accuracy": 0.5}


def test_keys_of_a_later_version_are_left_out(tmp_path):
    data = run(accuracy=0.5).to_dict()
    data["epochs"][0]["mood"] = data["mood"] = "good"
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert read_record(tmp_path) == run(accuracy=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"a readable `run.json`; got .*FileNotFoundError"),
        ("{", r"a readable `run.json`; got .*JSONDecodeError"),
        ("[]", r"a readable `run.json`; got .*TypeError"),
        ('{"format_version": 1}', r"a readable `run.json`; got .*KeyError"),
        ('{"format_version": 9}', r"reads runs of format 1 to 1; got 9"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(StateError, match=message):
        read_record(tmp_path)


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    run(accuracy=0.5).save(tmp_path)

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StateError, match=r"The record of a run must be writable; got .*No space left on device"):
        run(accuracy=0.9).save(tmp_path)
    assert read_record(tmp_path).results == {"accuracy": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_records_need_the_standard_library_alone():
    code = (
        "import sys, types; package = types.ModuleType('inarch'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['inarch'] = package; import inarch.core.records; "
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    folder = os.path.dirname(os.path.dirname(records.__file__))  # noqa: PTH120
    subprocess.run([sys.executable, "-c", code, folder], check=True)
