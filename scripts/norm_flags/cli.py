"""Train a part of the norm-flags study and keep its record in docs/norm-flags/.

    python scripts/norm_flags vit        # or dinov2, swinv2, bert: eight combinations of flags, three seeds
    python scripts/norm_flags practices  # the recipe, varied on the ViT

What is proved of a configuration is written down before it is trained. Trainings that the record has are passed over;
`--anew` forgets it first. `scripts/docs_norm_flags.py` makes the page from the records.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from inarch.train.quiet import quiet

from .record import FOLDER, Record
from .subjects import SUBJECTS
from .trials import FIFTHS, HALVES, SEEDS, Judgement, Trial, adapter, judge, run

SOUND, LOST = adapter(before=True, after=True, residual=True), adapter(before=True, after=False, residual=True)
PRACTICE_SEEDS = SEEDS[:1]
REDUCTION_FACTORS = (2, 8, 32, 64)  # beside 16
LEARNING_RATES = (1e-4, 1e-3, 5e-3, 1e-2)  # beside the recipe's 2e-3
EPOCHS = (12,)  # beside the recipe's 3


def combinations() -> list[str]:
    """The eight configurations."""
    return [
        adapter(before=before, after=after, residual=residual)
        for before, after, residual in itertools.product((True, False), repeat=3)
    ]


def with_reduction(factor: int) -> str:
    """The sound configuration with another reduction factor."""
    return f"{SOUND[:-1]},reduction_factor={factor}]"


def flag_trials(backbone: str, judgements: Sequence[Judgement]) -> list[Trial]:
    """A head alone, and eight combinations with 400 examples held out, or one of each formula with a part of all."""
    formulas = list({one.formula: one.adapter for one in reversed(judgements)}.values())[::-1]
    return [
        Trial(backbone=backbone, adapter=config, seed=seed, fold=fold)
        for folds in ((None,), HALVES, FIFTHS)
        for seed in SEEDS
        for fold in folds
        for config in [*(combinations() if fold is None else formulas), None]
    ]


def practice_trials() -> list[Trial]:
    """The recipe, one setting at a time; the settings of the recipe itself are among the trials of the flags."""
    trials = []
    for seed in PRACTICE_SEEDS:
        trials += [Trial(backbone="vit", adapter=with_reduction(factor), seed=seed) for factor in REDUCTION_FACTORS]
        trials += [
            Trial(backbone="vit", adapter=config, seed=seed, learning_rate=rate)
            for rate, config in itertools.product(LEARNING_RATES, (SOUND, LOST))
        ]
        trials += [
            Trial(backbone="vit", adapter=config, seed=seed, epochs=epochs)
            for epochs, config in itertools.product(EPOCHS, (SOUND, LOST))
        ]
    return trials


def main(argv: Sequence[str] | None = None) -> None:
    """Prove, train, record."""
    parser = argparse.ArgumentParser(
        prog="python scripts/norm_flags", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*SUBJECTS, "practices"], help="what to train")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the records are")
    parser.add_argument("--anew", action="store_true", help="forget what the record has")
    parser.add_argument("--limit", type=int, help="train this many at most")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    is_practices = arguments.part == "practices"
    record = Record.read(arguments.part, arguments.folder)
    if arguments.anew:
        record = Record(record.path)
    configs = [*map(with_reduction, REDUCTION_FACTORS), SOUND, LOST] if is_practices else combinations()
    record.judgements = [judge("vit" if is_practices else arguments.part, config) for config in configs]
    record.write()
    trials = practice_trials() if is_practices else flag_trials(arguments.part, record.judgements)
    for trial in [one for one in trials if one not in record.outcomes][: arguments.limit]:
        with quiet():
            record.outcomes[trial] = outcome = run(trial)
        record.write()
        fold = "" if trial.fold is None else f" part {trial.fold[0] + 1} of {trial.fold[1]}"
        print(f"{trial.adapter or 'head alone'} seed {trial.seed}{fold}: {outcome.accuracy:.4f}", flush=True)
