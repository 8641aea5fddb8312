"""Images with labels from anywhere: `load_data` tells the sources apart and hands each to the file that reads it."""

import dataclasses
import tarfile
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from ..core.errors import DataError, join_problems, nearest
from ..core.places import nearest_place
from .cifar import is_cifar_folder, load_cifar
from .examples import Examples, ImageData, divide, hold_out, seeded, shuffled
from .extras import extra
from .folders import load_folder
from .hub import HUB_ID, Choice, is_saved, load_hub, load_saved
from .tables import load_table

SOURCES = (
    "`digits`",
    "a folder of images by class (`FOLDER/CLASS/*.png`, or that below `FOLDER/train` and `FOLDER/val`)",
    "a folder of images with a CSV of labels in `labels=`",
    "`cifar-10-python.tar.gz` or `cifar-100-python.tar.gz` or the folder in it",
    "a folder written by `save_to_disk` of `datasets`",
    "the id of a data set on the Hub (`owner/name`)",
)
"""Every form of source, in words."""

Kind = Literal["digits", "cifar", "saved", "hub", "folder"]

DIGITS_SEED = 1797
"""Decides which 400 of the digits are held out: a constant, so that results on them can be compared."""

NUM_DIGITS_HELD_OUT = 400


def load_data(
    source: str,
    *,
    labels: str = "auto",
    validation: float | None = None,
    num_train: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageData:
    """The images and labels of a source, divided into those to train and those to validate on.

    **Arguments**

    - `source`: `digits`, a folder of images by class, a CIFAR archive, a saved data set or the id of one on the Hub.
    - `labels`: `fine` or `coarse` where a source has both (`auto` is `fine`), or the path of a CSV of labels.
    - `validation`: the share of the training images to hold out. By default the source's own validation part or, where
      it has none, a tenth. 0 holds out nothing and 1 everything.
    - `num_train`: how many of the images to train on are taken, every label among them; by default all.
    - `seed`: decides which images are held out, or left out; those of `digits` are fixed unless `validation` is given.
    - `skip_bad`: leave out images that cannot be read, with a warning, instead of refusing the source.
    - `image_column`, `label_column`: which columns of a data set of the `datasets` library to read.
    """
    if validation is not None and not 0 <= validation <= 1:
        raise DataError(f"`validation` must be a share from 0 to 1; got {validation}. Give 0.1 to hold out a tenth.")
    path, table = Path(source).expanduser(), _table(labels)
    kind = _kind(source, path)
    _refuse_options(kind, source, table=table, labels=labels, columns=(image_column, label_column))
    granularity = "fine" if labels == "auto" else labels
    choice = Choice(image_column, label_column, granularity)
    if kind == "digits":
        images = _digits(validation, seed)
    elif kind == "cifar":
        images = load_cifar(path, granularity, validation=validation, seed=seed)
    elif kind == "saved":
        images = load_saved(path, choice, validation=validation, seed=seed, skip_bad=skip_bad)
    elif kind == "hub":
        images = load_hub(source, choice, validation=validation, seed=seed, skip_bad=skip_bad)
    elif table is not None:
        images = load_table(path, table, validation=validation, seed=seed, skip_bad=skip_bad)
    else:
        images = load_folder(path, validation=validation, seed=seed, skip_bad=skip_bad)
    return images if num_train is None else _fewer(images, num_train, seed)


def _fewer(images: ImageData, number: int, seed: int) -> ImageData:
    """The data with so many of the images to train on, in the shares of the labels, each at least once."""
    if not len(images.labels) <= number <= len(images.train):
        raise DataError(
            f"`num_train` must be at least the {len(images.labels)} labels and at most the {len(images.train)} images "
            f"to train on; got {number} for `{images.name}`. Give a number between them."
        )
    targets = images.train.targets
    kept, left = hold_out(targets, 1 - number / len(targets), seed)
    # That leaves out one image of every label at least, and of each only its share.
    kept += shuffled(left, seeded(seed, "fewer"))[: max(0, number - len(kept))]
    labels = [target if isinstance(target, tuple) else (target,) for target in targets]
    counts = Counter(label for index in kept for label in labels[index])
    for index in shuffled(kept, seeded(seed, "fewer")):
        if len(kept) > number and all(counts[label] > 1 for label in labels[index]):
            kept.remove(index)
            counts.subtract(labels[index])
    return dataclasses.replace(images, train=images.train.pick(sorted(kept)))


def _kind(source: str, path: Path) -> Kind:
    """What sort of source it is."""
    if source == "digits":
        return "digits"
    if path.is_dir():
        return "cifar" if is_cifar_folder(path) else "saved" if is_saved(path) else "folder"
    if path.is_file() and tarfile.is_tarfile(path):
        return "cifar"
    if not path.exists() and HUB_ID.fullmatch(source):
        return "hub"
    found = "another sort of file" if path.exists() else "nothing"
    hint = nearest_place(source, ["digits"]) or "Correct the path"
    raise DataError(
        f"A data source must be one of the forms below; got {found} at `{source}`. {hint} or give\n"
        + "\n".join(f"  - {form}" for form in SOURCES)
    )


def _table(labels: str) -> Path | None:
    """The path of the CSV in the option `labels`, where it is one."""
    if labels in ("auto", "fine", "coarse"):
        return None
    path = Path(labels).expanduser()
    if not path.is_file():
        raise DataError(
            f"`labels=` must be `auto`, `fine`, `coarse` or the path of a CSV; got `{labels}`, where no file is. "
            f"{nearest(labels, ['auto', 'fine', 'coarse'])}"
        )
    return path


def _refuse_options(
    kind: Kind, source: str, *, table: Path | None, labels: str, columns: tuple[str | None, str | None]
) -> None:
    """Refuse an option that this sort of source would ignore."""
    is_table_of_columns = kind in ("saved", "hub")
    granular = labels in ("fine", "coarse")
    problems = [
        (table is not None and kind != "folder", "A CSV in `labels=`", labels, "a folder of images"),
        (granular and kind in ("digits", "folder"), "`labels=`", labels, "CIFAR-100 and data sets with such a column"),
        (columns[0] is not None and not is_table_of_columns, "`image_column`", columns[0], "data sets with columns"),
        (columns[1] is not None and not is_table_of_columns, "`label_column`", columns[1], "data sets with columns"),
        (granular and columns[1] is not None, "`labels=`", labels, "a choice made without `label_column`"),
    ]
    broken = [
        f"{option} is for {use} only; got `{value}` with `{source}`. Leave it out."
        for is_broken, option, value, use in problems
        if is_broken
    ]
    if broken:
        raise DataError(join_problems(broken))


def _digits(validation: float | None, seed: int) -> ImageData:
    """Scikit-learn's 1,797 handwritten digits, 8 pixels wide, white on black."""
    bunch = extra("sklearn.datasets").load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=-1)
    labels = [str(name) for name in bunch.target_names]
    every = Examples(list(pixels), [int(target) for target in bunch.target], len(labels))
    kept, held = hold_out(every.targets, NUM_DIGITS_HELD_OUT / len(every), DIGITS_SEED)
    train, own = divide("digits", labels, every.pick(kept), every.pick(held), share=validation, seed=seed)
    return ImageData(
        name="digits",
        task="single_label",
        labels=labels,
        train=train,
        validation=own,
        mirror_safe=False,  # a mirrored 2 is no digit
        crop_safe=0.85,  # the strokes reach the edge: cutting more can make a 7 of a 9
    )
