"""Pictures of results: learning curves, predictions on images, and a confusion matrix.

Drawn without `pyplot`, so that no window system and no global state is involved. The colours are those of Okabe and
Ito, which people with any colour vision tell apart; lines carry their own labels, so that nobody matches a legend.
"""

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError
from ..data.extras import extra

INK, GREY = "#222222", "#5f5f5f"
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7"
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE)

DOTS_PER_INCH = 150
MAX_WRITTEN_CELLS = 20
"""Up to this many classes a confusion matrix has its numbers written in it."""
MAX_NAMED_CLASSES = 60
"""Up to this many classes every row and column of a confusion matrix is named; of more, some are."""
MAX_NAME = 24
"""Longer names of classes are cut."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The accuracy of a configuration on the held-out images, by run and epoch; the first value is before training."""

    name: str
    runs: Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Shown:
    """An image with what it shows and what was predicted."""

    pixels: NDArray[np.uint8]
    label: str
    predicted: str
    probability: float


def draw_curves(curves: Sequence[Curve], path: str | os.PathLike[str], *, title: str) -> None:
    """Accuracy over epochs: the mean of each configuration's runs, each run behind it, labels at the line's end."""
    with _figure(path, (8.0, 4.8)) as figure:
        axes = figure.add_axes((0.085, 0.125, 0.585, 0.705))
        _title(figure, title, "Accuracy on the held-out images after each epoch")
        last = max(len(run) - 1 for curve in curves for run in curve.runs)
        ends = []
        for curve, colour in zip(curves, PALETTE, strict=False):
            values = np.array([list(run) for run in curve.runs]) * 100
            epochs = np.arange(values.shape[1])
            if len(values) > 1:
                axes.plot(epochs, values.T, color=colour, linewidth=0.9, alpha=0.4)
            mean = values.mean(axis=0)
            axes.plot(epochs, mean, color=colour, linewidth=2.4, solid_capstyle="round")
            axes.plot(epochs[-1:], mean[-1:], "o", color=colour, markersize=6, clip_on=False, zorder=3)
            ends.append((float(mean[-1]), curve, colour))
        for place, (value, curve, colour) in zip(_apart([end[0] for end in ends], 11.0), ends, strict=True):
            axes.plot(
                (last, 1.035 * last), (value, place), color=colour, linewidth=0.9, clip_on=False, solid_capstyle="round"
            )
            runs = f", mean of {len(curve.runs)} runs" if len(curve.runs) > 1 else ""
            label = {"va": "center", "annotation_clip": False, "textcoords": "offset points", "parse_math": False}
            at, offset = (1.035 * last, place), (5, 0)
            axes.annotate(f"{curve.name}\n", at, offset, color=colour, fontsize=11, fontweight="bold", **label)
            axes.annotate(f"\n{value:.1f} %{runs}", at, offset, color=INK, fontsize=10, **label)
        axes.set_xlim(0, last)
        axes.set_ylim(0, 100)
        axes.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
        axes.set_xticks(_epoch_ticks(last))
        axes.set_xlabel("epoch", fontsize=11, color=INK)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        _bare(axes, keep="bottom")


def _apart(values: Sequence[float], distance: float) -> list[float]:
    """Places near the values, no two closer than `distance`, none outside 0 to 100, in the same order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    places = {index: values[index] for index in order}
    for _ in range(100):
        for low, high in itertools.pairwise(order):
            gap = distance - (places[high] - places[low])
            if gap > 0:
                places[low], places[high] = places[low] - gap / 2, places[high] + gap / 2
        for index in order:
            places[index] = min(max(places[index], distance / 2), 100 - distance / 4)
    return [places[index] for index in range(len(values))]


def _epoch_ticks(last: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, last or 1) if last / step <= 8)
    return list(range(0, last + 1, step))


def draw_predictions(shown: Sequence[Shown], path: str | os.PathLike[str], *, title: str) -> None:
    """Images with what they show and what was predicted; a wrong prediction says so in words and in colour."""
    columns = min(5, len(shown))
    rows = math.ceil(len(shown) / columns)
    side, across, down, head = 1.6, 1.9, 2.4, 0.95
    width, height = across * columns + 0.2, down * rows + head
    with _figure(path, (width, height)) as figure:
        right = sum(one.label == one.predicted for one in shown)
        _title(figure, title, f"{right} of {len(shown)} predicted rightly")
        for number, one in enumerate(shown):
            row, column = divmod(number, columns)
            left, bottom = 0.25 + across * column, height - head - down * row - side
            _draw_prediction(figure.add_axes((left / width, bottom / height, side / width, side / height)), one)


def _draw_prediction(axes: Any, one: Shown) -> None:
    correct = one.label == one.predicted
    colour = INK if correct else VERMILION
    axes.imshow(one.pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=not correct, color=colour, linewidth=3)
    place = {"transform": axes.transAxes, "ha": "center", "va": "top", "color": colour, "parse_math": False}
    size = 13 if len(one.predicted) < 8 else 9
    axes.text(0.5, -0.05, f"predicted {_short(one.predicted)}", fontsize=size, fontweight="bold", **place)
    true = f"true {_short(one.label)}, {_percent(one.probability)} sure"
    axes.text(0.5, -0.2, true, fontsize=9.5 if len(one.label) < 8 else 8, **place)


def draw_confusion(
    matrix: NDArray[np.int64], labels: Sequence[str], path: str | os.PathLike[str], *, title: str
) -> None:
    """How often each class (a row) was predicted as each class (a column), shaded by the share of its row."""
    count = len(labels)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = [_short(label) for label in labels]
    side = min(max(0.5 * count, 4.0), 11.0)
    scale = max(1.0, side / 8)
    margin = scale * (0.75 + 0.085 * max(map(len, names)))
    is_wordy = max(map(len, names)) > 3
    below, head = margin - 0.25 * scale if is_wordy else 0.65 * scale, 0.9 * scale
    width, height = margin + side + 0.3, below + side + head
    with _figure(path, (width, height)) as figure:
        axes = figure.add_axes((margin / width, below / height, side / width, side / height))
        right = f"{int(np.trace(matrix)):,} of {int(matrix.sum()):,} images are right: those on the diagonal"
        _title(figure, title, right, scale)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
        if count <= MAX_WRITTEN_CELLS:
            for row, column in zip(*np.nonzero(matrix), strict=True):
                colour = "white" if shares[row, column] > 0.55 else INK
                text = f"{matrix[row, column]:,}"
                axes.text(column, row, text, ha="center", va="center", fontsize=10 * scale, color=colour)
        ticks = range(0, count, math.ceil(count / MAX_NAMED_CLASSES))
        size = 11 * scale if count <= MAX_WRITTEN_CELLS else 9
        shown = [names[tick] for tick in ticks]
        axes.set_xticks(ticks, shown, rotation=90 if is_wordy else 0, fontsize=size, parse_math=False)
        axes.set_yticks(ticks, shown, fontsize=size, parse_math=False)
        axes.set_xlabel("predicted", fontsize=12 * scale, color=INK, labelpad=6)
        axes.set_ylabel("shown in the image", fontsize=12 * scale, color=INK, labelpad=6)
        _bare(axes, keep="")


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _percent(share: float) -> str:
    """A share as people read it; what is nearly certain is not said to be certain."""
    if share > 0.999:
        return "over 99.9 %"
    return f"{share * 100:.0f} %" if share < 0.99 else f"{share * 100:.1f} %"


def _title(figure: Any, title: str, subtitle: str, scale: float = 1.0) -> None:
    width, height = figure.get_size_inches()
    lines = ((title, 0.16, 14, "bold", INK), (subtitle, 0.46, 11, "normal", GREY))
    for text, top, size, weight, colour in lines:
        figure.text(
            0.2 / width, 1 - top * scale / height, text, fontsize=size * scale, fontweight=weight, color=colour,
            va="top", parse_math=False,
        )  # fmt: skip


def _bare(axes: Any, *, keep: str) -> None:
    """No frame but the named side, no tick marks."""
    for name, spine in axes.spines.items():
        spine.set(visible=name == keep, color=GREY)
    axes.tick_params(length=0, labelcolor=INK)


@contextlib.contextmanager
def _figure(path: str | os.PathLike[str], size: tuple[float, float]) -> Iterator[Any]:
    """A figure to draw on, written to `path` as a PNG afterwards."""
    figure = extra("matplotlib.figure").Figure(figsize=size, dpi=DOTS_PER_INCH, facecolor="white")
    extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    yield figure
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
            figure.savefig(target, format="png")
    except OSError as error:
        raise DataError(
            f"A picture must be written to a place that can be written; got `{target}`: {error.strerror or error}. "
            "Choose another file."
        ) from None
