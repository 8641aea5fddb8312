"""Watches a training from its first steps, and says whether it will come to anything.

    as a callback    Trainer(..., callbacks=[inarch.Monitor(labels=labels, stop=True)])
    in a loop        monitor = inarch.Monitor(model, num_steps=1000, labels=labels)
                     loss.backward(); monitor.step(loss); optimizer.step(); optimizer.zero_grad()
                     if monitor.should_stop: break

Losses and norms stay on their device until they are read: about twenty times before the verdict, and then once in
every fiftieth of the steps. Tensors are measured in the steps 1, 2, 4, 8 and so on, the stream in every other of them.
Where several processes train, what is read is their mean, so that all of them come to the same verdict in one step.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..core.errors import ConfigError, SetupError
from ..core.records import MonitorRecord
from .prognosis import FAILING, Prognosis, Reading, Signs, Verdict, judge, reference
from .signs import HEAD, Parameters, Stream

logger = logging.getLogger(__name__)

SHARE = 0.1
"""The share of the steps after which there is a verdict, unless the first epoch ends before."""
LATEST = 1 / 3
"""The share of the steps after which there is no more waiting, unless the first epoch ends before."""
READINGS, LATER = 20, 50
"""Readings before the verdict, and in a whole training after it."""


class Monitor(TrainerCallback, ExportableState):
    """Says from the first steps whether a training is learning, stalled or diverging, or trains a dead adapter.

    A callback of `transformers.Trainer`, or told of each step by another loop. `verdict` is `undecided` at first; after
    a tenth of the steps, or at the end of the first epoch if that comes earlier, it is one of the others, or still
    `undecided` where more steps may help, until the first epoch ends or a third of the steps is done. It may change
    later.

    **Arguments**

    - `model`: what is trained, with its adapters; the trainer gives its own where it is left out.
    - `num_steps`: optimiser steps in all, and `steps_per_epoch`; a trainer knows them.
    - `labels`: those of the training data: an id for each sample or, where a sample may have several, a row of 0 and 1.
      Or `label_prior`, their frequencies; `multi_label=True` where each is that of one of several labels. Without
      either, the loss of the first steps is the reference.
    - `label_smoothing`: that of the loss.
    - `stop`: end the training where the verdict is `stalled`, `diverging` or `dead adapter`.

    Raises `ConfigError` for arguments that cannot be.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        num_steps: int | None = None,
        steps_per_epoch: int | None = None,
        labels: Iterable[Any] | None = None,
        label_prior: Sequence[float] | None = None,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        stop: bool = False,
    ) -> None:
        if labels is not None and label_prior is not None:
            raise ConfigError("Labels or their frequencies are given; got both. Leave out `label_prior`.")
        if labels is not None:
            label_prior, multi_label = frequencies(labels)
        self.stop = stop
        self.num_steps, self.steps_per_epoch = num_steps, steps_per_epoch
        self._prior = (label_prior, multi_label, label_smoothing)
        self.entropy = None if label_prior is None else prior_entropy(label_prior, multi_label, label_smoothing)
        self.memory: dict[str, Any] = _blank()
        self._rate = 1.0
        self._losses: list[Tensor] = []
        self._parts: list[tuple[Tensor, bool]] = []
        self._outputs: list[tuple[Tensor, bool]] = []
        self._samples: list[tuple[str, int, Tensor]] = []
        self._parameters: Parameters | None = None
        self._stream: Stream | None = None
        self._hook: Any = None
        self.listeners: list[Callable[[Monitor], object]] = [_log]
        """Told of each verdict, in the first process."""
        if model is not None:
            self._watch(model, is_compiled=False)

    # What it says

    @property
    def verdict(self) -> Verdict:
        """`undecided`, `learning`, `stalled`, `diverging` or `dead adapter`."""
        return self.memory["verdict"]  # type: ignore[no-any-return]

    @property
    def reason(self) -> str:
        """Why, in one sentence with the numbers."""
        return str(self.memory["reason"])

    @property
    def decided_at(self) -> int | None:
        """The optimiser step in which the verdict was first what it is; None while it is `undecided`."""
        return self.memory["decided_at"]  # type: ignore[no-any-return]

    @property
    def should_stop(self) -> bool:
        """Whether going on would be a waste: the verdict is one of failure, and `stop` was asked for."""
        return self.stop and self.verdict in FAILING

    def __str__(self) -> str:
        steps = f" of {self.num_steps}" if self.num_steps else ""
        step = self.decided_at or self.memory["step"]
        return f"{self.verdict} at step {step}{steps}: {self.reason}"

    def record(self) -> MonitorRecord:
        """The verdict and what it rests on, as plain data."""
        memory = self.memory
        readings = self._readings()
        signs = self._signs()
        limit, kind = reference(signs) if readings else (None, None)
        latest = {"update": signs.update, "drift_at_start": signs.drift, "drift": memory["drift"]}
        return MonitorRecord(
            verdict=self.verdict,
            step=self.decided_at,
            num_steps=self.num_steps,
            reason=self.reason,
            stopped=self.should_stop and memory["step"] < (self.num_steps or math.inf),
            reference=limit if limit is not None and math.isfinite(limit) else None,
            reference_kind=kind,
            evidence=_finite({**latest, **memory["evidence"]}),
            losses=tuple((one.step, one.loss if math.isfinite(one.loss) else None) for one in readings),
            gradients=_finite(memory["gradients"]),
            silent=tuple(signs.silent),
            history=tuple((int(step), str(verdict)) for step, verdict in memory["history"]),
        )

    # What it is told

    def see(self, loss: Tensor, *, is_sum: bool = True) -> None:
        """Be told the loss of a part of a batch; `is_sum` says that those of a batch add up to its loss."""
        self._parts.append((loss.detach(), is_sum))

    def step(self, loss: Tensor | float, *, rate: float = 1.0) -> None:
        """Be told the loss of a batch: once in each optimiser step, after `backward()` and before `zero_grad()`.

        **Arguments**: `rate` is the learning rate of this step divided by the highest one, where it changes.

        Raises `SetupError` where there are no gradients to be seen, and `ConfigError` without `num_steps`.
        """
        parameters = self._parameters
        if parameters is None or self.num_steps is None:
            raise ConfigError(
                "A monitor outside of a trainer is given the model and the number of steps; got "
                f"{'no model' if parameters is None else 'no `num_steps`'}. Write `Monitor(model, num_steps=...)`."
            )
        memory = self.memory
        memory["step"] = step = memory["step"] + 1
        home = parameters.tensors[0].device
        self._losses.append(torch.as_tensor(loss, device=home).detach().float().mean())
        self._measure(parameters, step)
        self._rate = rate
        due = self._due()
        every = max(1, (due - memory["first"]) // READINGS) if step <= due else max(1, self.num_steps // LATER)
        if step % every == 0 or step in (due, self._last_call()):
            self._read()

    def _measure(self, parameters: Parameters, step: int) -> None:
        update = parameters.updates()
        if update is not None:
            self._samples.append(("update", step - 1, torch.cat((update, update.new_tensor([self._rate])))))
        if step & (step - 1):  # no power of two
            return
        if not parameters.has_gradients():
            raise SetupError(
                f"A monitor is told of a step between `backward()` and `zero_grad()`; got step {step} without any "
                "gradient. Call `monitor.step(loss)` right after `loss.backward()`."
            )
        self._samples.append(("gradient", step, parameters.gradients()))
        # A forward of two samples costs more than all the rest: in the steps 1, 4, 16 and so on.
        drift = self._stream.drift() if self._stream is not None and step.bit_length() % 2 else None
        if drift is not None:
            self._samples.append(("drift", step, drift))
        parameters.keep()

    # What it makes of that

    def _due(self) -> int:
        """The step of the verdict."""
        steps = max(1, round(SHARE * (self.num_steps or 1)))
        return int(self.memory["first"]) + min(steps, self.steps_per_epoch or steps)

    def _last_call(self) -> int:
        """The step in which there is no more waiting: the first epoch's last one, or a third of all."""
        third = max(1, round(LATEST * (self.num_steps or 1)))
        return max(self._due(), int(self.memory["first"]) + min(third, self.steps_per_epoch or third))

    def _collect(self) -> None:
        """Bring what was measured from the device, as the mean over all processes."""
        if not self._losses:
            return
        vector = torch.cat([torch.stack(self._losses), *(values for _, _, values in self._samples)])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(vector)
            vector /= dist.get_world_size()
        values = vector.tolist()
        self.memory["unread"] += values[: len(self._losses)]
        at = len(self._losses)
        for kind, step, tensor in self._samples:
            self._note(kind, step, values[at : at + tensor.numel()])
            at += tensor.numel()
        self._losses, self._samples = [], []

    def _note(self, kind: str, step: int, values: list[float]) -> None:
        parameters, memory = self._parameters, self.memory
        assert parameters is not None
        if kind == "drift":
            found = [value for value in values if math.isfinite(value)]
            memory["drift"] = max(found) if found else None
            if memory["drift_at_start"] is None and step == 1:
                memory["drift_at_start"] = memory["drift"]
        elif kind == "gradient":
            memory["gradients"] = parameters.by_place(values)
            reached = set(memory["reached"])
            memory["reached"] += [k for k, norm in memory["gradients"].items() if norm != 0 and k not in reached]
            memory["num_gradients"] += 1
        else:
            half, rate = len(values) // 2, values.pop()
            changes, sizes = parameters.by_place(values[:half]), parameters.by_place(values[half:])
            memory["updates"] = {p: changes[p] / sizes[p] / rate for p in changes if sizes[p] and rate}
            memory["num_updates"] += 1
            memory["has_moved"] = memory["has_moved"] or any(change != 0 for p, change in changes.items() if p != HEAD)

    def _read(self) -> None:
        """Take a reading, and judge."""
        self._collect()
        memory = self.memory
        if memory["unread"]:
            count = len(memory["unread"])
            memory["readings"].append([memory["step"], count, math.fsum(memory["unread"]) / count])
            memory["unread"] = []
        step = memory["step"]
        signs = self._signs()
        found = judge(signs, is_due=step >= self._due(), is_last=step >= self._last_call())
        before = self.verdict
        if before == "learning" and found.verdict not in ("learning", "diverging", "dead adapter"):
            return  # a plateau is no stall
        if before != "undecided" and found.verdict in (before, "undecided"):
            return  # what is said of a verdict is what it was decided on
        memory["reason"] = found.reason
        memory["evidence"] = {**found.evidence, "update": signs.update, "drift": memory["drift"]}
        if found.verdict != before:
            self._decide(found)

    def _decide(self, found: Prognosis) -> None:
        memory = self.memory
        memory["verdict"], memory["decided_at"] = found.verdict, memory["step"]
        memory["history"].append([memory["step"], found.verdict])
        is_first = not dist.is_initialized() or dist.get_rank() == 0 if dist.is_available() else True
        for listener in self.listeners if is_first else ():
            listener(self)

    def _readings(self) -> list[Reading]:
        return [Reading(int(step), int(count), float(loss)) for step, count, loss in self.memory["readings"]]

    def _signs(self) -> Signs:
        memory = self.memory
        places = [place for place in memory["gradients"] if place != HEAD]
        updates = [ratio for place, ratio in memory["updates"].items() if place != HEAD or not places]
        return Signs(
            readings=self._readings(),
            entropy=self.entropy,
            num_places=len(places),
            has_head=len(places) < len(memory["gradients"]),
            silent=[p for p in places if p not in memory["reached"]] if memory["num_gradients"] > 1 else (),
            # The first steps of 16-bit training may be skipped, and the first of a warm-up has a rate of 0.
            still=memory["num_updates"] > 3 and not memory["has_moved"],
            update=max(updates, default=None),
            drift=memory["drift_at_start"],
        )

    # As a callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        model, loader = given["model"], given.get("train_dataloader")
        is_compiled = bool(args.torch_compile)
        if self._parameters is None or state.global_step == 0:
            self.close()
            self._watch(model, is_compiled=is_compiled)
        self.num_steps = state.max_steps
        per_step = max(1, args.gradient_accumulation_steps)
        self.steps_per_epoch = -(-len(loader) // per_step) if isinstance(loader, Sized) and len(loader) else None
        self.memory = _blank()
        self.memory["first"] = self.memory["step"] = state.global_step
        states: Any = state.stateful_callbacks or {}
        saved = states.get(type(self).__name__)
        if state.global_step and saved:
            self.memory |= (saved[0] if isinstance(saved, list) else saved)["attributes"]["memory"]
        if self._hook is None and not is_compiled:
            self._hook = model.register_forward_hook(self._hear, with_kwargs=True)

    def _watch(self, model: nn.Module, *, is_compiled: bool) -> None:
        self._parameters = Parameters(model)
        if not self._parameters.tensors:
            raise SetupError(
                f"A monitor watches what is trained; got {type(model).__name__} with nothing trainable. Call "
                "`adapters.train(...)` first."
            )
        self._stream = None if is_compiled else Stream(model)

    def _hear(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Keep the loss that the model itself returns, where the trainer tells nothing of it."""
        loss = getattr(output, "loss", None)
        if module.training and isinstance(loss, Tensor) and loss.requires_grad:
            self._outputs.append((loss.detach(), kwargs.get("num_items_in_batch") is not None))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        parts, self._parts, heard, self._outputs = self._parts, [], self._outputs, []
        if not parts and not heard:
            raise SetupError(
                "A monitor must be told the loss of each step; got none, for the trainer computes it outside of the "
                "model. Use `inarch.AdapterTrainer`, or call `monitor.see(loss)` in the trainer's `training_step`."
            )
        is_sum = (parts or heard)[0][1]
        losses = torch.stack([loss.float().mean() for loss, _ in parts or heard])
        total = losses.sum() if is_sum else losses.mean()
        highest, optimizer = args.learning_rate, given.get("optimizer")
        rate = float(optimizer.param_groups[0]["lr"]) / highest if optimizer is not None and highest else 1.0
        # A model that divides by the number in the whole batch returns the share of its own process.
        self.step(total * args.world_size if is_sum and not parts else total, rate=rate)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.should_stop:
            control.should_training_stop = True
        if control.should_save or self.should_stop:
            self._collect()  # in all processes, before one of them writes the checkpoint

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._collect()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._losses or self.memory["unread"]:
            self._read()
        self.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        prior, multi_label, smoothing = self._prior
        options = {"multi_label": multi_label, "label_smoothing": smoothing, "stop": self.stop}
        return {
            "args": {"label_prior": None if prior is None else [float(share) for share in prior], **options},
            "attributes": {"memory": self.memory},
        }

    def close(self) -> None:
        """Take its hooks off the model."""
        if self._stream is not None:
            self._stream.close()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """What is known; None stands for what is no number, as in JSON."""
    return {key: value if math.isfinite(value) else None for key, value in values.items() if value is not None}


def _log(monitor: Monitor) -> None:
    logger.log(logging.WARNING if monitor.verdict in FAILING else logging.INFO, "Training: %s.", monitor)


def _blank() -> dict[str, Any]:
    """What a monitor knows before the first step; plain data, so that a checkpoint can keep it."""
    return {
        "first": 0,
        "step": 0,
        "unread": [],
        "readings": [],
        "gradients": {},
        "reached": [],
        "num_gradients": 0,
        "updates": {},
        "num_updates": 0,
        "has_moved": False,
        "drift": None,
        "drift_at_start": None,
        "verdict": "undecided",
        "decided_at": None,
        "reason": "no step has been read yet",
        "evidence": {},
        "history": [],
    }


def frequencies(labels: Iterable[Any]) -> tuple[list[float], bool]:
    """How often each label occurs, and whether a sample may have several.

    **Arguments**: `labels` has an id for each sample, or a row of 0 and 1 with a number for each label. Negative ids,
    which losses leave out, are left out.
    """
    table = torch.as_tensor(labels if isinstance(labels, Tensor) else [_plain(one) for one in labels])
    if table.numel() == 0:
        raise ConfigError("Labels are those of the training data; got none. Leave `labels` out where none are known.")
    if table.dim() == 1 and not table.is_floating_point():
        counts = torch.bincount(table[table >= 0].long())
        return (counts.double() / counts.sum()).tolist(), False
    if table.dim() == 2:
        return table.double().mean(dim=0).tolist(), True
    raise ConfigError(
        f"Labels are an id for each sample, or a row of 0 and 1; got {table.dtype} of shape {tuple(table.shape)}. "
        "Leave `labels` out for another kind of training."
    )


def _plain(label: Any) -> Any:
    return label.tolist() if hasattr(label, "tolist") else label


def prior_entropy(prior: Sequence[float], multi_label: bool = False, label_smoothing: float = 0.0) -> float:
    """The loss of the best prediction that looks at no input, in nats; per label where a sample may have several.

    With smoothed labels that is the entropy of the smoothed frequencies. Raises `ConfigError` for what are none.
    """
    shares = [float(share) for share in prior]
    wrong = not shares or any(not 0 <= share <= 1 for share in shares)
    if wrong or (not multi_label and abs(math.fsum(shares) - 1) > 1e-3):
        raise ConfigError(
            f"Frequencies of labels are numbers from 0 to 1{'' if multi_label else ' whose sum is 1'}; got "
            f"{[round(share, 4) for share in shares[:8]]}. Give the share of each label, or `labels`."
        )
    if multi_label:
        return math.fsum(_surprise(share) + _surprise(1 - share) for share in shares) / len(shares)
    return math.fsum(_surprise((1 - label_smoothing) * share + label_smoothing / len(shares)) for share in shares)


def _surprise(share: float) -> float:
    return -share * math.log(share) if share > 0 else 0.0
