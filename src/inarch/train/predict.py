"""Labels for images, by a base model with an adapter and the task head that was trained with it."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # as in `models.py`

from .. import state
from ..core.errors import ConfigError, StateError
from ..data.examples import Task
from ..data.images import ImageSource, Sources, source_name
from ..data.preprocessing import Preprocessing
from ..data.transforms import batches
from ..handle import attach
from ..loading import is_adapter, locate
from .models import load_model


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one image shows: the likeliest labels with their probabilities and, of a multi-label task, those chosen."""

    image: str
    top: tuple[tuple[str, float], ...]
    chosen: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        if self.chosen is not None:
            return {"image": self.image, "labels": list(self.chosen), "top": top}
        return {"image": self.image, "label": self.top[0][0], "probability": self.top[0][1], "top": top}


class Predictor:
    """A model that classifies images, with its labels and its image processing. Several threads may share it."""

    def __init__(self, model: nn.Module, processor: Any, labels: Sequence[str], task: Task = "single_label") -> None:
        self.model = model.eval()
        self.preprocessing = Preprocessing(processor)
        self.labels = tuple(labels)
        self.task: Task = task

    def batches(
        self, images: Sources, *, batch_size: int = 32, skip_bad: bool = False
    ) -> Iterator[tuple[list[ImageSource], NDArray[np.float32]]]:
        """The images in batches, each with the probabilities (images, labels); one batch is in memory at a time."""
        if batch_size < 1:
            raise ConfigError(f"`batch_size` must be at least 1; got {batch_size}. Give 32.")
        for sources, pixels in batches(images, self.preprocessing, batch_size, skip_bad=skip_bad):
            yield sources, self.probabilities(pixels)

    def probabilities(self, pixels: Tensor) -> NDArray[np.float32]:
        """The probability of each label (images, labels) of processed images (images, channels, height, width)."""
        parameter = next(self.model.parameters())
        with torch.inference_mode():
            logits: Tensor = self.model(pixel_values=pixels.to(parameter.device, parameter.dtype)).logits.float().cpu()
        if logits.shape[1:] != (len(self.labels),):
            raise StateError(
                f"A model must give one number for each label; got {tuple(logits.shape[1:])} of "
                f"{type(self.model).__name__} for {len(self.labels)} labels. Load the adapter on its own base model."
            )
        if not logits.isfinite().all():
            raise StateError(
                f"The outputs of a model must be finite numbers; got others from {type(self.model).__name__}. "
                "Train the adapter again with a smaller learning rate."
            )
        probabilities = logits.sigmoid() if self.task == "multi_label" else logits.softmax(dim=-1)
        return np.asarray(probabilities.numpy(), dtype=np.float32)

    def predict(
        self,
        images: Sources,
        *,
        top: int = 5,
        threshold: float = 0.5,
        batch_size: int = 32,
        skip_bad: bool = False,
    ) -> Iterator[Prediction]:
        """A prediction for each image, in order, as soon as its batch is done.

        **Arguments**

        - `top`: how many labels are named with their probabilities.
        - `threshold`: the probability from which on a label of a multi-label task is chosen.
        - `skip_bad`: leave out images that cannot be read, with a warning.
        """
        for sources, rows in self.batches(images, batch_size=batch_size, skip_bad=skip_bad):
            for source, row in zip(sources, rows, strict=True):
                yield self.prediction(source_name(source), row, top=top, threshold=threshold)

    def prediction(self, name: str, row: NDArray[np.float32], *, top: int = 5, threshold: float = 0.5) -> Prediction:
        """The probabilities of one image in words."""
        order = np.argsort(-row, kind="stable")
        chosen = tuple(self.labels[index] for index in order if row[index] >= threshold)
        return Prediction(
            name,
            tuple((self.labels[index], float(row[index])) for index in order[: max(1, top)]),
            chosen if self.task == "multi_label" else None,
        )


def load_predictor(adapter: str | os.PathLike[str], *, model: str | None = None, device: str = "auto") -> Predictor:
    """The predictor that an adapter folder, a run folder, or a Hub repository with an adapter describes.

    **Arguments**

    - `model`: the base model, where it is not to be found under the name that the adapter has for it.
    - `device`: `auto`, `cpu`, `cuda`, ...

    Raises `StateError` for an adapter without a task head, and for anything that does not fit together.
    """
    folder = find_adapter(adapter)
    record = state.read(folder).record
    head = record.get("head") or {}
    labels = [str(label) for label in head.get("labels") or ()]
    if not labels:
        raise StateError(
            f"An adapter for prediction has a task head with labels; got none in `{folder}`. "
            "Train it with its head, or save it with `head=True`."
        )
    name = model or record["base"].get("id")
    if not name:
        raise StateError(
            f"An adapter for prediction names its base model; got no name in `{folder}`. Name the model with `--model`."
        )
    task: Task = "multi_label" if head.get("problem_type") == "multi_label_classification" else "single_label"
    revision = None if model else record["base"].get("revision")
    network = load_model(name, labels, task=task, revision=revision)
    handle = attach(network)
    handle.activate(handle.load(folder))
    return Predictor(network.to(find_device(device)), read_processor(record.get("preprocessing"), folder), labels, task)


def find_adapter(source: str | os.PathLike[str]) -> Path:
    """The folder of inarch that is meant: the folder itself, the one in that of a run, or that of a Hub repository.

    Raises `StateError` for a folder without an adapter; that of a run is told what it has instead.
    """
    folder = locate(source)
    if state.is_adapter(folder) or not Path(source).expanduser().is_dir():
        return folder
    if is_adapter(folder):
        raise StateError(
            f"An adapter for prediction is in inarch's own format; got that of another library in `{folder}`. Convert "
            f"it first: `inarch convert {folder} FOLDER --to inarch`."
        )
    raise StateError(
        f"An adapter for prediction is a folder with `{state.RECORD}`, or a run with one; got `{folder}`, which has "
        "none. Give the folder that `save` or `inarch train` wrote."
    )


def read_processor(settings: Any, place: object) -> Any:
    """The image processor that an adapter keeps the settings of. No code that comes with a model is run."""
    if not isinstance(settings, dict):
        raise StateError(
            f"An adapter for prediction keeps its preprocessing; got none in `{place}`. "
            "Save it with `processor=` the image processor it was trained with."
        )
    settings = {key: value for key, value in settings.items() if key != "auto_map"}
    with tempfile.TemporaryDirectory(prefix="inarch-") as folder:
        Path(folder, "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
        try:
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001  whatever wrong settings make of the library
            fault = (str(error).splitlines() or [type(error).__name__])[0]
    raise StateError(
        f"The preprocessing of an adapter must be an image processor's settings; got `{fault}` for `{place}`. "
        "Save the adapter again."
    )


def find_device(name: str) -> torch.device:
    """The device of a name; `auto` is the accelerator, where there is one."""
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        fault = str(error).splitlines()[0]
        raise ConfigError(
            f"`device` must name a device that is there; got `{name}`: {fault}. Give `auto` or `cpu`."
        ) from None
    return device
