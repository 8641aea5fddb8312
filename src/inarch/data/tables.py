"""A CSV that names the labels of the images of a folder.

    image,label          one label each: a single-label task
    image,labels         any number of labels each, separated by `;` or `|`: a multi-label task
    image,cat,dog,...    a column of 0 and 1 for each label: a multi-label task

The first column may be called `image`, `file` or `filename`; paths are relative to the folder. A column `split` may say
`train` or `validation`.
"""

import csv
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import DataError
from .examples import Examples, ImageData, Target, Task, divide, quoted
from .folders import bad_images
from .images import images_below, listed

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "file", "filename")
SPLITS = {"train": False, "training": False, "validation": True, "valid": True, "val": True}
"""What the column `split` may say, and whether the image is held out then."""


@dataclass(frozen=True, slots=True)
class Row:
    """One image of the table."""

    path: Path
    labels: tuple[str, ...]
    held_out: bool


@dataclass(frozen=True, slots=True)
class Table:
    """A table that has been read and found consistent."""

    task: Task
    labels: list[str]
    rows: list[Row]


def load_table(root: Path, table_path: Path, *, validation: float | None, seed: int, skip_bad: bool) -> ImageData:
    """The images of a folder under the labels of a table."""
    table = _read(table_path, root)
    rows = _matched(table, table_path, root, skip_bad=skip_bad)
    bad = set(bad_images([row.path for row in rows], skip_bad=skip_bad))
    rows = [row for index, row in enumerate(rows) if index not in bad]
    ids = {name: index for index, name in enumerate(table.labels)}
    targets: list[Target] = [
        ids[row.labels[0]] if table.task == "single_label" else tuple(sorted(ids[name] for name in row.labels))
        for row in rows
    ]
    examples = Examples([row.path for row in rows], targets, len(table.labels))
    train = examples.pick([index for index, row in enumerate(rows) if not row.held_out])
    own = examples.pick([index for index, row in enumerate(rows) if row.held_out])
    _check_taught(table.labels, train, table_path)
    parts = divide(table_path, table.labels, train, own if len(own) else None, share=validation, seed=seed)
    return ImageData(
        name=root.resolve().name, task=table.task, labels=table.labels, train=parts[0], validation=parts[1]
    )


def _read(path: Path, root: Path) -> Table:
    header, lines = _lines(path)
    image_column = _image_column(header, path)
    others = [name for name in header if name not in (image_column, "split")]
    if [name.lower() for name in others] in (["label"], ["labels"]):
        task: Task = "single_label" if others[0].lower() == "label" else "multi_label"
        named = [_named(cells[others[0]], task, f"line {number} of `{path}`") for number, cells in lines]
        labels = sorted({name for names in named for name in names})
    else:
        task, labels = "multi_label", others
        named = [_ticked(cells, labels, f"line {number} of `{path}`") for number, cells in lines]
    _check_labels(labels, task, path)
    rows = [
        Row(
            _inside(root, cells[image_column], number, path),
            names,
            _held_out(cells.get("split", "train"), number, path),
        )
        for (number, cells), names in zip(lines, named, strict=True)
    ]
    return Table(task, labels, rows)


def _lines(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The names of the columns, and each line's number and cells."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"A table of labels must be a CSV in UTF-8; got `{error}` at `{path}`. Save it so.") from None
    for number, cells in lines:
        if len(cells) != len(header):
            raise DataError(
                f"Every line must have as many cells as the first; got {len(cells)} instead of {len(header)} "
                f"at line {number} of `{path}`. Quote a cell that has a comma in it."
            )
    if not lines:
        raise DataError(f"A table of labels must have a line for each image; got none at `{path}`. Add them.")
    return header, [(number, dict(zip(header, cells, strict=True))) for number, cells in lines]


def _image_column(header: list[str], path: Path) -> str:
    found = [name for name in header if name.lower() in IMAGE_COLUMNS]
    others = [name for name in header if name not in found and name != "split"]
    twice = sorted({name for name in header if header.count(name) > 1})
    if len(found) != 1 or not others or twice or "" in header:
        raise DataError(
            "The first line must name one column of images (`image`, `file` or `filename`) and `label`, `labels` or a "
            f"column for each label, none of them twice; got {quoted(header) or 'nothing'} at `{path}`. "
            "Add such a line, for example `image,labels`."
        )
    return found[0]


def _named(cell: str, task: Task, place: str) -> tuple[str, ...]:
    """The labels named in a cell."""
    if task == "single_label":
        if not cell:
            raise DataError(
                f"Every image must have a label; got an empty cell at {place}. Fill it, or remove the line."
            )
        return (cell,)
    names = [name.strip() for name in re.split("[;|]", cell)] if cell else []
    if "" in names or len(set(names)) < len(names):
        raise DataError(
            f"Labels must be different names with one `;` or `|` between them; got `{cell}` at {place}. Correct it."
        )
    return tuple(names)


def _ticked(cells: dict[str, str], labels: list[str], place: str) -> tuple[str, ...]:
    """The labels whose column has a 1."""
    for name in labels:
        if cells[name] not in ("0", "1", "0.0", "1.0"):
            raise DataError(
                f"A label's column must have 0 or 1; got `{cells[name]}` in `{name}` at {place}. Correct it."
            )
    return tuple(name for name in labels if cells[name].startswith("1"))


def _check_labels(labels: list[str], task: Task, path: Path) -> None:
    least = 2 if task == "single_label" else 1
    if len(labels) < least:
        raise DataError(
            f"A table must name at least {least} labels; got {quoted(labels) or 'none'} at `{path}`. Add the others."
        )


def _inside(root: Path, cell: str, number: int, table: Path) -> Path:
    path = Path(cell)
    if not cell or path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"An image must be named by its path below `{root}`; got `{cell}` at line {number} of `{table}`. "
            "Write it relative to that folder."
        )
    return root / path


def _held_out(cell: str, number: int, table: Path) -> bool:
    if cell.lower() not in SPLITS:
        raise DataError(
            f"A split must be `train` or `validation`; got `{cell}` at line {number} of `{table}`. Write one of them."
        )
    return SPLITS[cell.lower()]


def _matched(table: Table, table_path: Path, root: Path, *, skip_bad: bool) -> list[Row]:
    """The rows whose image is there, after refusing whatever table and folder disagree on."""
    named = [row.path for row in table.rows]
    twice = sorted(str(path) for path, count in Counter(named).items() if count > 1)
    if twice:
        raise DataError(
            f"Every image must be named once; got {len(twice)} named more than once at `{table_path}`:\n"
            f"{listed(twice)}\nRemove the lines that are too many."
        )
    listing = set(images_below(root))
    absent = [row for row in table.rows if not row.path.is_file()]
    unnamed = sorted(str(path) for path in listing - set(named))
    problems = [
        f"{len(found)} {words}:\n{listed(found)}"
        for found, words in (
            (sorted(str(row.path) for row in absent), "images that are named but missing"),
            (unnamed, "images that are there but not named"),
        )
        if found
    ]
    if problems and not skip_bad:
        raise DataError(
            f"`{table_path}` and the folder `{root}` must list the same images; got " + "\nand ".join(problems) + "\n"
            "Correct the table, or pass `skip_bad` to use only the images that are in both."
        )
    if problems:
        logger.warning("Left out, because of `skip_bad`: %s", "\nand ".join(problems))
    return [row for row in table.rows if row.path.is_file()]


def _check_taught(labels: list[str], train: Examples, path: Path) -> None:
    """Refuse a label that no image to train on shows."""
    shown = {label for target in train.targets for label in ((target,) if isinstance(target, int) else target)}
    missing = [name for index, name in enumerate(labels) if index not in shown]
    if missing:
        raise DataError(
            f"Every label must be on an image to train on; got none for {quoted(missing)} at `{path}`. "
            "Add images, or remove the label."
        )
