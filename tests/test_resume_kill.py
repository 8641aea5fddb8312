"""A run killed at any moment ends, once resumed, with the weights of one that was never killed.

Real processes and SIGKILL. They are forked from one that has imported everything, because that takes longer than the
runs themselves.
"""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from little_runs import save_model, save_pictures

from inarch.cli import main
from inarch.core.records import read_record
from inarch.train.resume import latest

OPTIONS = {
    "model": None,
    "data": None,
    "adapter": "adapter_plus[reduction_factor=4,dropout=0.1]",
    "epochs": "5",
    "batch-size": "4",
    "save-steps": "3",
    "learning-rate": "0.01",
    "device": "cpu",
}
"""An adapter that draws random numbers, with checkpoints within epochs and after them."""

WAIT = 60
"""Seconds after which something is wrong."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model and a small folder of images, as options."""
    root = tmp_path_factory.mktemp("inputs")
    return {"model": save_model(root / "model"), "data": save_pictures(root / "images", count=12)}


@pytest.fixture(scope="module")
def start(inputs):
    """Start `inarch train` in a process of its own; a new run without flags."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inarch.train.run", "inarch.cli.train"])

    def run(output, *flags):
        words = [word for key, value in (OPTIONS | inputs).items() for word in (f"--{key}", value)] if not flags else []
        process = context.Process(target=main, args=(["train", "--quiet", *words, "--output", str(output), *flags],))
        process.start()
        return process

    return run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run that nobody kills, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    warm = start(folder.with_name("warm"))  # the first one waits for the imports
    warm.join(WAIT)
    begin = time.monotonic()
    process = start(folder)
    process.join(WAIT)
    assert process.exitcode == 0
    return folder, time.monotonic() - begin


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join(WAIT)
    assert process.exitcode == -signal.SIGKILL


def contents(folder):
    """Everything of a run that resuming must restore: the result, and the last checkpoint with its random state."""
    last = latest(folder / "checkpoints")
    paths = [folder / "adapter/adapter.safetensors", *sorted(path for path in last.rglob("*") if path.is_file())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.suffix != ".json"}


def test_two_runs_that_nobody_kills_are_the_same_bytes(whole, start):
    folder, _ = whole
    assert contents(folder) == contents(folder.with_name("warm"))
    assert {Path(name).name for name in contents(folder)} == {
        "adapter.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    }  # fmt: skip


@pytest.mark.parametrize("moment", range(2))
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bytes(whole, start, tmp_path, moment):
    folder, seconds = whole
    process = start(tmp_path / "run")
    time.sleep(random.Random(time.time_ns()).uniform(0.2, 0.9) * seconds)
    if process.is_alive():
        kill(process)
    finish(start, tmp_path / "run", folder)


@pytest.mark.parametrize("number", [2, 6])
def test_a_run_killed_while_it_writes_a_checkpoint_resumes_to_the_same_bytes(whole, start, tmp_path, number):
    folder, _ = whole
    process = start(tmp_path / "run")
    seen, limit = set(), time.monotonic() + WAIT
    while len(seen) < number and process.is_alive() and time.monotonic() < limit:
        seen |= {path.name for path in (tmp_path / "run/checkpoints").glob(".checkpoint-*.draft")}
    kill(process)
    finish(start, tmp_path / "run", folder)


def test_a_run_killed_again_and_again_resumes_to_the_same_bytes(whole, start, tmp_path):
    folder, seconds = whole
    process = start(tmp_path / "run")
    generator = random.Random(time.time_ns())
    for _ in range(3):
        time.sleep(generator.uniform(0.3, 0.6) * seconds)
        if process.is_alive():
            kill(process)
        process = start(tmp_path / "run", *(["--resume"] if (tmp_path / "run/run.json").exists() else []))
    process.join(WAIT)
    finish(start, tmp_path / "run", folder)


@pytest.mark.parametrize("size", [1_000, 6_000, 9_000])
def test_a_disk_that_takes_no_more_is_explained_and_the_run_goes_on(whole, inputs, start, tmp_path, size):
    """Files may have so many bytes: too few for the record, the adapter, the optimiser."""
    words = [word for key, value in (OPTIONS | inputs).items() for word in (f"--{key}", value)]
    code = (
        f"import os, resource\n"
        f"file = os.open({str(tmp_path / 'log')!r}, os.O_CREAT | os.O_WRONLY); os.dup2(file, 2)\n"
        f"from inarch.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        f"main(['train', '--quiet', '--output', {str(tmp_path / 'run')!r}, *{words!r}])\n"
    )
    process = multiprocessing.get_context("forkserver").Process(target=exec, args=(code, {}))
    process.start()
    process.join(WAIT)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 1, said
    assert said.startswith("Error: ")
    assert "must be writable" in said
    assert len(said.splitlines()) == 1
    finish(start, tmp_path / "run", whole[0])


def finish(start, output, whole):
    """Resume, by the command a user would type, and compare."""
    if not (output / "run.json").exists():  # killed before anything was written
        process = start(output)
    else:
        process = start(output, "--resume")
    process.join(WAIT)
    assert process.exitcode == 0
    assert contents(output) == contents(whole)
    resumed, uninterrupted = read_record(output), read_record(whole)
    assert resumed.status == "finished"
    assert [epoch.metrics for epoch in resumed.epochs] == [epoch.metrics for epoch in uninterrupted.epochs]
    assert not [path for path in (output / "checkpoints").iterdir() if path.name.startswith(".")]
