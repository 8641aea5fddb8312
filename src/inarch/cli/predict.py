"""`inarch predict`: what images show."""

import contextlib
import csv
import json as json_format
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TextIO

import typer

from ..core.interrupt import importing
from ..core.table import counted
from .guard import Misused
from .output import note, out, progress

if TYPE_CHECKING:
    from ..train.predict import Prediction

ADAPTER_HELP = "An adapter: its folder, the folder of its run, or the Hub id of a repository with one."
BASE_HELP = "The base model, where it is not to be found under the name that the adapter has for it."
DEVICE_HELP = "Where to compute: `auto`, `cpu`, `cuda`, ..."
MAX_WIDTH = 60
"""A longer name of an image does not move the columns of the others."""


def predict(
    adapter: Annotated[str, typer.Argument(help=ADAPTER_HELP, show_default=False)],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.", show_default=False)],
    *,
    model: Annotated[str | None, typer.Option(help=BASE_HELP, show_default=False)] = None,
    top: Annotated[int, typer.Option(min=1, help="How many labels to name for each image.")] = 5,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Where images have several labels: the probability of a chosen one.")
    ] = 0.5,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list, an element as soon as it is there.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print JSON lines: an object a line.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file.", show_default=False)
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="How many images to compute at once.")] = 32,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
) -> None:
    """Predict what images show, and how sure the model is.

    Images are read batch by batch and each result is written as soon as it is there, so that any number of them can be
    predicted.
    """
    if json + jsonl + csv > 1:
        raise Misused("Results have one form; got several of `--json`, `--jsonl` and `--csv`. Choose one.")
    from ..data.images import find_images

    found = find_images(images, skip_bad=skip_bad)
    with importing():  # after the images: a wrong path is told at once
        from ..train.predict import load_predictor

    predictor = load_predictor(adapter, model=model, device=device)
    results = predictor.predict(found, top=top, threshold=threshold, batch_size=batch_size, skip_bad=skip_bad)
    is_watched = output is None and out().is_terminal
    with _opened(output) as file, progress("Predicting", shown=not is_watched) as report:
        count = min(top, len(predictor.labels))
        if json:
            writer: _Writer = _JSON(file)
        elif jsonl:
            writer = _JSONLines(file)
        elif csv:
            writer = _CSV(file, count, has_several=predictor.task == "multi_label")
        else:
            has_several = predictor.task == "multi_label"
            writer = _Lines(file, [str(path) for path in found], predictor.labels, has_several=has_several)
        number = _write(results, writer, file, batch_size, lambda done: report(done, len(found)))
    if output is not None:
        note(f"Wrote {counted(number, 'prediction')} to {output}")
    if number < len(found):
        note(f"Left out {len(found) - number:,} of {counted(len(found), 'image')}", style="yellow")


def _write(results: Iterator["Prediction"], writer: "_Writer", file: TextIO, batch_size: int, report: Any) -> int:
    """Every result as soon as its batch is done, and the end whatever happens. Returns how many there were."""
    number = 0
    try:
        for result in results:
            writer.write(result)
            number += 1
            if number % batch_size == 0:
                file.flush()
                report(number)
    finally:
        writer.close()
    return number


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        yield file


class _Writer(Protocol):
    """One of the forms of results."""

    def write(self, prediction: "Prediction") -> None: ...
    def close(self) -> None: ...


class _JSON:
    """A JSON list that is whole even where the predictions stop early."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.before = file, "[\n  "

    def write(self, prediction: "Prediction") -> None:
        self.file.write(self.before + json_format.dumps(prediction.to_dict(), ensure_ascii=False))
        self.before = ",\n  "

    def close(self) -> None:
        self.file.write("[]\n" if self.before.startswith("[") else "\n]\n")


class _JSONLines:
    """A JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, prediction: "Prediction") -> None:
        self.file.write(json_format.dumps(prediction.to_dict(), ensure_ascii=False) + "\n")

    def close(self) -> None:
        pass


class _CSV:
    """A line for each image: its label or chosen labels, then the likeliest labels with their probabilities."""

    def __init__(self, file: TextIO, count: int, *, has_several: bool) -> None:
        self.writer = csv.writer(file, lineterminator="\n")
        self.has_several = has_several
        ranked = [name for rank in range(1, count + 1) for name in (f"label_{rank}", f"probability_{rank}")]
        ranked[:2] = ranked[:2] if has_several else ["label", "probability"]
        self.writer.writerow(["image", *(["labels"] if has_several else []), *ranked])

    def write(self, prediction: "Prediction") -> None:
        chosen = [";".join(prediction.chosen or ())] if self.has_several else []
        ranked = [cell for label, probability in prediction.top for cell in (label, f"{probability:.6f}")]
        self.writer.writerow([prediction.image, *chosen, *ranked])

    def close(self) -> None:
        pass


class _Lines:
    """A table for people, a line at a time: its columns are as wide as the names that are known beforehand."""

    def __init__(self, file: TextIO, images: Iterable[str], labels: Iterable[str], *, has_several: bool) -> None:
        self.file = file
        self.has_several = has_several
        self.image_width = min(max(map(len, [*images, "image"])), MAX_WIDTH)
        widest = len(", ".join(labels)) if has_several else max(map(len, labels))
        self.label_width = min(max(widest, len("labels")), MAX_WIDTH)
        self.is_terminal = file is sys.stdout and out().is_terminal
        self.head = (
            self._line("image", "labels", "", "likeliest")
            if has_several
            else self._line("image", "label", "sure", "then")
        )

    def _line(self, image: str, label: str, sure: str, then: str) -> str:
        share = "" if self.has_several else f"  {sure:>7}"
        return f"{image:<{self.image_width}}  {label:<{self.label_width}}{share}  {then}".rstrip()

    def write(self, prediction: "Prediction") -> None:
        top = prediction.top
        if prediction.chosen is None:
            line = self._line(prediction.image, top[0][0], _percent(top[0][1]), _listed(top[1:]))
        else:
            line = self._line(prediction.image, ", ".join(prediction.chosen) or "-", "", _listed(top))
        if self.head:  # not before there is something to stand below it
            out().print(self.head, style="bold") if self.is_terminal else self.file.write(f"{self.head}\n")
            self.head = ""
        self.file.write(f"{line}\n")

    def close(self) -> None:
        pass


def _listed(top: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{label} {_percent(share)}" for label, share in top)


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"
