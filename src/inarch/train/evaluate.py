"""How well predictions match the labels of a data set."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError, join_problems
from ..data.examples import ImageData, Task, quoted
from ..data.extras import extra
from .predict import Predictor


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScore:
    """How well one label is predicted."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    """The number of images that have the label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The scores of an adapter on labelled images. With several labels an image is right if all of them are."""

    data: str
    task: Task
    num_images: int
    accuracy: float
    macro_f1: float
    """The mean over the labels."""
    labels: tuple[LabelScore, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    """How often each label (a row) was predicted as each label (a column); None with several labels an image."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)


def evaluate(
    predictor: Predictor,
    data: ImageData,
    *,
    batch_size: int = 32,
    threshold: float = 0.5,
    subset: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predict the validation images of `data` and compare.

    **Arguments**

    - `threshold`: the probability from which on a label counts as predicted, where an image may have several.
    - `subset`: whether the data may lack labels that the adapter knows.
    - `progress`: called with the number of images done and of all.

    Raises `DataError` where the labels of the data are not those of the adapter.
    """
    check_labels(predictor.labels, data, subset=subset)
    if predictor.task != data.task:
        raise DataError(
            f"The data must be of the adapter's task; got `{data.task}` in `{data.name}` for an adapter trained on "
            f"`{predictor.task}`. Evaluate it on data of its own kind."
        )
    examples = data.with_labels(predictor.labels).validation
    if not len(examples):
        raise DataError(
            f"An evaluation needs an image; got none to validate on in `{data.name}`. Give a `validation` above 0."
        )
    batches: list[NDArray[np.float32]] = []
    for _, rows in predictor.batches(examples.images, batch_size=batch_size):
        batches.append(rows)
        if progress is not None:
            progress(sum(map(len, batches)), len(examples))
    targets = np.array([examples.label(index) for index in range(len(examples))])
    return score(data.name, data.task, predictor.labels, targets, np.concatenate(batches), threshold=threshold)


def check_labels(labels: Sequence[str], data: ImageData, *, subset: bool = False) -> None:
    """Refuse data whose labels, in any order, are not those of the adapter."""
    unknown = [name for name in data.labels if name not in set(labels)]
    absent = [name for name in labels if name not in set(data.labels)]
    problems = []
    if unknown:
        problems.append(f"Every label of the data must be one of the adapter; got {quoted(unknown)} in `{data.name}`.")
    if absent and not subset:
        problems.append(
            f"Every label of the adapter must be in the data; got none for {quoted(absent)} in `{data.name}`."
        )
    if problems:
        advice = "Rename the labels of the data." if unknown else "Add images of them, or pass `subset` to go without."
        raise DataError(f"{join_problems(problems)} {advice}")


def score(
    data: str,
    task: Task,
    labels: Sequence[str],
    targets: NDArray[Any],
    probabilities: NDArray[np.float32],
    *,
    threshold: float = 0.5,
) -> Evaluation:
    """The scores of probabilities (images, labels) against ids (images,) or, each 0 or 1, labels (images, labels)."""
    metrics = extra("sklearn.metrics")
    if task == "multi_label":
        truth, chosen = targets.astype(int), (probabilities >= threshold).astype(int)
        accuracy, confusion, ids = float((truth == chosen).all(axis=1).mean()), None, list(range(len(labels)))
        if len(labels) == 1:  # the library takes one column for the answers yes and no
            truth, chosen, ids = truth[:, 0], chosen[:, 0], [1]
    else:
        truth, chosen, ids = targets, probabilities.argmax(axis=1), list(range(len(labels)))
        accuracy = float((truth == chosen).mean())
        confusion = tuple(map(tuple, metrics.confusion_matrix(truth, chosen, labels=ids).tolist()))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        truth, chosen, labels=ids, average=None, zero_division=0.0
    )
    rows = tuple(
        LabelScore(label=label, precision=float(p), recall=float(r), f1=float(f), support=int(n))
        for label, p, r, f, n in zip(labels, precision, recall, f1, support, strict=True)
    )
    shown = [row.f1 for row in rows if row.support] or [0.0]
    return Evaluation(
        data=data, task=task, num_images=len(targets), accuracy=accuracy, macro_f1=float(np.mean(shown)),
        labels=rows, confusion=confusion,
    )  # fmt: skip
