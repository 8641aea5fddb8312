"""The charts of the page, drawn by Vega-Lite as SVG. They need no script, print as they are, and take their colours
from the page's style sheet, so that they follow its light and dark.

They are as wide as a telephone and stand side by side on wider screens; the parallel coordinates are drawn twice, and
the style sheet shows one. Marks carry the number of their run (`data-run`) and what they say when they are pointed at
(`data-tip`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from .draw import HEIGHT, WIDTH, Chart, Spec, by_run, described, is_share, shown, svg, words
from .entries import Entry
from .parallel import parallel

MAX_LABELS = 12
"""Lines that are labelled at their ends; of more, each says what it is when it is pointed at."""


def charts(entries: Sequence[Entry]) -> list[Chart]:
    """All charts that these runs have the numbers for."""
    metric = entries[0].metric if entries else ""
    found = [
        _curves(entries, metric, lambda epoch: epoch.metrics.get(metric)) if metric != "train_loss" else None,
        _curves(entries, "training loss", lambda epoch: epoch.train_loss),
        _against_parameters(entries, metric),
        parallel(entries, metric),
    ]
    return [chart for chart in found if chart is not None]


def _curves(entries: Sequence[Entry], name: str, of: Callable[[Any], float | None]) -> Chart | None:
    """A value over the epochs: a line for each entry, the mean of its seeds, with the seeds behind it."""
    rows: list[Spec] = []
    ends: list[tuple[Entry, float, float]] = []
    has_more = any(len(run.epochs) > 2 for entry in entries for run in entry.runs)  # epoch 0 would flatten the rest
    for entry in entries:
        means: dict[float, list[float]] = {}
        for run in entry.runs:
            for epoch in run.epochs:
                value = of(epoch)
                if value is None or not math.isfinite(value) or (epoch.epoch == 0 and has_more):
                    continue
                means.setdefault(epoch.epoch, []).append(value)
                if len(entry.runs) > 1:
                    rows.append({"run": entry.number, "x": epoch.epoch, "y": value, "seed": run.seed, "kind": "seed"})
        if name == entry.metric:
            means |= {epoch: [value] for epoch, value in entry.curve if epoch or not has_more}
        for at, values in sorted(means.items()):
            mean = math.fsum(values) / len(values)
            tip = f"{entry.number}. {entry.name}, epoch {at:g}: {words(name)} {shown(mean, name)}"
            rows.append({"run": entry.number, "x": at, "y": mean, "seed": -1, "kind": "mean", "tip": tip})
        if means:
            until = max(means)
            ends.append((entry, until, math.fsum(means[until]) / len(means[until])))
    if not rows:
        return None
    low, high = _padded([row["y"] for row in rows], share=is_share(name))

    scale = {"domain": [low, high], "nice": False, "zero": False}
    y = {"field": "y", "type": "quantitative", "title": None, "scale": scale, "axis": _number_axis(name, low, high)}
    last = max(row["x"] for row in rows)
    x_scale = {"domain": [min(row["x"] for row in rows), last], "nice": False, "padding": 6}
    ticks: Spec = {"tickCount": 5, "format": "~g", "grid": False}
    if last >= 2:
        ticks["values"] = [*range(0, math.floor(last) + 1, math.ceil(last / 8))]
    x = {"field": "x", "type": "quantitative", "title": "epoch", "scale": x_scale, "axis": ticks}
    shared = {"x": x, "y": y, "color": by_run(entries)}
    placed = [
        label
        for place in {at for _, at, _ in ends}
        for label in _apart([(end, entry.number, at) for entry, at, end in ends if at == place], (high - low) / 15)
    ]
    if len(placed) > MAX_LABELS:  # so many would stand for themselves only
        placed = []
    labels = [{"run": number, "x": at, "y": place, "label": str(number)} for place, number, at in placed]
    one = {"detail": [{"field": "run"}, {"field": "seed"}]}
    spec = {
        "width": WIDTH,
        "height": HEIGHT,
        "data": {"values": rows},
        "layer": [
            {
                "transform": [{"filter": "datum.kind == 'seed'"}],
                "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.35, "aria": True},
                "encoding": shared | one | described("toString(datum.run) + '. '"),
            },
            {
                "transform": [{"filter": "datum.kind == 'mean'"}],
                "mark": {"type": "line", "strokeWidth": 2.25},
                "encoding": shared | one | described("toString(datum.run) + '. '"),
            },
            {
                "transform": [{"filter": "datum.kind == 'mean'"}],
                "mark": {"type": "point", "filled": True, "size": 46, "opacity": 1},
                "encoding": shared | described("datum.tip"),
            },
            {
                "data": {"values": labels},
                "mark": {"type": "text", "align": "left", "dx": 9, "fontWeight": 600, "fontSize": 12},
                "encoding": shared | {"text": {"field": "label"}} | described("datum.label + '. '"),
            },
        ],
    }
    title = "Training loss" if name == "training loss" else f"{words(name).capitalize()} on held-out images"
    text = "; ".join(f"{entry.label} ends at {shown(end, name)}" for entry, _, end in ends[:MAX_LABELS])
    return Chart(title=title, summary=f"{title} over the epochs. {text}.", svg=svg(spec))


def _against_parameters(entries: Sequence[Entry], metric: str) -> Chart | None:
    """The result over the number of trained parameters."""
    rows: list[Spec] = []
    for entry in entries:
        size = entry.number_of("trainable")
        if entry.value is None or not size or entry.metric != metric or not entry.is_whole:
            continue
        spread = entry.spread or 0.0
        result = shown(entry.value, metric) + (f" ± {shown(spread, metric)}" if entry.spread is not None else "")
        tip = f"{entry.number}. {entry.name}: {words(metric)} {result} with {size:,} trained parameters"
        ends = {"y": entry.value, "low": entry.value - spread, "high": entry.value + spread}
        rows.append({"run": entry.number, "x": size, "tip": tip, "label": str(entry.number), **ends})
    if len(rows) < 2:
        return None
    for point in {(row["x"], row["y"]) for row in rows}:  # trials of one result share a label
        first, *others = (row for row in rows if (row["x"], row["y"]) == point)
        first["label"] = ", ".join(row["label"] for row in (first, *others))
        for row in others:
            row["label"] = ""
    low, high = _padded([row[key] for row in rows for key in ("low", "high")], share=is_share(metric))
    least, most = min(row["x"] for row in rows), max(row["x"] for row in rows)
    scale = {"type": "log", "domain": [least / 1.6, most * 1.6], "nice": False}
    places = _side_by_side([(row["x"], row["low"], row["high"]) for row in rows], (high - low) / 12)
    columns = max(places) - min(places) + 1
    step = (most / least * 1.6**2) ** min(0.12, 0.8 / columns)  # a share of the width, which is logarithmic
    for row, place in zip(rows, places, strict=True):
        row["x"] *= step**place

    x = {
        "field": "x",
        "type": "quantitative",
        "title": "trained parameters" + (", those of one size side by side" if columns > 1 else ""),
        "scale": scale,
        "axis": {"format": "~s", "grid": False, "values": _round_numbers(least / 1.6, most * 1.6)},
    }
    limits = {"domain": [low, high], "nice": False, "zero": False}
    y: Spec = {
        "field": "y",
        "type": "quantitative",
        "title": None,
        "scale": limits,
        "axis": _number_axis(metric, low, high),
    }
    at = {"x": x, "color": by_run(entries)}
    bars = {"y": y | {"field": "low"}, "y2": {"field": "high"}}
    spec = {
        "width": WIDTH,
        "height": HEIGHT,
        "data": {"values": rows},
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": at | bars | described("datum.tip")},
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": at | {"y": y} | described("datum.tip"),
            },
            {
                "mark": {
                    "type": "text",
                    "dx": 9,
                    "dy": -9,
                    "fontSize": 12,
                    "fontWeight": 600,
                    "opacity": 1 if len(rows) <= MAX_LABELS else 0,
                },
                "encoding": at | {"y": y, "text": {"field": "label"}} | described("toString(datum.run) + '. '"),
            },
        ],
    }

    title = f"{words(metric).capitalize()} against trained parameters"
    summary = f"{title}. {'; '.join(row['tip'] for row in rows[:MAX_LABELS])}."
    return Chart(title=title, summary=summary, svg=svg(spec))


def _side_by_side(rows: Sequence[tuple[float, float, float]], gap: float) -> list[float]:
    """How many columns to the right of its x each row stands, so that those of one x do not cover each other.

    Arguments: `rows` are x and the limits of y; what is closer than `gap` would touch. Equal rows stand at one place.
    """
    columns: dict[float, list[list[tuple[float, float]]]] = {}
    places: dict[tuple[float, float, float], int] = {}
    for x, low, high in sorted(set(rows)):
        taken = columns.setdefault(x, [])
        free = (n for n, column in enumerate(taken) if all(low - upper >= gap for _, upper in column))
        place = next(free, len(taken))
        if place == len(taken):
            taken.append([])
        taken[place].append((low, high))
        places[x, low, high] = place
    return [places[row] - (len(columns[row[0]]) - 1) / 2 for row in rows]


def _number_axis(name: str, low: float, high: float) -> Spec:
    percent = ".1%" if high - low < 0.045 else ".0%"
    return {"format": percent if is_share(name) else "~g", "tickCount": 5}


def _padded(values: Sequence[float], *, share: bool) -> tuple[float, float]:
    """Limits with a little room around the values; a share stays between 0 and 1."""
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.08 or 0.05
    low, high = low - room, high + room
    return (max(low, 0.0), min(high, 1.0)) if share else (low, high)


def _round_numbers(low: float, high: float) -> list[float]:
    """At most six round numbers between two limits, on a logarithmic scale."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(found) <= 6:
            return found
    return found[:: math.ceil(len(found) / 6)]


def _apart(ends: Sequence[tuple[float, int, float]], gap: float) -> list[tuple[float, int, float]]:
    """Labels that are `gap` apart: those too close to each other share the space around their mean."""
    groups: list[list[tuple[float, int, float]]] = []
    for end in sorted(ends):
        groups.append([end])
        while len(groups) > 1 and _spread(groups[-2], gap)[-1] + gap > _spread(groups[-1], gap)[0]:
            last = groups.pop()
            groups[-1] += last
    return [
        (place, number, at)
        for group in groups
        for place, (_, number, at) in zip(_spread(group, gap), group, strict=True)
    ]


def _spread(group: Sequence[tuple[float, int, float]], gap: float) -> list[float]:
    middle = math.fsum(place for place, _, _ in group) / len(group)
    return [middle + (number - (len(group) - 1) / 2) * gap for number in range(len(group))]
