"""The loss of a classification and how well it went, both exact for any division into batches and processes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..data.examples import Task
from ..data.extras import extra
from .order import IGNORED

BEST: dict[Task, str] = {"single_label": "accuracy", "multi_label": "mean_average_precision"}
"""The metric that decides which epoch is the best."""


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a model returns."""
    found = outputs if isinstance(outputs, Tensor) else outputs["logits"] if "logits" in outputs else outputs[0]
    assert isinstance(found, Tensor)
    return found


def loss_function(task: Task, label_smoothing: float = 0.0) -> Callable[..., Tensor]:
    """The loss as the trainer calls it: a sum over the samples at hand, divided by the number in the whole batch.

    The models' own losses are means over the samples at hand, which the trainer then scales: wrong for several labels
    an image on several processes, and for parts of unequal size.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = logits_of(outputs).float()
        if task == "multi_label":
            total = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0), labels != IGNORED, reduction="sum")
        else:
            total = F.cross_entropy(
                logits, labels, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum"
            )
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / count

    return loss


def only_logits(outputs: Any, _: Any) -> Tensor:
    """The logits alone, of models that return more."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def metrics_function(task: Task) -> Callable[[Any], dict[str, float]]:
    """The metrics as the trainer asks for them. `loss` is exact, and replaces the trainer's own mean over batches."""

    def metrics(prediction: Any) -> dict[str, float]:
        logits = np.asarray(prediction.predictions, dtype=np.float32)
        measure = multi_label_metrics if task == "multi_label" else single_label_metrics
        return measure(logits, np.asarray(prediction.label_ids))

    return metrics


def single_label_metrics(logits: NDArray[np.float32], labels: NDArray[Any]) -> dict[str, float]:
    """Accuracy and cross-entropy."""
    tensor, targets = torch.from_numpy(logits), torch.from_numpy(labels)
    return {
        "loss": float(F.cross_entropy(tensor, targets)),
        "accuracy": float((logits.argmax(axis=1) == labels).mean()),
    }


def multi_label_metrics(logits: NDArray[np.float32], labels: NDArray[Any]) -> dict[str, float]:
    """Scores of several labels an image; an image is right (`accuracy`) if all of them are, a label chosen at 0.5.

    Mean average precision is taken over the labels that some image has.
    """
    truth, chosen = labels == 1, logits >= 0
    right, wrong = float((truth & chosen).sum()), float((truth ^ chosen).sum())
    shown = truth.any(axis=0)
    average_precision = extra("sklearn.metrics").average_precision_score
    return {
        "loss": float(F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels))),
        "accuracy": float((truth == chosen).all(axis=1).mean()),
        "micro_f1": 2 * right / (2 * right + wrong) if right or wrong else 1.0,
        "mean_average_precision": float(average_precision(truth[:, shown], logits[:, shown], average="macro"))
        if shown.any()
        else 0.0,
    }
