"""Parallel coordinates: a line for each run through all settings in which the runs differ, and the result."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .draw import FULL, WIDTH, Chart, Spec, by_run, described, shown, svg, words
from .entries import Entry, Value, differing

MAX_AXES = 8


def parallel(entries: Sequence[Entry], metric: str) -> Chart | None:
    """A line for each entry through all settings in which the entries differ, and the result."""
    measured = [entry for entry in entries if entry.value is not None and entry.metric == metric and entry.settings]
    measured.sort(key=lambda entry: entry.rank)  # the best are drawn last, above the others
    keys = differing(measured)[: MAX_AXES - 1]
    if len(measured) < 3 or len(keys) < 2:
        return None
    axes = [_Axis.of(words(key), [entry.settings.get(key) for entry in measured]) for key in keys]
    axes.append(_Axis.of(words(metric), [entry.value for entry in measured], metric))
    lines: list[Spec] = []
    ticks: list[Spec] = []
    for place, axis in enumerate(axes):
        for row, entry in enumerate(measured):
            facts = ", ".join(f"{one.title} {shown(one.values[row], one.metric)}" for one in axes)
            tip = f"{entry.number}. {entry.name}: {facts}"
            lines.append({"run": entry.number, "axis": place, "at": axis.places[row], "tip": tip})
        ends = (axis.ticks[0], axis.ticks[-1]) if len(axis.ticks) > 3 else axis.ticks
        ticks += [{"axis": place, "at": at, "label": label, "ends": (at, label) in ends} for at, label in axis.ticks]
    heads = [{"axis": place, "at": 0, "to": 1, "title": axis.title} for place, axis in enumerate(axes)]

    def spec(*, upright: bool = False) -> Spec:
        along = {"type": "quantitative", "axis": None, "scale": {"domain": [0, len(axes) - 1], "nice": False}}
        across = {"type": "quantitative", "axis": None, "scale": {"domain": [0, 1], "nice": False}}
        if not upright:
            along["scale"] = {"domain": [len(axes) - 1, 0], "nice": False}
        first, second = ("x", "y") if upright else ("y", "x")
        at = {first: {"field": "axis", **along}, second: {"field": "at", **across}}
        aside: Spec = {"align": "right", "dx": -8, "dy": -9, "limit": 150}
        below: Spec = {"align": "center", "dy": 14, "limit": 90}
        tick = aside if upright else below
        head = {"dy": -26, "align": "center"} if upright else {"dy": -12, "align": "left"}
        head_at = {second: {"field": "to" if upright else "at", **across}}
        # Left of the first axis there are no lines to be covered.
        first_tick = tick | {"dy": 0} if upright else tick
        told = [one for one in ticks if upright or one["ends"]]
        line = {"type": "line", "strokeWidth": 2, "opacity": 0.85, "interpolate": "monotone"}
        return {
            "width": FULL if upright else WIDTH,
            "height": 300 if upright else 88 * len(axes),
            "padding": {"left": 20, "right": 60, "top": 30, "bottom": 12}
            if upright
            else {"left": 24, "right": 24, "top": 30, "bottom": 26},
            "layer": [
                {
                    "data": {"values": heads},
                    "mark": {"type": "rule", "color": "var(--line)"},
                    "encoding": at | {f"{second}2": {"field": "to"}},
                },
                {
                    "data": {"values": lines},
                    "mark": line,
                    "encoding": at
                    | {"detail": {"field": "run"}, "order": {"field": "axis"}, "color": by_run(entries)}
                    | described("datum.tip"),
                },
                _ticks([one for one in told if one["axis"] == 0], at, first_tick),
                _ticks([one for one in told if one["axis"] > 0], at, tick),
                {
                    "data": {"values": heads},
                    "mark": {"type": "text", "color": "var(--ink)", "fontSize": 12, "fontWeight": 600, **head},
                    "encoding": at | head_at | {"text": {"field": "title"}},
                },
            ],
        }

    title = "Where the runs differ"
    summary = f"Parallel coordinates: a line for each run through {', '.join(axis.title for axis in axes)}."
    return Chart(title=title, summary=summary, svg=svg(spec()), full=svg(spec(upright=True)))


def _ticks(values: list[Spec], at: Spec, mark: Spec) -> Spec:
    return {
        "data": {"values": values},
        "mark": {"type": "text", "color": "var(--muted)", "fontSize": 11, **mark},
        "encoding": at | {"text": {"field": "label"}},
    }


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of the parallel coordinates, from 0 to 1."""

    title: str
    metric: str
    values: tuple[Value, ...]
    places: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]

    @classmethod
    def of(cls, title: str, values: Sequence[Value], metric: str = "") -> "_Axis":
        numbers = [value for value in values if isinstance(value, float | int) and not isinstance(value, bool)]
        if len(numbers) < len(values):
            names = sorted({shown(value) for value in values})
            step = {name: (place + 0.5) / len(names) for place, name in enumerate(names)}
            places = [step[shown(value)] for value in values]
            return cls(title, metric, tuple(values), tuple(places), tuple((at, name) for name, at in step.items()))
        # Rates and sizes are tried over orders of magnitude.
        scale = math.log if min(numbers) > 0 and max(numbers) / min(numbers) >= 10 else float
        low, high = scale(min(numbers)), scale(max(numbers))
        span = (high - low) or 1.0
        place_of = {number: (scale(number) - low) / span if high > low else 0.5 for number in numbers}
        distinct = sorted(place_of)
        marked = distinct if len(distinct) <= 6 and not metric else [distinct[0], distinct[-1]]
        ticks = tuple((place_of[number], shown(number, metric)) for number in dict.fromkeys(marked))
        return cls(title, metric, tuple(values), tuple(place_of[number] for number in numbers), ticks)
