"""Image files: finding them, and decoding any of them to the RGB picture that a person would see.

PIL decides what a file holds, but never on its own terms: only formats that are images and need no outside program are
opened, 16-bit scans are scaled instead of clipped, transparency is laid on white, and a camera's rotation is applied.
"""

import functools
import io
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError, InarchError
from .extras import missing

try:
    from PIL import ExifTags, UnidentifiedImageError
    from PIL import Image as Image
except ImportError as error:
    raise InarchError(missing("PIL", error)) from error

logger = logging.getLogger(__name__)

# Formats by the suffixes that name them. EPS, PDF and the like are left out: they are programs, run by another program.
SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "ICO": (".ico",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation a camera can record. (`ImageOps.exif_transpose` also rewrites the camera's data, and
fails where they are damaged elsewhere.)"""

NUM_NAMED = 10
"""How many files an error or a warning names before it counts the rest."""

NUM_DECODED_AHEAD = 20_000
"""Up to this many images are decoded once before training starts; of more, only the headers are read."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The bytes of an image file that lies inside something else, with a name for error messages."""

    data: bytes
    name: str


Pixels = NDArray[np.uint8]
ImageSource = str | os.PathLike[str] | bytes | EncodedImage | Image.Image | Pixels


class Sources(Protocol):
    """Images by index, read when asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> ImageSource: ...


def open_image(source: ImageSource) -> Image.Image:
    """The image, fully decoded, as upright RGB; a `DataError` that names the source when that is not possible.

    A file, its bytes, an image that PIL has already opened, or pixels of shape (height, width, 3).
    """
    image = image_or_fault(source)
    if isinstance(image, str):
        raise DataError(faults_message([image]))
    return image


def image_or_fault(source: ImageSource) -> Image.Image | str:
    """The image as `open_image` gives it or, where that is not possible, what is wrong and where."""
    try:
        return _decoded(source)
    except Exception as error:  # noqa: BLE001  on a damaged file PIL's decoders raise nearly anything
        return f"{_reason(error)} at `{source_name(source)}`"


def faults_message(faults: Sequence[str]) -> str:
    """What to tell the user of images that cannot be used, a few of them by name."""
    advice = "Mend or remove what is damaged, or pass `skip_bad` to leave it out."
    if len(faults) == 1:
        return f"An image must be whole and readable; got {faults[0]}. {advice}"
    return f"Images must be whole and readable; got {len(faults)} that are not:\n{listed(faults)}\n{advice}"


def listed(items: Sequence[str]) -> str:
    """The first items, one a line, and the number of the others."""
    lines = [f"  - {item}" for item in items[:NUM_NAMED]]
    return "\n".join(lines + ([f"  ... and {len(items) - NUM_NAMED} more"] if len(items) > NUM_NAMED else []))


def source_name(source: ImageSource) -> str:
    """What to call an image in a message."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, EncodedImage):
        return source.name
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "an image in memory")
    return "bytes in memory" if isinstance(source, bytes) else "pixels in memory"


def _decoded(source: ImageSource) -> Image.Image:
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _upright(_as_rgb(source), _turn(source))
    with _opened(source) as image:
        image.load()
        return _upright(_as_rgb(image), _turn(image))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What undoes the camera's rotation. None where its data are damaged: they say nothing about the picture."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # noqa: BLE001  parsing damaged bytes can raise nearly anything
        logger.info("The orientation of `%s` cannot be read: %s", source_name(image), error)
        return None


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _opened(source: "str | os.PathLike[str] | bytes | EncodedImage") -> Image.Image:
    if isinstance(source, EncodedImage):
        source = source.data
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that this build of PIL can open."""
    Image.init()
    return tuple(name for name in SUFFIXES if name in Image.OPEN)


def _reason(error: Exception) -> str:
    """Why an image could not be decoded, as the object of "got"."""
    if isinstance(error, FileNotFoundError):
        return "no file"
    if isinstance(error, UnidentifiedImageError):
        return f"a file that is none of {', '.join(_formats())}"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"a decompression bomb ({str(error).split(',')[0]})"
    return f"`{str(error) or type(error).__name__}`"


def _as_rgb(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB: deep greys scaled to the range, transparency laid on white."""
    if image.mode == "F":
        image = Image.fromarray(_from_float(np.asarray(image)))
    elif image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray(_from_integer(np.asarray(image), is_16_bit=_is_16_bit(image)))
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    """Whether the samples had 16 bits in the file; PIL widens those of some formats to 32."""
    return image.mode.startswith("I;16") or image.format in ("PNG", "PPM")


def _from_integer(values: NDArray[Any], *, is_16_bit: bool) -> Pixels:
    """Integers as bytes, scaled by the depth of the file, or else by the smallest of 8 and 16 bits that holds them."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        return _stretched(values)
    top = 0xFFFF if is_16_bit or high > 0xFF else 0xFF
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)


def _from_float(values: NDArray[Any]) -> Pixels:
    """Floats as bytes: 0 to 1 where they fit it, their own range otherwise, so that no image comes out black."""
    if not np.isfinite(values).all():
        raise ValueError("a pixel that is not a finite number")
    if values.min() < 0 or values.max() > 1:
        return _stretched(values)
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)


def _stretched(values: NDArray[Any]) -> Pixels:
    """The values scaled so that the smallest is 0 and the largest is 255."""
    numbers = values.astype(np.float64)
    numbers -= numbers.min()
    return np.rint(numbers * 255 / (numbers.max() or 1)).astype(np.uint8)


def unreadable(sources: Sources, *, thorough: bool) -> dict[int, str]:
    """The images that cannot be used, by index, each with what is wrong and where.

    `thorough` decodes them all, which alone finds a truncated JPEG; otherwise only what PIL verifies cheaply.
    """
    logger.info("%s %d images.", "Decoding" if thorough else "Reading the headers of", len(sources))
    examine = _read_through if thorough else _verified

    def fault(index: int) -> str | None:
        source = sources[index]
        try:
            examine(source)
        except Exception as error:  # noqa: BLE001  as in `open_image`
            return f"{_reason(error)} at `{source_name(source)}`"
        return None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # PIL decodes outside the GIL
        faults = pool.map(fault, range(len(sources)))  # of indices: a map over the images would hold them all
        return {index: found for index, found in enumerate(faults) if found is not None}


def _read_through(source: ImageSource) -> None:
    """Decode an image to see whether it can be; a JPEG at an eighth of its size, read whole in half the time."""
    if not isinstance(source, str | os.PathLike | bytes | EncodedImage):
        _decoded(source)
        return
    with _opened(source) as image:
        image.draft(None, (1, 1))
        image.load()
        _as_rgb(image)


def _verified(source: ImageSource) -> None:
    if isinstance(source, str | os.PathLike | bytes | EncodedImage):
        with _opened(source) as image:
            image.verify()


def find_images(paths: Iterable[str | os.PathLike[str]], *, skip_bad: bool = False) -> list[Path]:
    """The image files among `paths` and, sorted, everywhere below the folders among them.

    A file that is named is taken whatever its suffix. What is missing, and a folder without an image, is refused, or
    announced and left out with `skip_bad`; to find nothing at all is always an error.
    """
    found: list[Path] = []
    problems: list[str] = []
    for path in map(Path, paths):
        images = images_below(path) if path.is_dir() else [path] if path.is_file() else []
        if not images:
            problems.append(f"{'a folder without images' if path.is_dir() else 'nothing'} at `{path}`")
        found += images
    if problems and (not skip_bad or not found):
        raise DataError(
            f"Every path must be an image or a folder with images; got {', '.join(problems[:NUM_NAMED])}"
            f"{f' and {len(problems) - NUM_NAMED} more' if len(problems) > NUM_NAMED else ''}. "
            f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    if problems:
        logger.warning("Left out, because of `skip_bad`:\n%s", listed(problems))
    if not found:
        raise DataError("At least one image is needed; got no path. Name image files or folders of them.")
    return list(dict.fromkeys(found))


def images_below(folder: Path) -> list[Path]:
    """The image files anywhere below a folder, sorted; hidden ones and linked folders are passed by.

    A linked folder may lead back up, to images that belong elsewhere or to an endless path. A linked file cannot.
    """
    images: list[Path] = []
    ignored: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=refuse_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        ignored += [f"`{Path(parent, name)}` (a linked folder)" for name in folders if Path(parent, name).is_symlink()]
        for name in files:
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(path)
            else:
                ignored.append(f"`{path}` (not an image)")
    if ignored:
        logger.info("Ignored %d entries of `%s`:\n%s", len(ignored), folder, listed(sorted(ignored)))
    return sorted(images)


def refuse_folder(error: OSError) -> NoReturn:
    """Say which folder cannot be read."""
    raise DataError(
        f"A folder must be readable; got `{error.strerror}` at `{error.filename}`. Change its permissions."
    ) from None
