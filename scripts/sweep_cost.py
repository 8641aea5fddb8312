#!/usr/bin/env python3
"""What a study costs against a plain grid: 48 configurations on the demonstration backbone and data, both ways.

    .venv/bin/python scripts/sweep_cost.py [--epochs 3] [--output build/sweep-cost]

The grid trains every configuration to its end, the unsound ones too. The study has the same configurations, and spares
what the checker refuses, what is proved equal to another, what Hyperband finds behind and what the monitor stops. Both
are studies on disk, so the script goes on where it was ended. Takes half an hour on a quiet core.
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path

import torch

from inarch.core.records import StudyRecord, TrialRecord
from inarch.sweep.run import run_study
from inarch.sweep.study import StudyConfig
from inarch.sweep.trial import Audience
from inarch.train.recipe import Recipe

VARY = {
    "original_ln_before": [True, False],
    "original_ln_after": [True, False],
    "residual_before_ln": [True, False],
    "reduction_factor": [4, 16, 64],
    "learning_rate": [1e-3, 4e-3],
}
PLAIN = StudyConfig(vary=VARY, adapter="seq_bn", pruner="none", allow_unsound=True, reuse=False)
SPARING = StudyConfig(vary=VARY, adapter="seq_bn")


class Teller(Audience):
    """Prints a line for each trial."""

    def finish(self, trial: TrialRecord) -> None:
        value = "" if trial.value is None else f"{trial.value:.4f}"
        print(trial.number, str(trial.adapter), trial.status, trial.decided_by, value, trial.steps, flush=True)


def main() -> None:
    """Run both and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/sweep-cost"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = {}
    for name, study in (("sparing", SPARING), ("plain", PLAIN)):
        recipe = Recipe(epochs=options.epochs, batch_size=32, stop_early=name == "sparing")
        records[name] = run_study(study, recipe, "demo", "digits", options.output / name, audience=Teller())
    compare(records["plain"], records["sparing"])


def compare(plain: StudyRecord, sparing: StudyRecord) -> None:
    """Print steps, and how good the chosen configuration is among all."""
    whole = {tuple(trial.values.items()): trial.value or 0 for trial in plain.trials}
    assert plain.best is not None
    assert sparing.best is not None
    best, chosen = plain.trials[plain.best], sparing.trials[sparing.best]
    print(f"plain grid: {plain.steps:,} steps, best {best.values}: {best.value:.4f}")
    print(f"study: {sparing.steps:,} steps, {sparing.steps / plain.steps:.1%}; best {chosen.values}")
    print(f"the study's choice in the plain grid: {whole[tuple(chosen.values.items())]:.4f}")
    steps: dict[str, int] = defaultdict(int)
    for trial in sparing.trials:
        steps[trial.status] += trial.steps
    for status, number in Counter(trial.status for trial in sparing.trials).most_common():
        print(f"  {number:2d} {status}, {steps[status]:,} steps")


if __name__ == "__main__":
    main()
