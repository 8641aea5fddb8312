"""What the rules of a check may know of images: their labels, and the pixels that a model's own processor makes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..check import Data
from ..core.errors import DataError
from ..data.examples import Examples
from ..data.transforms import ImageDataset, collate

NUM_IMAGES = 32
"""Enough to see the range of the pixel values without reading all images."""


def sample_batch(examples: Examples, processor: Any, number: int | None = None) -> dict[str, Tensor]:
    """Some of the examples, from all over them: `pixel_values` of shape (number, C, H, W), and `labels`.

    Where there are fewer, some are there several times. Without a number they are as many as `known_data` wants.
    """
    number = number or min(NUM_IMAGES, len(examples))
    dataset = ImageDataset(examples, processor, cache_bytes=0)
    return collate([dataset[index * len(examples) // number] for index in range(number)])


def known_data(batch: dict[str, Tensor], processor: Any, labels: Sequence[str]) -> Data:
    """The images of a training, as far as the rules of a check ask.

    Arguments: `batch` is a `sample_batch`, which `processor` made.

    A processor that is set not to normalise says that its model does not expect it: no range is told then.
    """
    pixels = batch["pixel_values"]
    normalises = getattr(getattr(processor, "processor", processor), "do_normalize", True) is not False
    return Data(
        labels=tuple(labels),
        pixel_range=(float(pixels.min()), float(pixels.max())) if normalises else None,
        pixel_size=(pixels.shape[-2], pixels.shape[-1]),
    )


def check_taken(network: nn.Module, batch: dict[str, Tensor], name: str) -> None:
    """Refuse images that a model of that name does not take as its own processor makes them, with a `DataError`."""
    pixels, was_training = batch["pixel_values"][:1], network.training
    try:
        with torch.no_grad():
            network.eval()(pixel_values=pixels)
    except Exception as error:  # noqa: BLE001  a model may refuse images in any way
        raise DataError(
            f"A model must take images as its own image processor makes them; got {pixels.shape[-2]} x "
            f"{pixels.shape[-1]} pixels, and `{str(error).strip().rstrip('.')}`, at `{name}`. Mend `size` in its "
            "`preprocessor_config.json`."
        ) from None
    finally:
        network.train(was_training)
