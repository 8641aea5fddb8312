"""The rule by which the first steps of a training are judged: plain numbers in, a verdict with its reason out.

The limits were chosen on trainings of two kinds of adapter and tried on others: `docs/monitor.md` has the figures.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["undecided", "learning", "stalled", "diverging", "dead adapter"]
FAILING: tuple[Verdict, ...] = ("stalled", "diverging", "dead adapter")

GAIN = 0.02
"""Share of the reference by which the loss must have fallen below it: then the inputs tell the model something."""
WORSE = 1.1
"""A loss above the reference, and above the first losses, by this factor is diverging."""
SURE, SURE_FALL = 2.0, 3.0
"""Standard errors by which a mean must be on the right side of a limit, and by which a loss must have fallen: that is
looked at again and again."""
LOW_STEP, AMPLE_STEP, HIGH_STEP = 1e-3, 1e-2, 0.3
"""Updates of an adapter in one step, relative to its weights: lower ones are slow, and a higher learning rate may help;
with ample ones a loss that does not fall early will not fall later; with higher ones it does not settle."""
FAR = 0.5
"""Drift of the stream before training above which the adapter does not begin near the pre-trained function."""
KNOWS = 0.8
"""A training that begins below this share of the labels' entropy begins with a model that knows the task."""
SCATTER = 20
"""The latest readings, from which it is taken how much one scatters."""
FEWEST = 8
"""Steps before which nothing is said of the loss."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The mean training loss of some steps in a row."""

    step: int
    """The last of them, counted from 1."""
    count: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """All that a verdict rests on."""

    readings: Sequence[Reading]
    entropy: float | None = None
    """The loss of the best prediction that looks at no input, where the labels' frequencies are known."""
    num_places: int = 0
    """Places beside the head where something is trained."""
    silent: Sequence[str] = ()
    """Those of them that no gradient has reached in any sampled step; empty before the second sample."""
    has_head: bool = True
    """Whether a task head is trained; without one the loss falls later."""
    still: bool = False
    """Whether nothing beside the head has moved in the sampled steps."""
    update: float | None = None
    """The largest relative change of the weights of a place in the last sampled step, at the highest learning rate; of
    the head only where nothing else is trained."""
    drift: float | None = None
    """The relative change of the stream by the adapter's initial weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prognosis:
    """A verdict, the sentence that says why, and the numbers it rests on."""

    verdict: Verdict
    reason: str
    evidence: Mapping[str, float] = field(default_factory=dict)


def reference(signs: Signs) -> tuple[float, str]:
    """What the loss is compared with, and the name of that: the labels' entropy, or the loss of the first steps."""
    start = first_loss(signs.readings)
    if signs.entropy is None or start < KNOWS * signs.entropy:
        return start, "initial loss"
    return signs.entropy, "label entropy"


def first_loss(readings: Sequence[Reading]) -> float:
    """The mean loss of the first two steps, or of the first reading if it has more."""
    return _mean(readings[:1] if readings[0].count > 1 else readings[:2])


def judge(signs: Signs, *, is_due: bool, is_last: bool) -> Prognosis:
    """The verdict.

    **Arguments**: `is_due` says that there are enough steps for any verdict, `is_last` that a loss which is falling,
    and not far enough to be sure, is to be judged now.
    """
    readings = signs.readings
    if any(not math.isfinite(one.loss) for one in readings):
        step = next(one.step for one in readings if not math.isfinite(one.loss))
        return Prognosis(verdict="diverging", reason=f"the loss is no number by step {step}{_too_high(signs)}")
    if signs.num_places and len(signs.silent) == signs.num_places:
        return Prognosis(verdict="dead adapter", reason="no gradient reaches the adapter")
    if signs.num_places and signs.still:
        return Prognosis(verdict="dead adapter", reason="the optimiser does not move the adapter, which has gradients")
    steps = sum(one.count for one in readings)
    if not readings or steps < FEWEST:
        return Prognosis(verdict="undecided", reason="there are too few steps to judge by")
    limit, kind = reference(signs)
    start, (recent, error, scatter) = first_loss(readings), _recent(readings)
    gain = 1 - recent / limit if limit > 0 else 0.0
    doubt = SURE * error / limit if limit > 0 else 0.0
    evidence = {"start": start, "recent": recent, "gain": gain, "error": error}
    against = "what the labels' frequencies alone give" if kind == "label entropy" else "the first steps"
    told = f"the loss is {recent:.3g} against {limit:.3g} of {against}"
    # Of two classes a head that knows nothing may be lucky: the loss must have fallen, too.
    is_falling = start - recent > SURE_FALL * math.hypot(error, scatter / math.sqrt(2))
    if gain - doubt >= GAIN and is_falling:
        return Prognosis(verdict="learning", reason=f"{told}{_partly(signs)}", evidence=evidence)
    top = WORSE * max(limit, start)
    if is_due and recent - SURE * error > top:
        return Prognosis(verdict="diverging", reason=f"{told}, after {start:.3g}{_too_high(signs)}", evidence=evidence)
    # How small a step is too small differs between methods, so a slow training is waited for, however slow it is.
    is_ample = signs.has_head and signs.update is not None and signs.update >= AMPLE_STEP
    may_fall = is_falling or gain + doubt >= GAIN
    if not is_due or (not is_last and (may_fall or not is_ample)):
        return Prognosis(verdict="undecided", reason=f"{told}{_too_low(signs)}", evidence=evidence)
    if gain >= GAIN and is_falling:
        return Prognosis(verdict="learning", reason=f"{told}{_partly(signs)}", evidence=evidence)
    return Prognosis(verdict="stalled", reason=f"{told}{_why(signs)}", evidence=evidence)


def _recent(readings: Sequence[Reading]) -> tuple[float, float, float]:
    """The mean loss of the last third of the readings, three at least, its standard error, and how much one scatters.

    The scatter is taken from the differences of neighbours, which a trend hardly touches.
    """
    last = readings[-max(3, len(readings) // 3) :]
    if len(readings) < 2:
        return _mean(last), math.inf, math.inf
    near = readings[-SCATTER:]
    scatter = math.sqrt(statistics.fmean((a.loss - b.loss) ** 2 for a, b in itertools.pairwise(near)) / 2)
    return _mean(last), scatter / math.sqrt(len(last)), scatter


def _mean(readings: Sequence[Reading]) -> float:
    return math.fsum(one.loss * one.count for one in readings) / sum(one.count for one in readings)


def _partly(signs: Signs) -> str:
    return f"; no gradient reaches {len(signs.silent)} of {signs.num_places} places" if signs.silent else ""


def _too_high(signs: Signs) -> str:
    if signs.update is not None and signs.update > HIGH_STEP:
        return f"; a step changes the adapter by {signs.update:.2g} of its weights: lower the learning rate"
    return ""


def _too_low(signs: Signs) -> str:
    if signs.update is not None and signs.update < LOW_STEP:
        return f"; a step changes the adapter by {signs.update:.2g} of its weights: raise the learning rate"
    return ""


def _why(signs: Signs) -> str:
    """What the other signs say of a loss that does not fall."""
    if signs.drift is not None and signs.drift > FAR:
        return (
            f"; before training the adapter changes the stream by {signs.drift:.2g} of its size: check its wiring"
            " with `inarch check`"
        )
    if signs.update is not None and signs.update > HIGH_STEP:
        return _too_high(signs)
    return _too_low(signs) or "; the steps are of a usual size: look at the labels and at what the model is shown"
