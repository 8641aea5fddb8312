"""What a run does at the trainer's events."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.records import EpochRecord

_NOT_MEASURED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class Epochs(TrainerCallback):
    """Tells the data which epoch it is, and asks for checkpoints between the epochs."""

    def __init__(self, set_epoch: Callable[[int], None], save_steps: int | None) -> None:
        self.set_epoch = set_epoch
        self.save_steps = save_steps

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # At the end of an epoch the checkpoint comes after the evaluation, which a resumed run would not make up for.
        is_within = state.epoch is not None and not float(state.epoch).is_integer()
        if self.save_steps and state.global_step % self.save_steps == 0 and is_within:
            control.should_save = True


class Patience(TrainerCallback):
    """Stops when the result has not improved for some epochs.

    Decided from the trainer's log alone, so that a resumed run decides alike.
    """

    def __init__(self, metric: str, epochs: int) -> None:
        self.metric = f"eval_{metric}"
        self.epochs = epochs

    def is_exhausted(self, state: TrainerState) -> bool:
        """Whether there is no hope left."""
        scores = [entry[self.metric] for entry in state.log_history if self.metric in entry and entry["step"] > 0]
        return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= self.epochs

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.is_exhausted(state):
            control.should_training_stop = True


class Divergence(TrainerCallback):
    """Stops when the loss is no longer a number, before the useless weights become a checkpoint."""

    def __init__(self) -> None:
        self.has_diverged = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:
        if not math.isfinite((options.get("logs") or {}).get("loss", 0.0)):
            self.has_diverged = True
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False


class Report(TrainerCallback):
    """Writes the record after each checkpoint."""

    def __init__(self, write: Callable[[TrainerState], object]) -> None:
        self.write = write

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.write(state)


def epochs_of(history: Iterable[dict[str, Any]]) -> tuple[EpochRecord, ...]:
    """The trainer's log, one record for each step at which something was logged."""
    merged: dict[int, dict[str, Any]] = {}
    for entry in history:
        if "train_runtime" not in entry:
            merged.setdefault(int(entry["step"]), {}).update(entry)
    return tuple(
        EpochRecord(
            epoch=float(entry.get("epoch") or 0),
            step=step,
            train_loss=entry.get("loss"),
            learning_rate=entry.get("learning_rate"),
            gradient_norm=entry.get("grad_norm"),
            metrics={
                key.removeprefix("eval_"): value
                for key, value in entry.items()
                if key.startswith("eval_") and key.removeprefix("eval_") not in _NOT_MEASURED
            },
        )
        for step, entry in sorted(merged.items())
    )
