"""Whether what was proved before training is what training shows, by the criteria of the study."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .record import Record
from .trials import FIFTHS, SEEDS, Fold, Judgement, Outcome, Trial, flags_of

LOST_POINTS, SOUND_POINTS = 15.0, 3.0


@dataclass(frozen=True)
class Study:
    """The eight combinations on one backbone. Accuracies and differences of them are in points, hundredths.

    `folds` are those held out, one after the other, where one combination of each formula was trained; or None for 400
    examples, where all eight were.
    """

    backbone: str
    record: Record
    folds: tuple[Fold | None, ...] = FIFTHS

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Those with which everything was trained, a head alone too."""
        adapters = [*(one.adapter for one in self.judgements), None]
        return tuple(s for s in SEEDS if all(t in self.record.outcomes for a in adapters for t in self._trials(a, s)))

    def _trials(self, adapter: str | None, seed: int) -> list[Trial]:
        trained = adapter if None in self.folds else self.trained_as(adapter)
        return [Trial(backbone=self.backbone, adapter=trained, seed=seed, fold=fold) for fold in self.folds]

    def trained_as(self, adapter: str | None) -> str | None:
        """The first of the combinations with the formula of this one."""
        formulas = {one.adapter: one.formula for one in self.judgements}
        return adapter and next(name for name, formula in formulas.items() if formula == formulas[adapter])

    @property
    def judgements(self) -> list[Judgement]:
        """The eight, as they were proved."""
        return self.record.judgements

    def runs(self, adapter: str | None) -> list[Outcome]:
        """The runs of a configuration, by seed; what the parts have shown, as one."""
        return [pooled([self.record.outcomes[trial] for trial in self._trials(adapter, seed)]) for seed in self.seeds]

    @property
    def num_held_out(self) -> int:
        """On how many examples an accuracy is measured."""
        return self.runs(None)[0].num_held_out

    def points(self, adapter: str | None) -> list[float]:
        """Accuracy by seed."""
        return [100 * run.accuracy for run in self.runs(adapter)]

    def mean(self, adapter: str | None) -> float:
        """Accuracy, the mean over the seeds."""
        return statistics.fmean(self.points(adapter))

    @cached_property
    def sound(self) -> list[str]:
        """The configurations that are proved sound."""
        return [one.adapter for one in self.judgements if one.verdict == "preserved"]

    @cached_property
    def best(self) -> float:
        """The mean of the best sound configuration."""
        return max(map(self.mean, self.sound))

    @property
    def spread(self) -> float:
        """Between the best and the worst mean of the sound configurations."""
        return self.best - min(map(self.mean, self.sound))

    def behind(self, adapter: str) -> float:
        """How far the mean is behind that of the worst sound configuration."""
        return min(map(self.mean, self.sound)) - self.mean(adapter)

    def pairs(self, one: Judgement, *, same_input: bool = False) -> list[tuple[Outcome, Outcome]]:
        """By function that a repair makes, where there are several, and by seed: the run as it is, and repaired.

        `same_input` leaves out the repairs whose adapter reads something else, by `original_ln_before`.
        """
        reads = flags_of(one.adapter)[0]
        fixes = [fix for fix in one.fixes if not same_input or flags_of(fix)[0] == reads]
        repaired = dict.fromkeys(map(self.trained_as, fixes))
        return [pair for fix in repaired for pair in zip(self.runs(one.adapter), self.runs(fix), strict=True)]

    def gaps(self, one: Judgement, *, same_input: bool = False) -> list[float]:
        """How many points a configuration is behind in each of its pairs."""
        return [100 * (fixed.accuracy - run.accuracy) for run, fixed in self.pairs(one, same_input=same_input)]

    def num_higher_losses(self, one: Judgement) -> int:
        """In how many of its pairs its loss on the held-out examples is the higher one."""
        return sum(run.losses[-1] > repaired.losses[-1] for run, repaired in self.pairs(one))

    def agrees(self, one: Judgement) -> bool:
        """Whether training shows what was proved of a configuration."""
        if one.verdict == "preserved":
            return self.best - self.mean(one.adapter) <= SOUND_POINTS
        if one.verdict == "skip connection lost":
            return self.behind(one.adapter) >= LOST_POINTS
        return all(gap > 0 for gap in self.gaps(one))

    @property
    def num_agreeing(self) -> int:
        """How many of the eight."""
        return sum(map(self.agrees, self.judgements))

    def twins(self) -> Iterator[tuple[Judgement, Judgement]]:
        """Pairs of configurations that compute the same function."""
        for index, one in enumerate(self.judgements):
            yield from ((one, other) for other in self.judgements[index + 1 :] if other.formula == one.formula)

    def twin_difference(self) -> tuple[float, float]:
        """The largest difference of twins in accuracy, in points, and in the loss on the held-out examples."""
        pairs = [
            pair
            for one, other in self.twins()
            for pair in zip(self.runs(one.adapter), self.runs(other.adapter), strict=True)
        ]
        accuracy = max(100 * abs(one.accuracy - other.accuracy) for one, other in pairs)
        return accuracy, max(abs(a - b) for one, other in pairs for a, b in zip(one.losses, other.losses, strict=True))

    def verdicts(self, *kinds: str) -> list[Judgement]:
        """The configurations of these verdicts."""
        return [one for one in self.judgements if one.verdict in kinds]


def pooled(runs: Sequence[Outcome]) -> Outcome:
    """What runs with the same lengths have shown on all that they held out, under the first one's name."""
    if len(runs) == 1:
        return runs[0]
    sizes = [run.num_held_out for run in runs]

    def mean(lists: Iterable[Sequence[float]]) -> tuple[float, ...]:
        return tuple(
            math.fsum(n * value for n, value in zip(sizes, values, strict=True)) / sum(sizes)
            for values in zip(*lists, strict=True)
        )

    right = mean(run.accuracies for run in runs)
    return Outcome(
        trial=runs[0].trial,
        num_held_out=sum(sizes),
        accuracies=tuple(round(value * sum(sizes)) / sum(sizes) for value in right),  # a tie is one, however rounded
        losses=mean(run.losses for run in runs),
        training_losses=mean(run.training_losses for run in runs),
    )


def mean_points(record: Record, seeds: Sequence[int], **wanted: Any) -> float:
    """Mean accuracy, in points, of the trial with these values over the seeds."""
    return statistics.fmean(100 * record.outcomes[Trial(seed=seed, **wanted)].accuracy for seed in seeds)


def joined(records: Iterable[Record]) -> Record:
    """One record with all that several have."""
    whole = list(records)
    return Record(
        whole[0].path,
        [one for record in whole for one in record.judgements],
        {trial: run for record in whole for trial, run in record.outcomes.items()},
    )


def overlap(below: Sequence[float], above: Sequence[float]) -> bool:
    """Whether any value of one list is on the other's side."""
    return max(below) >= min(above)
