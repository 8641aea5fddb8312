"""What all charts share: how Vega-Lite is asked for an SVG, and how numbers and names are written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import vl_convert

from .entries import Entry, Value

VEGA_LITE = "6.4"
WIDTH, HEIGHT, FULL = 356, 260, 1080
"""In pixels; `FULL` is the width of the whole page."""
NUM_COLOURS, NUM_LEVELS = 8, 5

Spec = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawn chart."""

    title: str
    summary: str
    """What it shows, for those who do not see it."""
    svg: str
    full: str = ""
    """The drawing for wide screens, where it is another one."""


def colours(entries: Sequence[Entry]) -> dict[int, str]:
    """The colour of each run by its number, as the style sheet calls it; of many runs, the better the stronger."""
    if len(entries) <= NUM_COLOURS:
        return {entry.number: f"var(--run-{place})" for place, entry in enumerate(entries, start=1)}
    ranked = sorted(entries, key=lambda entry: entry.rank)
    return {entry.number: f"var(--level-{place * NUM_LEVELS // len(ranked) + 1})" for place, entry in enumerate(ranked)}


def words(name: str) -> str:
    """A name of a program as words."""
    return name.replace("_", " ")


def headed(name: str) -> str:
    """A name of a program as a heading."""
    found = words(name)
    return found[:1].upper() + found[1:]


def shown(value: Value, metric: str = "") -> str:
    """A number for people; a share as a percentage."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float | int):
        return "none" if value is None else str(value)
    if metric and is_share(metric):
        return f"{value * 100:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def is_share(metric: str) -> bool:
    """Whether a metric is between 0 and 1."""
    return "loss" not in metric


def by_run(entries: Sequence[Entry]) -> Spec:
    """A colour for each run, without a legend: lines and points carry their numbers."""
    found = colours(entries)
    scale = {"domain": list(found), "range": list(found.values())}
    return {"field": "run", "type": "nominal", "legend": None, "scale": scale}


def described(expression: str) -> Spec:
    """What a mark is about; it begins with the number of its run."""
    return {"description": {"value": {"expr": expression}}}


_CONFIG: Spec = {
    "background": "transparent",
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "gridColor": "var(--grid)",
        "domain": False,
        "ticks": False,
        "labelPadding": 8,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
}


def svg(spec: Spec) -> str:
    """The drawing as SVG, a picture to assistive technology: its numbers are in the page's tables."""
    fit = {"autosize": {"type": "fit", "contains": "padding"}, "config": _CONFIG}
    drawn = str(vl_convert.vegalite_to_svg({**fit, **spec}, vl_version=VEGA_LITE))
    drawn = re.sub(r' (role|aria-roledescription|aria-hidden|class|xmlns:xlink)="[^"]*"', "", drawn)
    drawn = re.sub(r' aria-label="(\d+)\. ([^"]*)"', r' data-run="\1" data-tip="\2"', drawn)
    drawn = re.sub(r' aria-label="[^"]*"| data-tip=""', "", drawn)
    return drawn.replace("<svg ", '<svg aria-hidden="true" ', 1)
