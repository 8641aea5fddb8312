"""Fit the limits of the rule `large-step` on labelled trainings, and show what they are worth on tasks left out.

    python scripts/fit_step_rule.py TRIALS.csv [--table tests/fixtures/step_trials.csv]

TRIALS.csv has a training per row: suite, task, method, bottleneck, scale, lr, weight_decay, train_loss, train_top1,
val_top1 (the sweeps of OSU-MLB/ViT_PEFT_Vision, arXiv 2409.16434). A training failed if its validation accuracy is
below half of the best of its suite, task and method. `--table` writes the counts by task and step that the tests use;
without TRIALS.csv the figures are computed from that table.

The step is the learning rate times the scale of a bottleneck adapter, or times alpha (rank times scale) of LoRA.
"""

import argparse
import csv
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parent.parent / "tests" / "fixtures" / "step_trials.csv"
KINDS = {
    "bottleneck": re.compile(r"(lora_p_adapter|rand_h_adapter|adaptformer)(_\d+)?"),
    "lora": re.compile(r"lora(_\d+)?"),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """The trainings of one kind of method on one task with one step."""

    kind: str
    task: str
    step: float
    runs: int
    failed: int


@dataclass(frozen=True, slots=True)
class Score:
    """How a limit does: of those it flags the share that failed, and of those that failed the share it flags."""

    hits: int
    flagged: int
    failed: int

    @property
    def precision(self) -> float:
        return self.hits / self.flagged if self.flagged else math.nan

    @property
    def recall(self) -> float:
        return self.hits / self.failed if self.failed else math.nan

    @property
    def f2(self) -> float:
        """Recall counts twice: a warning that is not heeded costs less than a failed training."""
        return 5 * self.hits / (4 * self.failed + self.flagged) if self.failed + self.flagged else 0.0


def score(cells: Iterable[Cell], limit: float) -> Score:
    """What a limit flags."""
    chosen = list(cells)
    above = [cell for cell in chosen if cell.step >= limit]
    return Score(
        sum(cell.failed for cell in above), sum(cell.runs for cell in above), sum(cell.failed for cell in chosen)
    )


def fit(cells: list[Cell]) -> float:
    """The limit with the best F2: between two steps that occur, their geometric mean, to one digit."""
    steps = sorted({cell.step for cell in cells})
    limits = [math.sqrt(low * high) for low, high in itertools.pairwise(steps)]
    return max(limits, key=lambda limit: score(cells, limit).f2)


def cross_validate(cells: list[Cell]) -> Score:
    """Every task judged by a limit that was fitted on the others."""
    scores = []
    for task in sorted({cell.task for cell in cells}):
        limit = fit([cell for cell in cells if cell.task != task])
        scores.append(score([cell for cell in cells if cell.task == task], limit))
    return Score(*(sum(getattr(s, name) for s in scores) for name in ("hits", "flagged", "failed")))


def read_table(path: Path = TABLE) -> list[Cell]:
    """The counts that the project keeps."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Cell(row["kind"], row["task"], float(row["step"]), int(row["runs"]), int(row["failed"]))
            for row in csv.DictReader(file)
        ]


def count(trials: Path) -> list[Cell]:
    """The counts of a file of trainings."""
    with trials.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["val_top1"] and row["lr"]]
    group: Callable[[dict[str, str]], tuple[str, ...]] = lambda row: (row["suite"], row["task"], row["method"])  # noqa: E731
    best: dict[tuple[str, ...], float] = defaultdict(float)
    for row in rows:
        best[group(row)] = max(best[group(row)], float(row["val_top1"]))
    counts: dict[tuple[str, str, float], list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        kind = next((name for name, pattern in KINDS.items() if pattern.fullmatch(row["method"])), None)
        if kind is None:
            continue
        scale = float(row["scale"] or 1)
        if kind == "lora":
            named = re.search(r"_(\d+)$", row["method"])
            scale *= float(named[1] if named else row["bottleneck"])
        entry = counts[kind, row["task"], float(f"{float(row['lr']) * scale:.6g}")]
        entry[0] += 1
        entry[1] += float(row["val_top1"]) < best[group(row)] / 2
    return [Cell(*key, *value) for key, value in sorted(counts.items())]


def main() -> None:
    """Fit, print, and write the table where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=Path, nargs="?", help="the file of trainings; without it the kept counts")
    parser.add_argument("--table", type=Path, help="where to write the counts")
    arguments = parser.parse_args()
    cells = count(arguments.trials) if arguments.trials else read_table()
    if arguments.table:
        with arguments.table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("kind", "task", "step", "runs", "failed"))
            writer.writerows((c.kind, c.task, c.step, c.runs, c.failed) for c in cells)
    for kind in KINDS:
        own = [cell for cell in cells if cell.kind == kind]
        left_out = cross_validate(own)
        print(
            f"{kind}: {sum(c.runs for c in own)} trainings on {len({c.task for c in own})} tasks, "
            f"{sum(c.failed for c in own)} failed; limit {fit(own):.2g}; on tasks left out precision "
            f"{left_out.precision:.1%}, recall {left_out.recall:.1%}"
        )


if __name__ == "__main__":
    main()
