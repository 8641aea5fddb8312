"""Several processes compute what one computes, and fail with one voice."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from little_runs import save_model
from PIL import Image
from safetensors.torch import load_file

from inarch.core.records import read_record
from inarch.train.resume import latest

OPTIONS = {
    "adapter": "seq_bn[reduction_factor=4]",
    "epochs": "3",
    "batch-size": "8",
    "learning-rate": "0.003",
    "save-steps": "3",
    "device": "cpu",
}
"""Nothing random: processes draw other numbers than one alone does."""

WAIT = 100
"""Seconds after which something is wrong."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model, a small folder of images, and a table that gives each several labels, as options.

    The images do not divide evenly into batches, nor the last batch among the processes.
    """
    root = tmp_path_factory.mktemp("inputs")
    save_model(root / "model")
    generator = np.random.default_rng(0)
    lines = ["image,a,b,c"]
    for label, name in enumerate("abc"):
        for split, count in (("train", 11), ("val", 3)):
            (root / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "images" / split / name / f"{number}.png")
                ticks = [int(number % 2 == 0), int(label == 1), int(number % 3 == 0)]
                lines.append(f"{split}/{name}/{number}.png,{','.join(map(str, ticks))}")
    (root / "labels.csv").write_text("\n".join(lines))
    return {"model": str(root / "model"), "data": str(root / "images")}


def words(inputs, folder, **changes):
    options = OPTIONS | inputs | {"output": str(folder)} | changes
    return ["train", "--quiet", *(word for key, value in options.items() for word in (f"--{key}", value))]


def close(folder, other, places=("adapter/adapter.safetensors",)):
    for place in places:
        one, two = load_file(folder / place), load_file(other / place)
        assert one.keys() == two.keys()
        for key in one:
            assert torch.allclose(one[key], two[key], rtol=0, atol=1e-6), (key, (one[key] - two[key]).abs().max())


def test_torchrun_with_two_processes_gives_what_one_gives(inputs, tmp_path):
    from inarch.train.recipe import Recipe
    from inarch.train.run import train_run

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port())]
    done = subprocess.run(
        [*command, "-m", "inarch", *words(inputs, tmp_path / "two")],
        capture_output=True, text=True, timeout=WAIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2, done.stdout  # one process prints
    recipe = Recipe(epochs=3, batch_size=8, learning_rate=0.003, save_steps=3, device="cpu")
    train_run(recipe, inputs["model"], inputs["data"], OPTIONS["adapter"], tmp_path / "one")
    last = latest(tmp_path / "one/checkpoints").relative_to(tmp_path / "one")
    assert latest(tmp_path / "two/checkpoints").name == last.name == "checkpoint-15"
    close(
        tmp_path / "one",
        tmp_path / "two",
        ("adapter/adapter.safetensors", last / "adapters/adapter/adapter.safetensors"),
    )
    one, two = read_record(tmp_path / "one"), read_record(tmp_path / "two")
    assert (one.environment["processes"], two.environment["processes"]) == (1, 2)
    assert len(one.epochs) == len(two.epochs) == 4
    for alone, together in zip(one.epochs, two.epochs, strict=True):
        assert together.metrics == pytest.approx(alone.metrics, abs=1e-5)
        assert together.train_loss == pytest.approx(alone.train_loss, abs=1e-5)
    # What the monitor reads is the mean of the processes.
    assert [step for step, _ in two.monitor.losses] == [step for step, _ in one.monitor.losses]
    seen = [[loss for _, loss in record.monitor.losses] for record in (one, two)]
    assert seen[1] == pytest.approx(seen[0], abs=1e-5)
    assert two.monitor.history == one.monitor.history


def test_one_of_several_processes_leaves_before_the_interpreter_is_taken_down(tmp_path):
    """gloo's threads would abort it. What was asked to run at exit runs, and the exit code and the output are kept."""
    code = f"""
import atexit, builtins, torch
class Last:
    def __del__(self): print("taken down", flush=True)
builtins.last = Last()
atexit.register(print, "at exit")
if {{}}:
    torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/met", rank=0, world_size=1)
from inarch.cli import main
main(["nonsense"])
"""
    alone = subprocess.run([sys.executable, "-c", code.format(0)], capture_output=True, text=True, check=False)
    together = subprocess.run([sys.executable, "-c", code.format(1)], capture_output=True, text=True, check=False)
    assert (alone.returncode, together.returncode) == (2, 2)
    assert (alone.stdout, together.stdout) == ("at exit\ntaken down\n", "at exit\n")
    assert alone.stderr == together.stderr


# From here on processes are forked from one that has imported everything, which takes longer than the runs.


def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def start():
    """Start the processes of one training; their standard error goes to a file each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inarch.train.run", "inarch.cli.train"])

    def run(arguments, logs, number=2):
        shared = (
            {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())} if number > 1 else {}
        )
        processes = []
        for rank in range(number):
            settings = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}
            code = (
                f"import os; os.environ.update({settings!r})\n"
                f"file = os.open({str(logs)!r} + '.{rank}', os.O_CREAT | os.O_WRONLY | os.O_TRUNC); os.dup2(file, 2)\n"
                f"from inarch.cli import main; main({arguments!r})\n"
            )
            processes.append(context.Process(target=exec, args=(code, {})))
            processes[-1].start()
        return processes

    return run


def codes(processes):
    for process in processes:
        process.join(WAIT)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("task", ["single", "multi"])
def test_processes_and_parts_give_what_one_process_gives(start, inputs, tmp_path, task):
    table = {"labels": str(Path(inputs["data"]).parent / "labels.csv"), "validation": "0.2"}
    extra = table if task == "multi" else {}
    assert codes(start(words(inputs, tmp_path / "one", **extra), tmp_path / "one", 1)) == [0]
    assert codes(start(words(inputs, tmp_path / "two", accumulation="2", **extra), tmp_path / "two")) == [0, 0]
    last = latest(tmp_path / "one/checkpoints").relative_to(tmp_path / "one") / "adapters/adapter/adapter.safetensors"
    close(tmp_path / "one", tmp_path / "two", (last,))


def test_two_processes_stop_early_together(start, inputs, tmp_path):
    slow = [*words(inputs, tmp_path / "run", **{"learning-rate": "1e-7", "batch-size": "2"}), "--stop-early"]
    assert codes(start(slow, tmp_path / "log")) == [1, 1]
    record = read_record(tmp_path / "run")
    assert (record.status, record.monitor.verdict) == ("stopped", "stalled")
    assert record.epochs[-1].step == record.monitor.step < record.monitor.num_steps
    first, second = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert "A training with `--stop-early` must learn; got stalled at step" in first
    assert "stalled" not in second


def test_two_processes_that_are_killed_resume_to_the_same_bytes(start, inputs, tmp_path):
    adapter = {"adapter": "adapter_plus[reduction_factor=4,dropout=0.1]"}
    assert codes(start(words(inputs, tmp_path / "whole", **adapter), tmp_path / "whole")) == [0, 0]
    processes = start(words(inputs, tmp_path / "parts", **adapter), tmp_path / "parts")
    limit = time.monotonic() + WAIT
    while latest(tmp_path / "parts/checkpoints") is None and time.monotonic() < limit:
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    assert codes(processes) == [-signal.SIGKILL] * 2
    resume = ["train", "--quiet", "--output", str(tmp_path / "parts"), "--resume"]
    assert codes(start(resume, tmp_path / "parts")) == [0, 0]
    last = latest(tmp_path / "whole/checkpoints")
    for path in (path for path in last.rglob("*") if path.suffix in (".safetensors", ".pt", ".pth")):
        assert path.read_bytes() == (tmp_path / "parts" / path.relative_to(tmp_path / "whole")).read_bytes(), path
    states = [torch.load(last / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in (0, 1)]
    assert not torch.equal(*states)  # each process has a dropout of its own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch-size": "9"}, "`--batch-size` must be divided evenly; got 9 for 2 processes"),
        ({"model": "nobody/nothing"}, "A model is `demo`"),
        ({"output": "/dev/null/run"}, "The output folder must be writable"),
    ],
)
def test_what_all_processes_meet_is_said_once(start, inputs, tmp_path, changes, message):
    assert codes(start(words(inputs, tmp_path / "run", **changes), tmp_path / "log")) == [1, 1]
    first, second = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert message in first
    assert "Error" not in second
    assert "Traceback" not in first + second
    assert not (tmp_path / "run").exists()
