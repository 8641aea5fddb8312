"""Judge every model type of the installed transformers.

python scripts/zoo tiny            tiny random models: sites, graft, gradients, save, load, detach
python scripts/zoo meta            default, full-size configurations: sites, on the meta device
python scripts/zoo table           docs/coverage.md from the records of both
python scripts/zoo record          the layouts of the tiny models, which tests compare with
python scripts/zoo record --check  what the last tiny run found otherwise
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "build" / "zoo"


def main() -> None:
    """Read the command and run it."""
    parser = argparse.ArgumentParser(
        prog="python scripts/zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("tiny", "meta"):
        command = commands.add_parser(name)
        command.add_argument("--only", nargs="+", metavar="TYPE", help="these model types")
        command.add_argument("--shard", default="1/1", help="the n-th of m parts, as n/m")
        command.add_argument("--resume", action="store_true", help="leave out types that have a record already")
        command.add_argument("--failing", action="store_true", help="only types whose record is no success")
        command.add_argument("--workers", type=int, default=2)
        command.add_argument("--seconds", type=float, default=60, help="time limit of one type")
        command.add_argument("--gigabytes", type=float, default=12, help="memory limit of a worker")
    commands.add_parser("table", help="write docs/coverage.md from the records")
    record = commands.add_parser(
        "record", help="take the layouts of the last tiny run for those that tests compare with"
    )
    record.add_argument("--check", action="store_true", help="compare them instead, and name what changed")
    worker = commands.add_parser("worker", help="(what the pool starts)")
    worker.add_argument("task")
    worker.add_argument("gigabytes", type=float)
    options = parser.parse_args()
    if options.command == "worker":
        _work(options.task, options.gigabytes)
    elif options.command == "table":
        _table()
    elif options.command == "record":
        sys.exit(_record(check=options.check))
    else:
        _run(options)


def _work(task: str, gigabytes: float) -> None:
    import torch

    torch.set_num_threads(1)
    from zoo import pool
    from zoo.optional import add_timm

    add_timm()

    if task == "tiny":
        from zoo.judge import judge

        pool.serve(lambda model_type: judge(model_type).to_dict(), gigabytes)
    else:
        from zoo.full_size import full_size

        pool.serve(full_size, gigabytes)


def _run(options: argparse.Namespace) -> None:
    from zoo import pool
    from zoo.build import model_types

    path = RESULTS / f"{options.command}.jsonl"
    records = read(path)
    number, parts = map(int, options.shard.split("/"))
    types = options.only or model_types()
    types = [t for place, t in enumerate(types) if place % parts == number - 1]
    if options.resume:
        types = [t for t in types if t not in records]
    if options.failing:
        types = [t for t in types if records.get(t, {}).get("verdict") != "adapts"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    count = 0

    def done(record: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        mark = {"adapts": "ok", "refused": "--"}.get(record["verdict"], "!!")
        end = f"{record['stage']}: {record['reason'][:150]}" if mark != "ok" else f"{record['sites']} sites"
        print(
            f"{count:4}/{len(types)} {record['seconds']:6.1f} s {mark} {record['type']:36} {end}".replace("\n", " "),
            flush=True,
        )

    pool.run(
        options.command, types, workers=options.workers, seconds=options.seconds, gigabytes=options.gigabytes, done=done
    )
    print(f"{len(types)} types in {time.monotonic() - start:.0f} s")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest record of every type."""
    if not path.exists():
        return {}
    return {record["type"]: record for record in map(json.loads, path.read_text().splitlines())}


def _table() -> None:
    import transformers

    from zoo.table import coverage

    tiny, meta = read(RESULTS / "tiny.jsonl"), read(RESULTS / "meta.jsonl")
    page = ROOT / "docs" / "coverage.md"
    page.write_text(coverage(tiny, meta, transformers.__version__), encoding="utf-8")
    print(f"{page.relative_to(ROOT)}: {len(tiny)} types")


def _record(*, check: bool) -> int:
    from zoo import recorded

    records = read(RESULTS / "tiny.jsonl")
    if not check:
        print(f"{recorded.FILE.relative_to(ROOT)}: {recorded.write(records)} layouts")
        return 0
    found = recorded.changes(records)
    print("\n".join(found) or f"the layouts of {len(records)} types are as recorded")
    return int(bool(found))
