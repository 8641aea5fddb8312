"""Data sets of the `datasets` library: saved to a folder, or on the Hub."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import DataError, nearest
from ..core.places import absent, first_line, nearest_place
from .examples import Examples, ImageData, Target, divide, quoted
from .extras import extra
from .folders import TRAIN_NAMES, VALIDATION_NAMES, announce_test, bad_images
from .images import EncodedImage, ImageSource

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label", "class", "category", "target")
"""What a column of labels may be called when its type does not say that it is one."""

HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")
"""`name` or `owner/name`, and where the data set has several configurations, `:` and one of them."""

ADVICE = "Correct the path or the id (`owner/name`, or `owner/name:configuration`), or go online."


@dataclass(frozen=True, slots=True)
class Choice:
    """The columns a user has chosen; none where the data set leaves no choice."""

    image: str | None
    label: str | None
    granularity: str
    """`fine` or `coarse` where both are there."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of labels: their names in the order of their ids, and whether an image may have several."""

    name: str
    labels: list[str]
    values: list[Any]
    """The value that stands for each label in the column."""
    is_list: bool


class ImageColumn:
    """The still encoded images of a column."""

    def __init__(self, data: Any, column: str, place: str) -> None:
        self.data = data.select_columns([column]).cast_column(column, extra("datasets").Image(decode=False))
        self.column = column
        self.place = place

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> ImageSource:
        cell = self.data[int(index)][self.column] or {}
        if cell.get("bytes") is not None:
            return EncodedImage(cell["bytes"], f"{self.place}, row {index}")
        return str(cell["path"]) if cell.get("path") else EncodedImage(b"", f"{self.place}, row {index}")


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved(folder: Path, choice: Choice, *, validation: float | None, seed: int, skip_bad: bool) -> ImageData:
    """A data set that was saved to a folder."""
    datasets = extra("datasets")
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # noqa: BLE001  whatever a damaged folder makes of the library
        fault = first_line(error)
    else:
        return _loaded(data, folder.resolve().name, choice, validation=validation, seed=seed, skip_bad=skip_bad)
    raise DataError(f"A saved data set must be whole; got `{fault}` at `{folder}`. Save it again with `save_to_disk`.")


def load_hub(source: str, choice: Choice, *, validation: float | None, seed: int, skip_bad: bool) -> ImageData:
    """A data set of the Hub; code that comes with one is never run."""
    match = HUB_ID.fullmatch(source)
    assert match is not None
    datasets = extra("datasets")
    try:
        data = datasets.load_dataset(match["id"], name=match["config"])
    except Exception as error:  # noqa: BLE001  offline, unknown, gated, without a configuration: the library says which
        fault = absent(error)
    else:
        return _loaded(data, source, choice, validation=validation, seed=seed, skip_bad=skip_bad)
    raise DataError(
        f"A data set is a file or folder that is there, or one of the Hub; got `{source}`: {fault}. "
        f"{nearest_place(source, ['digits']) or ADVICE}"
    )


def _loaded(data: Any, name: str, choice: Choice, *, validation: float | None, seed: int, skip_bad: bool) -> ImageData:
    train, own, own_name = _parts(data, name)
    image_column = _image_column(train.features, choice, name)
    column = _label_column(train, choice, name)
    if own is not None and validation is not None:
        logger.warning("A part of `%s` is not used: `validation` asks for a share of the training images.", name)
        own = None
    if own is not None:
        announce_test(own_name, name)
    train_examples = _examples(train, image_column, column, name, skip_bad=skip_bad)
    own_examples = None if own is None else _examples(own, image_column, column, name, skip_bad=skip_bad)
    parts = divide(name, column.labels, train_examples, own_examples, share=validation, seed=seed)
    return ImageData(
        name=name,
        task="multi_label" if column.is_list else "single_label",
        labels=column.labels,
        train=parts[0],
        validation=parts[1],
    )


def _parts(data: Any, name: str) -> tuple[Any, Any | None, str]:
    """The part to train on and the one to validate on, with its name."""
    if not hasattr(data, "keys"):
        return data, None, ""
    train = next((data[part] for part in TRAIN_NAMES if part in data), None)
    if train is None and len(data) == 1:
        train = next(iter(data.values()))
    if train is None:
        raise DataError(
            f"A data set with several parts must call one of them `train`; got {quoted(sorted(data))} in `{name}`. "
            "Save one part alone, or rename it."
        )
    held = [part for part in VALIDATION_NAMES if part in data]
    unused = [part for part in data if part not in (*TRAIN_NAMES, *held[:1])] if len(data) > 1 else []
    if unused:
        logger.warning("Of `%s`, %s is not used.", name, quoted(unused))
    own = data[held[0]] if held and data[held[0]] is not train else None
    return train, own, held[0] if held else ""


def _image_column(features: Any, choice: Choice, name: str) -> str:
    images = [column for column, feature in features.items() if isinstance(feature, extra("datasets").Image)]
    if choice.image is not None:
        if choice.image not in images:
            raise DataError(
                f"`image_column` must name a column of images; got `{choice.image}` for `{name}`. "
                f"{nearest(choice.image, images)}"
            )
        return choice.image
    if not images:
        raise DataError(
            f"A data set must have a column of images; got {quoted(list(features))} in `{name}`. "
            "Cast the column with `datasets.Image()`."
        )
    if len(images) > 1:
        logger.warning("Of the columns of images of `%s`, %s, the first is used.", name, quoted(images))
    return str(images[0])


def _label_column(train: Any, choice: Choice, name: str) -> Column:
    """The column that tells what the images show, after the user's choice or because there is only one."""
    candidates = _label_columns(train.features)
    if choice.label is not None:
        if choice.label not in train.features:
            raise DataError(
                f"`label_column` must name a column; got `{choice.label}` for `{name}`. "
                f"{nearest(choice.label, train.features)}"
            )
        return _column(train, choice.label, name)
    wanted = f"{choice.granularity}_label"
    if wanted in candidates and set(candidates) <= {"fine_label", "coarse_label"}:
        return _column(train, wanted, name)
    if len(candidates) == 1:
        return _column(train, candidates[0], name)
    found = f"{quoted(candidates)}" if candidates else f"none among {quoted(list(train.features))}"
    raise DataError(
        f"A data set must have one column of labels; got {found} in `{name}`. Choose one with `label_column`."
    )


def _label_columns(features: Any) -> list[str]:
    """The columns whose type says that they hold labels and, where there are none, those whose name does."""
    kind = extra("datasets").ClassLabel
    typed = [column for column, feature in features.items() if isinstance(_item(feature), kind)]
    return typed or [column for column in features if column in LABEL_COLUMNS and _is_plain(features[column])]


def _item(feature: Any) -> Any:
    """The type of the elements of a list, or else the type itself."""
    return getattr(feature, "feature", feature)


def _is_plain(feature: Any) -> bool:
    """Whether the values are text or integers, which can name a label."""
    kind = str(getattr(_item(feature), "dtype", ""))
    return kind in ("string", "large_string") or kind.startswith(("int", "uint"))


def _column(train: Any, column: str, name: str) -> Column:
    """The labels of a column: those its type names, or else its sorted values."""
    feature = train.features[column]
    item = _item(feature)
    is_list = item is not feature
    if isinstance(item, extra("datasets").ClassLabel):
        return Column(column, list(item.names), list(range(len(item.names))), is_list)
    if not _is_plain(feature):
        raise DataError(
            f"A column of labels must hold text, integers or `ClassLabel`, or lists of them; got `{item}` in "
            f"`{column}` of `{name}`. {nearest(column, _label_columns(train.features))}"
        )
    cells = _cells(train, column)
    values = sorted({value for cell in cells for value in (cell or [] if is_list else [cell]) if value is not None})
    return Column(column, [str(value) for value in values], values, is_list)


def _cells(data: Any, column: str) -> list[Any]:
    return list(data.select_columns([column]).with_format(None)[:][column])


def _examples(data: Any, image_column: str, column: Column, name: str, *, skip_bad: bool) -> Examples:
    part = f"{name} ({data.split})" if data.split else name
    place = f"`{part}`"
    examples = Examples(
        ImageColumn(data, image_column, part), _targets(_cells(data, column.name), column, place), len(column.labels)
    )
    bad = set(bad_images(examples.images, skip_bad=skip_bad))
    examples = examples.pick([index for index in range(len(examples)) if index not in bad]) if bad else examples
    _check(examples.targets, column, place)
    return examples


def _targets(cells: Sequence[Any], column: Column, place: str) -> list[Target]:
    """The ids of the labels in each cell."""
    ids = {value: index for index, value in enumerate(column.values)}
    targets: list[Target] = []
    for row, cell in enumerate(cells):
        values = cell if column.is_list else [cell]
        unknown = [value for value in values if value not in ids] if values is not None else [None]
        if unknown:
            raise DataError(
                f"Every image must have labels of those to train on; got `{unknown[0]}` in `{column.name}` at "
                f"row {row} of {place}. Remove or mend the row."
            )
        targets.append(tuple(sorted({ids[value] for value in values})) if column.is_list else ids[values[0]])
    return targets


def _check(targets: Sequence[Target], column: Column, place: str) -> None:
    """Refuse a part without images or a task without a choice; announce labels that no image shows."""
    if len(column.labels) < (1 if column.is_list else 2) or not targets:
        raise DataError(
            f"Images must show at least 2 classes to be told apart; got {len(targets)} images of "
            f"{quoted(column.labels) or 'no label'} in {place}. Add images, or choose another `label_column`."
        )
    shown = {label for target in targets for label in ((target,) if isinstance(target, int) else target)}
    unseen = [name for index, name in enumerate(column.labels) if index not in shown]
    if unseen:
        logger.warning("No image in %s shows %s.", place, quoted(unseen))
