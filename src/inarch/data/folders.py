"""A folder of images by class: `root/class/*.png`, or `root/train/class/*.png` beside `root/val` or `root/test`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import DataError
from ..core.table import counted
from .examples import Examples, ImageData, divide, quoted
from .images import (
    IMAGE_SUFFIXES,
    NUM_DECODED_AHEAD,
    Sources,
    faults_message,
    images_below,
    listed,
    refuse_folder,
    unreadable,
)

logger = logging.getLogger(__name__)

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "val", "valid", "dev", "test", "testing")
"""What the part to validate on may be called; the first that is there is taken."""
_TESTS = ("test", "testing")


def announce_test(name: str, place: object) -> None:
    """Say it where the part to validate on is called a test: what chooses the best epoch tests nothing any more."""
    if name.lower() in _TESTS:
        logger.warning(
            "`%s` of `%s` is taken to validate on: a training chooses its best epoch by it, so it is no test of that. "
            "For one, keep it elsewhere and hold out a share of the training images with `validation`.",
            name,
            place,
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """The images of one folder by class."""

    root: Path
    images: dict[str, list[Path]]

    def examples(self, labels: Sequence[str]) -> Examples:
        """The images one by one, each with the id of its class."""
        ids = {name: index for index, name in enumerate(labels)}
        targets = [ids[name] for name, paths in self.images.items() for _ in paths]
        return Examples([path for paths in self.images.values() for path in paths], targets, len(labels))


def load_folder(root: Path, *, validation: float | None, seed: int, skip_bad: bool) -> ImageData:
    """The images of a folder by class."""
    train_root, own_root = _parts(root)
    train = _tree(train_root, skip_bad=skip_bad, taught=validation != 1)
    labels = sorted(train.images)
    own = None
    if own_root is not None and validation is None:
        announce_test(own_root.name, root)
        tree = _tree(own_root, skip_bad=skip_bad, taught=False)
        _check_taught(tree, train)
        own = tree.examples(labels)
    elif own_root is not None:
        logger.warning("`%s` is not used: `validation` asks for a share of the training images.", own_root)
    parts = divide(root, labels, train.examples(labels), own, share=validation, seed=seed)
    return ImageData(name=root.resolve().name, task="single_label", labels=labels, train=parts[0], validation=parts[1])


def _check_taught(held: Tree, train: Tree) -> None:
    """Refuse to validate on a class that has no image to train on."""
    unknown = sorted(held.images.keys() - train.images.keys())
    if unknown:
        raise DataError(
            f"Every class must have images to train on; got {quoted(unknown)} only in `{held.root}`. "
            f"Add images of it to `{train.root}`, or remove the folder."
        )


def _parts(root: Path) -> tuple[Path, Path | None]:
    """The folder to train on and the one to validate on, where the folder is divided so."""
    folders = {path.name.lower(): path for path in _subfolders(root)}
    train = next((folders[name] for name in TRAIN_NAMES if name in folders), None)
    held = [folders[name] for name in VALIDATION_NAMES if name in folders]
    only_parts = bool(folders) and folders.keys() <= {*TRAIN_NAMES, *VALIDATION_NAMES}
    if only_parts and train is None:
        raise DataError(
            f"A folder divided into parts must have one to train on; got only {quoted([path.name for path in held])} "
            f"in `{root}`. Add `train`, or name the folder with the classes, `{held[0]}`."
        )
    # A class can be called `train`, beside `bus` and `tram`; parts have classes in them.
    if train is None or not (only_parts or all(held and _subfolders(part) for part in (train, *held))):
        return root, None
    for path in folders.values():
        if path not in (train, *held[:1]):
            logger.warning("`%s` is not used: `%s` is there to train on.", path, train)
    return train, held[0] if held else None


def _subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and without links back up."""
    folders = []
    for path in _entries(folder):
        if path.name.startswith(".") or not path.is_dir():
            continue
        if path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
            logger.warning("Ignored `%s`: it links back to a folder that it lies in.", path)
            continue
        folders.append(path)
    return folders


def _tree(root: Path, *, skip_bad: bool, taught: bool) -> Tree:
    """The images of each class, all of them examined."""
    images = {path.name: images_below(path) for path in _subfolders(root)}
    _check_classes(root, images, taught=taught)
    paths = [path for found in images.values() for path in found]
    bad = {paths[index] for index in bad_images(paths, skip_bad=skip_bad)}
    if bad:
        images = {name: [path for path in found if path not in bad] for name, found in images.items()}
        _check_classes(root, images, taught=taught)
    stray = [path.name for path in _entries(root) if _is_image(path)]
    if stray:
        logger.warning("Ignored %d images outside the class folders of `%s`:\n%s", len(stray), root, listed(stray))
    return Tree(root, images)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        refuse_folder(error)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _check_classes(root: Path, images: dict[str, list[Path]], *, taught: bool) -> None:
    """Refuse a folder that is no set of classes. `taught`: it is trained on, where one class is too few."""
    if not images:
        loose = sum(_is_image(path) for path in _entries(root))
        raise DataError(
            f"A folder of images must have a folder for each class; got {counted(loose, 'image') if loose else 'none'} "
            f"in `{root}`. Sort the images into `{root}/CLASS/`, or name their labels in a CSV with `labels=`."
        )
    empty = [name for name, paths in images.items() if not paths]
    if empty:
        raise DataError(
            f"Every class must have an image; got none in {quoted([str(root / name) for name in empty])}. "
            f"Add images (they end in {', '.join(sorted(IMAGE_SUFFIXES))}), or remove the folders."
        )
    if len(images) == 1 and taught:
        raise DataError(
            f"Images must show at least 2 classes to be told apart; got only `{next(iter(images))}` in `{root}`. "
            "Add a folder for another class."
        )


def bad_images(images: Sources, *, skip_bad: bool) -> list[int]:
    """The images to leave out because they cannot be read, which is refused unless `skip_bad`.

    Beyond `NUM_DECODED_AHEAD` only the headers are read, unless bad images are to be skipped: nobody could later.
    """
    faults = unreadable(images, thorough=skip_bad or len(images) <= NUM_DECODED_AHEAD)
    if faults and not skip_bad:
        raise DataError(faults_message(list(faults.values())))
    if faults:
        logger.warning("Left out %d images, because of `skip_bad`:\n%s", len(faults), listed(list(faults.values())))
    return list(faults)
