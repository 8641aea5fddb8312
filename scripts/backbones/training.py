"""The training that all recipes share: deterministic, logged, and going on where it was stopped."""

import csv
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

LOG, CHECKPOINT = "training_log.csv", "checkpoint.pt"
COLUMNS = ("step", "lr", "loss", "accuracy", "held_out_accuracy")


class Task(Protocol):
    """What a backbone is pre-trained to do. Every choice is drawn from the one generator."""

    generator: torch.Generator
    num_classes: int

    def loss(self, model: nn.Module, size: int, progress: float) -> tuple[Tensor, Tensor]:
        """Loss and accuracy on fresh examples, at a share of the training from 0 to 1."""

    def held_out_accuracy(self, model: nn.Module) -> float:
        """Accuracy on examples that are never trained on."""


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim in (2, 4)]
    others = [parameter for parameter in model.parameters() if parameter.ndim not in (2, 4)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


def lr_multiplier(step: int, steps: int, warmup_ratio: float) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = max(1, round(warmup_ratio * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: nn.Module,
    task: Task,
    out: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    warmup_ratio: float,
    weight_decay: float,
    grad_clip: float,
    log_every: int,
) -> None:
    """Train, with a row of the log and a checkpoint every so many steps; a checkpoint of before is gone on from."""
    model.train()
    optimizer = make_optimizer(model, lr, weight_decay)
    first = _resume(model, optimizer, task, out) if (out / CHECKPOINT).exists() else 0
    with (out / LOG).open("a" if first else "w", newline="") as file:
        log = csv.writer(file, lineterminator="\n")
        if not first:
            log.writerow(COLUMNS)
        seen: list[Tensor] = []
        for step in (progress := tqdm(range(first, steps), desc="pre-training", unit="step", mininterval=5)):
            rate = lr * lr_multiplier(step, steps, warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, accuracy = task.loss(model, batch_size, step / steps)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen.append(torch.stack([loss.detach(), accuracy]))
            if (step + 1) % log_every == 0 or step + 1 == steps:
                mean_loss, mean_accuracy = torch.stack(seen).mean(dim=0).tolist()
                held_out = _measure(model, task)
                log.writerow([step + 1, f"{rate:.3e}", f"{mean_loss:.4f}", f"{mean_accuracy:.4f}", f"{held_out:.4f}"])
                file.flush()
                seen = []
                progress.set_postfix(
                    loss=f"{mean_loss:.3f}", accuracy=f"{mean_accuracy:.3f}", held_out=f"{held_out:.3f}"
                )
                _keep(model, optimizer, task, out, step + 1)
    (out / CHECKPOINT).unlink()


@torch.no_grad()
def _measure(model: nn.Module, task: Task) -> float:
    model.eval()
    accuracy = task.held_out_accuracy(model)
    model.train()
    return accuracy


def _keep(model: nn.Module, optimizer: torch.optim.AdamW, task: Task, out: Path, step: int) -> None:
    draft = out / f"{CHECKPOINT}.draft"
    state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "generator": task.generator.get_state(), "step": step}, draft)
    draft.replace(out / CHECKPOINT)


def _resume(model: nn.Module, optimizer: torch.optim.AdamW, task: Task, out: Path) -> int:
    """The step to go on with. Rows of the log that came after the checkpoint are dropped."""
    state = torch.load(out / CHECKPOINT, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    task.generator.set_state(state["generator"])
    head, *rows = (out / LOG).read_text().splitlines(keepends=True)
    (out / LOG).write_text("".join([head, *(row for row in rows if int(row.split(",")[0]) <= state["step"])]))
    return int(state["step"])
