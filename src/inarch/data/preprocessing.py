"""A model's own image processing, exactly, and several times faster where that is possible.

transformers' image processors spend most of their time on small images in checking options. What nearly all of them
compute is a resize, a crop and a function of each byte. Such a processor is replaced by those three steps, read from
its fields and its answers, but only after both have agreed on images of several shapes; any other is called itself.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import DataError
from .images import Image, ImageSource, source_name

logger = logging.getLogger(__name__)

PROBE_SIZES = ((32, 32), (33, 57), (57, 33), (300, 231), (480, 640))
"""Width and height of the images on which a processor and its replacement must agree."""

TOLERANCE = 1e-6

MAX_RESIZED_PIXELS = 1 << 26
"""The largest image that resizing may make: the narrowest of panoramas would otherwise take all memory."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Which pixels of an image a processor keeps. Without any field: all of them."""

    size: tuple[int, int] | None = None
    """The width and height it resizes to."""
    shortest: int | None = None
    """The shorter of width and height after resizing, where the ratio is kept."""
    crop: tuple[int, int] | None = None
    """The width and height it cuts from the middle."""
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The width and height of an image after resizing."""
        if self.size is not None:
            return self.size
        if self.shortest is None:
            return width, height
        longest = int(self.shortest * max(width, height) / min(width, height))
        if self.shortest * longest > MAX_RESIZED_PIXELS:
            raise ValueError(f"an image {width} x {height}, too long to be resized to {self.shortest} across")
        return (self.shortest, longest) if width <= height else (longest, self.shortest)

    def shape(self) -> tuple[int, int] | None:
        """The width and height of every image in the end, where they are the same for all."""
        return self.crop or self.size


class Preprocessing:
    """An image processor as a function from an RGB image to a tensor of shape (C, H, W).

    `geometry` is what it does to the frame, or an empty one where that is not known; `shape` the shape of all results,
    or none where it depends on the image; `is_direct` tells whether the processor is replaced.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        geometry = read_geometry(processor)
        self.geometry = geometry or Geometry()
        self._table = None if geometry is None else byte_table(processor)
        probes = [_probe(size) for size in PROBE_SIZES]
        wanted = [self._by_processor(probe) for probe in probes]
        self.shape = tuple(wanted[0].shape) if len({image.shape for image in wanted}) == 1 else None
        got = [self._direct(probe) for probe in probes]
        # Nothing comes of a frame smaller than the crop: there the processor pads, and goes on being called.
        self.is_direct = any(image is not None for image in got) and all(
            image is None or _agree(image, other) for image, other in zip(got, wanted, strict=True)
        )
        if not self.is_direct:
            self.geometry = Geometry()
            logger.info("`%s` is called for each image.", type(processor).__name__)

    def __call__(self, image: Image.Image) -> Tensor:
        direct = self._direct(image) if self.is_direct else None
        return self._by_processor(image) if direct is None else direct

    def named(self, image: Image.Image, source: ImageSource) -> Tensor:
        """The same, where a failure names the source."""
        try:
            return self(image)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001  the processor may be anybody's code
            fault = str(error) or type(error).__name__
        raise DataError(
            f"An image must be one the model's image processor takes; got `{fault}` at `{source_name(source)}`. "
            "Crop or convert the image, or remove it."
        )

    def _by_processor(self, image: Image.Image) -> Tensor:
        pixel_values = self.processor(images=[image], return_tensors="pt")["pixel_values"]
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4 or len(pixel_values) != 1:
            raise DataError(
                "An image processor must make one tensor (1, C, H, W) of one image; "
                f"got {tuple(getattr(pixel_values, 'shape', ()))} from `{type(self.processor).__name__}`. "
                "Use a model for image classification."
            )
        return pixel_values[0].to(torch.float32)

    def _direct(self, image: Image.Image) -> Tensor | None:
        """The three steps; nothing where they do not apply."""
        if self._table is None:
            return None
        size = self.geometry.resized(*image.size)
        crop = self.geometry.crop or size
        if crop[0] > size[0] or crop[1] > size[1]:
            return None
        left, top = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
        pixels = np.asarray(image.resize(size, self.geometry.resample))[top : top + crop[1], left : left + crop[0]]
        result = np.empty((3, crop[1], crop[0]), dtype=np.float32)
        for channel in range(3):
            np.take(self._table[channel], pixels[:, :, channel], out=result[channel], mode="clip")
        return torch.from_numpy(result)


def _agree(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=TOLERANCE)


def _probe(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def read_geometry(processor: Any) -> Geometry | None:
    """What the fields of a processor say that it does to the frame; nothing where they are not understood."""
    size, crop = _fields(processor, "size"), _fields(processor, "crop_size")
    resample = getattr(processor, "resample", None)
    if getattr(processor, "do_pad", None) or not isinstance(resample, int):
        return None
    frame = (crop["width"], crop["height"]) if {"width", "height"} <= crop.keys() else None
    frame = frame if getattr(processor, "do_center_crop", None) else None
    if not getattr(processor, "do_resize", None):
        return Geometry(crop=frame)
    kind = Image.Resampling(resample)
    if size.keys() == {"width", "height"}:
        return Geometry(size=(size["width"], size["height"]), crop=frame, resample=kind)
    if size.keys() == {"shortest_edge"}:
        return Geometry(shortest=size["shortest_edge"], crop=frame, resample=kind)
    return None


def _fields(processor: Any, name: str) -> dict[str, int]:
    """The entries of a field such as `size`, a mapping or transformers' own kind of one."""
    value = getattr(processor, name, None)
    try:
        return dict(value) if value else {}
    except (TypeError, ValueError):  # not a mapping: a processor that is not transformers'
        return {}


def byte_table(processor: Any) -> NDArray[np.float32] | None:
    """What the processor makes of each byte of each channel, asked with an image that has them all."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    try:
        answer = processor(images=[Image.fromarray(ramp)], do_resize=False, do_center_crop=False, return_tensors="pt")
        values: NDArray[np.float32] = answer["pixel_values"].numpy().astype(np.float32)
    except Exception:  # noqa: BLE001  anybody's code: one that does not take these options is called as it is
        return None
    return np.ascontiguousarray(values.reshape(3, 256)) if values.shape == (1, 3, 16, 16) else None
