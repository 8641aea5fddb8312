"""How a training goes: every option with its meaning, its default and its legal range.

The defaults are those that work for adapters on Vision Transformers: AdamW with a learning rate of 1e-3, ten times that
of full fine-tuning, and no weight decay on biases, norms and scales (Adapter+, arXiv 2406.06820; the sweep of arXiv
2409.16434, where 23 % of the trainings at 1e-2 fail and 0.2 % of those at 1e-3).
"""

from typing import Any, Literal

from ..core.config import Config, config_class, option

Trains = Literal["adapter", "head", "full"]

ADAPTER_LEARNING_RATE, FULL_LEARNING_RATE = 1e-3, 1e-4


@config_class
class Recipe(Config):
    """Everything that decides how a model is trained, beside the model, the data and the adapter."""

    epochs: int = option(20, "How many times the training images are seen.", at_least=1)
    max_steps: int | None = option(
        None, "Stop after this many optimiser steps, however many epochs that is; the schedule ends there.", at_least=1
    )
    batch_size: int = option(
        32, "Images an optimiser step sees, over all processes and accumulated parts together.", at_least=1
    )
    accumulation: int = option(
        1, "Parts a batch is computed in, one after the other, to save memory; divides the batch size.", at_least=1
    )
    learning_rate: float | None = option(
        None, "Highest learning rate; none takes 0.001, or 0.0001 where the whole model is trained.", more_than=0
    )
    weight_decay: float = option(
        1e-4,
        "Weight decay of AdamW, on all but biases, norms, scales and other one-dimensional parameters.",
        at_least=0,
    )
    warmup: float = option(0.1, "Share of the steps in which the learning rate rises from 0.", at_least=0, less_than=1)
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "How the learning rate goes on after the warm-up."
    )
    label_smoothing: float = option(
        0.0, "Share of the probability spread over the wrong labels; not for several labels an image.",
        at_least=0, less_than=1,
    )  # fmt: skip
    max_grad_norm: float = option(1.0, "Longest gradient: a longer one is scaled down; 0 scales none.", at_least=0)
    augment: bool = option(True, "Vary the training images at random, by crops and mirroring.")
    crop: float | None = option(
        None,
        "Smallest share of an image's area that a random crop keeps; 1 crops nothing, none takes what is safe for the "
        "data.",
        more_than=0,
        at_most=1,
    )
    flip: bool | None = option(None, "Mirror every other image; none mirrors where that changes nothing that matters.")
    patience: int | None = option(
        None, "Stop after this many epochs without a better result on the validation images.", at_least=1
    )
    stop_early: bool = option(
        False, "End a training whose first steps show that it comes to nothing: stalled, diverging, a dead adapter."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "Numbers to compute in; auto takes bf16 or else fp16 on a GPU that can, and fp32 elsewhere."
    )
    checkpointing: Literal["off", "on", "reentrant"] = option(
        "off", "Compute activations twice instead of keeping them, to save memory; in torch's newer or older way."
    )
    seed: int = option(0, "Seed of weights, order, crops and dropout.", at_least=0, less_than=2**32)
    eval_batch_size: int | None = option(
        None, "Images predicted at once in evaluation, by each process; none takes the batch size.", at_least=1
    )
    save_steps: int | None = option(
        None, "Keep a checkpoint every so many steps, beside the one after each epoch.", at_least=1
    )
    keep_checkpoints: int = option(2, "How many checkpoints are kept: the best, and the newest.", at_least=2)
    workers: int = option(0, "Processes that load images, beside each training process; 0 loads in it.", at_least=0)
    device: Literal["auto", "cpu"] = option("auto", "Where to train; auto takes a GPU where there is one.")
    report_to: str = option(
        "none", "Where the trainer reports to: `tensorboard`, or other integrations of transformers, with commas."
    )

    def problems(self) -> list[str]:
        found = []
        if self.batch_size % self.accumulation:
            found.append(
                f"`Recipe.accumulation` must divide the batch size; got {self.accumulation} for a batch of "
                f"{self.batch_size}. Set it to a divisor of `batch_size`."
            )
        if not self.augment and (self.crop is not None or self.flip is not None):
            found.append(
                "`Recipe.crop` and `Recipe.flip` vary the images, which `Recipe.augment` turns off; got "
                f"crop {self.crop}, flip {self.flip}. Leave them out."
            )
        return found

    def rate(self, trains: Trains) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_LEARNING_RATE if trains == "full" else ADAPTER_LEARNING_RATE


@config_class
class DataConfig(Config):
    """Which images to train on; the meaning of each field is that of `load_data`."""

    data: str = option(
        help="`digits`, a folder of images by class, a CIFAR archive, a saved data set or the id of one on the Hub."
    )
    labels: str = option(
        "auto",
        "CSV of labels for a folder of images: `image,label`, or `image,labels` with labels between `;` or `|`, or a "
        "column of 0 and 1 for each label; or `fine` or `coarse` where a source has both.",
    )
    validation: float | None = option(
        None, "Share of the images to hold out; none takes the data's own validation part, or a tenth.",
        at_least=0, less_than=1,
    )  # fmt: skip
    num_train: int | None = option(
        None, "Train on so many of the images, every label among them, and leave out the others; none takes all.",
        at_least=1,
    )  # fmt: skip
    split_seed: int = option(0, "Seed that decides which images are held out, or left out.", at_least=0)
    skip_bad: bool = option(False, "Leave out images that cannot be read instead of refusing the data.")
    image_column: str | None = option(None, "Column of the images in a data set of the `datasets` library.")
    label_column: str | None = option(None, "Column of the labels in a data set of the `datasets` library.")

    def arguments(self) -> dict[str, Any]:
        """The arguments of `load_data`."""
        values = self.to_dict()
        return {"source": values.pop("data"), "seed": values.pop("split_seed"), **values}
