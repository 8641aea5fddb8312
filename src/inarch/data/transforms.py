"""From an image to what a model reads: the model's own processing, and random variations of the image before it.

A variation is a function of (seed, epoch, index) and nothing else, so neither the number of workers nor of processes
nor the point where a training is resumed changes what is trained on.
"""

import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.config import Config, config_class, option
from ..core.errors import DataError, join_problems
from .examples import Examples, ImageData, seeded
from .images import Image, ImageSource, Sources, faults_message, image_or_fault, listed, open_image
from .preprocessing import Geometry, Preprocessing

logger = logging.getLogger(__name__)

CACHE_BYTES = 512 * 2**20
"""The most memory a data set spends on images it keeps."""


@config_class
class Augmentation(Config):
    """How the images to train on are varied at random."""

    crop: float | None = option(
        None,
        "Smallest share of an image's area that a random crop keeps, more than 0 and at most 1; 1 crops nothing and "
        "none is what is safe for the data (0.6, and 0.85 for digits).",
        more_than=0,
        at_most=1,
    )
    stretch: float = option(
        4 / 3,
        "Largest factor, 1 to 4, by which a random crop changes the ratio of width to height, either way.",
        at_least=1,
        at_most=4,
    )
    flip: bool | None = option(
        None,
        "Whether to mirror every other image; none mirrors unless mirroring changes what the images show (digits).",
    )

    def suited(self, data: ImageData) -> Self:
        """The same with the choices made that were left to the data."""
        return self.replace(
            crop=data.crop_safe if self.crop is None else self.crop,
            flip=data.mirror_safe if self.flip is None else self.flip,
        )

    def is_off(self) -> bool:
        """Whether no image is changed. A crop that keeps everything cannot change the ratio either."""
        return self.crop == 1 and not self.flip


def sample_generator(seed: int, epoch: int, index: int) -> random.Random:
    """The random numbers of one sample in one epoch."""
    return seeded(seed, epoch, index)


def vary(image: Image.Image, augmentation: Augmentation, generator: random.Random, geometry: Geometry) -> Image.Image:
    """A random variation of an image: part of it, in the size that processing asks for, and perhaps mirrored.

    Cropping and resizing are one step, between pixels: in whole pixels, an image 8 wide has hardly any crops. Numbers
    are drawn even for what is off, so that turning mirroring off changes no crop.
    """
    box = _random_box(image.size, augmentation, generator)
    is_mirrored = generator.random() < 0.5
    if augmentation.crop != 1:
        size = geometry.resized(max(1, round(box[2] - box[0])), max(1, round(box[3] - box[1])))
        image = image.resize(size, geometry.resample, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if augmentation.flip and is_mirrored else image


def _random_box(
    size: tuple[int, int], augmentation: Augmentation, generator: random.Random
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop whose area and relative shape are drawn; every draw fits the image."""
    width, height = size
    area = 1 - (1 - (augmentation.crop or 1)) * generator.random()
    # At most 1/area, or the crop would be wider than the image; at least area, or it would be higher.
    widest = min(augmentation.stretch, 1 / area)
    ratio = widest ** (2 * generator.random() - 1)
    crop_width, crop_height = min(width, width * math.sqrt(area * ratio)), min(height, height * math.sqrt(area / ratio))
    left, top = (width - crop_width) * generator.random(), (height - crop_height) * generator.random()
    return left, top, min(width, left + crop_width), min(height, top + crop_height)


class ImageDataset(Dataset[dict[str, Any]]):
    """Examples as a model reads them: `pixel_values` of shape (C, H, W) and `labels`, an id or a vector of 0 and 1.

    Call `set_epoch` before each epoch; it reaches the workers of a data loader, those that persist too. Without
    augmentation a sample never changes, and where all fit in `cache_bytes` each is processed once, for all workers
    together. With augmentation every process keeps the decoded images, where they fit.
    """

    def __init__(
        self,
        examples: Examples,
        processor: Any,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if augmentation is not None and (augmentation.crop is None or augmentation.flip is None):
            raise DataError(
                "An augmentation must be suited to its data; got one that leaves `crop` or `flip` to them. "
                "Pass `augmentation.suited(data)`."
            )
        self.examples = examples
        self.preprocessing = processor if isinstance(processor, Preprocessing) else Preprocessing(processor)
        self.augmentation = None if augmentation is None or augmentation.is_off() else augmentation
        self.seed = seed
        self.cache_bytes = cache_bytes
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._decoded: dict[int, Image.Image] = {}
        self._finished = self._room()

    def _room(self) -> "FinishedSamples | None":
        """Memory for all samples, where they do not change and it suffices."""
        shape = self.preprocessing.shape
        if self.augmentation is not None or shape is None or 4 * math.prod(shape) * len(self) > self.cache_bytes:
            return None
        return FinishedSamples(len(self), shape)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # also a negative one, which must be the same sample, and none beyond the end
        label = self.examples.label(index)
        return {
            "pixel_values": self._pixel_values(index),
            "labels": label if isinstance(label, int) else torch.from_numpy(label),
        }

    def set_epoch(self, epoch: int) -> None:
        """Choose the variations of an epoch, here and in every worker."""
        self._epoch.fill_(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": {}}  # cheaper for a worker to decode than to be sent

    def _pixel_values(self, index: int) -> Tensor:
        if self.augmentation is not None:
            return self._prepared(index)
        if self._finished is None:
            return self._prepared(index)
        if index not in self._finished:
            self._finished[index] = self._prepared(index)
        return self._finished[index]

    def _prepared(self, index: int) -> Tensor:
        source = self.examples.images[index]
        image = self._decoded.get(index) or open_image(source)
        # Kept if as many of its size fit, so that the sum stays within the limit.
        if self.augmentation is not None and 3 * image.width * image.height * len(self) <= self.cache_bytes:
            self._decoded[index] = image
        if self.augmentation is not None:
            generator = sample_generator(self.seed, int(self._epoch), index)
            image = vary(image, self.augmentation, generator, self.preprocessing.geometry)
        return self.preprocessing.named(image, source)


class FinishedSamples:
    """A tensor for every sample, in memory that the workers of a data loader share."""

    def __init__(self, num: int, shape: tuple[int, ...]) -> None:
        self.rows = torch.empty(num, *shape)
        self.is_filled = torch.zeros(num, dtype=torch.bool)
        try:
            self.rows.share_memory_()  # type: ignore[no-untyped-call]
            self.is_filled.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError as error:  # a container with little shared memory: every worker then has its own
            logger.info("Samples are not shared between workers: %s", error)

    def __contains__(self, index: int) -> bool:
        return bool(self.is_filled[index])

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index].clone()  # whoever changes it in place must not change the next epoch

    def __setitem__(self, index: int, sample: Tensor) -> None:
        self.rows[index] = sample
        self.is_filled[index] = True  # after the sample: two workers may write the same one, none reads half of one


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Samples as one batch: `pixel_values` of shape (B, C, H, W), `labels` of shape (B,) or, as floats, (B, labels)."""
    batch = {"pixel_values": stacked([sample["pixel_values"] for sample in samples])}
    labels = [sample["labels"] for sample in samples if "labels" in sample]
    if labels:
        batch["labels"] = torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)
    return batch


def stacked(images: Sequence[Tensor]) -> Tensor:
    """The processed images as one tensor, which takes images of one size."""
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise DataError(
            f"A batch must have images of one size; got {' and '.join(map(str, shapes[:3]))} from the image processor. "
            "Give its `size` a height and a width, or set `do_center_crop` and `crop_size`."
        )
    return torch.stack(list(images))


def batches(
    sources: Sources, processor: Any, batch_size: int, *, skip_bad: bool = False
) -> Iterator[tuple[list[ImageSource], Tensor]]:
    """The images in batches, each with the sources it came from; one batch is in memory at a time.

    An image that cannot be read is refused when its batch is reached, or announced and left out with `skip_bad`.
    """
    preprocessing = processor if isinstance(processor, Preprocessing) else Preprocessing(processor)

    def prepared(source: ImageSource) -> Tensor | str | DataError:
        image = image_or_fault(source)
        try:
            return image if isinstance(image, str) else preprocessing.named(image, source)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # PIL decodes outside the GIL
        for start in range(0, len(sources), batch_size):
            chunk = [sources[index] for index in range(start, min(start + batch_size, len(sources)))]
            results = list(pool.map(prepared, chunk))
            faults = [result for result in results if isinstance(result, str)]
            errors = [str(result) for result in results if isinstance(result, DataError)]
            if faults + errors and not skip_bad:
                raise DataError(join_problems([*([faults_message(faults)] if faults else []), *errors]))
            if faults + errors:
                logger.warning("Left out, because of `skip_bad`:\n%s", listed(faults + errors))
            good = [(source, image) for source, image in zip(chunk, results, strict=True) if isinstance(image, Tensor)]
            if good:
                yield [source for source, _ in good], stacked([image for _, image in good])
