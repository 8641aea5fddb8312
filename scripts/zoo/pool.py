"""Runs model types in worker processes, each of which handles many, within limits of time and memory."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(
    task: str,
    types: Sequence[str],
    *,
    workers: int,
    seconds: float,
    gigabytes: float,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Hand every type to one of the workers; `done` gets its record, from one thread at a time."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for model_type in types:
        todo.put(model_type)
    lock = threading.Lock()

    def serve() -> None:
        worker = None
        while True:
            try:
                model_type = todo.get_nowait()
            except queue.Empty:
                break
            if worker is None:
                worker = _Worker(task, gigabytes)
            record = worker.ask(model_type, seconds)
            if record is None:
                worker.end()
                record = {
                    "type": model_type, "verdict": "fails", "stage": "process", "seconds": seconds,
                    "reason": worker.epitaph(seconds),
                }  # fmt: skip
                worker = None
            with lock:
                done(record)
        if worker is not None:
            worker.end()

    threads = [threading.Thread(target=serve) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The same rounding wherever in memory a tensor happens to lie: differences of exactly 0 are claimed here.
    "MKL_CBWR": "COMPATIBLE",
}


class _Worker:
    def __init__(self, task: str, gigabytes: float) -> None:
        environment = os.environ | _ENVIRONMENT
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE), "worker", task, str(gigabytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._late = False
        threading.Thread(target=self._listen, daemon=True).start()
        if self._answers.get() != "ready\n":
            raise RuntimeError("a worker of the zoo does not start; run `python scripts/zoo worker tiny 8`")

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, model_type: str, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{model_type}\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self._late = True
            return None
        except BrokenPipeError:
            return None
        return json.loads(answer) if answer else None

    def epitaph(self, seconds: float) -> str:
        if self._late:
            return f"takes longer than {seconds:g} s"
        return f"the process ended with status {self._process.returncode}"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(task: Callable[[str], dict[str, Any]], gigabytes: float) -> None:
    """A worker: a type on each line that comes in, a record on each that goes out."""
    import resource

    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a model prints is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        start = time.monotonic()
        try:
            record = task(line.strip())
        except MemoryError:
            record = {
                "type": line.strip(), "verdict": "fails", "stage": "process",
                "reason": f"needs more than {gigabytes:g} GB", "seconds": round(time.monotonic() - start, 2),
            }  # fmt: skip
        print(json.dumps(record), file=answers, flush=True)
