"""The figure of the study: a point for every training, a row for every combination, a panel for every backbone."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from inarch.train.pictures import BLUE, DOTS_PER_INCH, GREY, INK, ORANGE, VERMILION

from .analysis import Study
from .subjects import SUBJECTS
from .trials import flags_of

LOOKS = {  # colour, marker: told apart without colours too
    "preserved": (BLUE, "o"),
    "skip connection doubled": (ORANGE, "D"),
    "norm applied twice": (ORANGE, "s"),
    "skip connection lost": (VERMILION, "X"),
}

LEAST = 0.5  # where a run with fewer errors is drawn: a logarithm has no place for none
TICKS = (1, 2, 5, 10, 20, 50, 100)


def draw(studies: Sequence[Study], path: Path) -> None:
    """Write the figure as PNG."""
    figure = Figure(figsize=(12.5, 8.0), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.965, "Proved before training, trained after", fontsize=15, fontweight="bold", color=INK)
    examples = f"{studies[0].num_held_out:,}"
    caption = (
        f"Errors on {examples} held-out examples, a point a seed; flags: before, after, residual; dotted: a head alone"
    )
    figure.text(0.02, 0.935, caption, fontsize=10, color=GREY)
    for index, study in enumerate(studies):
        axes = figure.add_axes((0.25 + 0.5 * (index % 2), 0.525 - 0.45 * (index // 2), 0.235, 0.345))
        subject = SUBJECTS[study.backbone]
        axes.set_title(f"{study.backbone}: {subject.arrangement}", fontsize=11, loc="left", color=INK)
        axes.axvline(100 - study.mean(None), color=GREY, linewidth=1, linestyle=":")
        for row, one in enumerate(study.judgements):
            colour, marker = LOOKS[one.verdict]
            errors = [max(LEAST, 100 - value) for value in study.points(one.adapter)]
            axes.plot(errors, [row] * len(errors), marker, color=colour, markersize=7, alpha=0.7, clip_on=False)
        axes.set_yticks(range(len(study.judgements)))
        axes.set_yticklabels(
            [f"{letters(one.adapter)}   {one.formula}" for one in study.judgements],
            fontsize=8,
            fontfamily="monospace",
        )
        axes.set_xscale("log")
        axes.set_xlim(100, LEAST)
        axes.set_xticks(TICKS, labels=[f"{tick:g}" for tick in TICKS])
        axes.minorticks_off()
        axes.set_ylim(len(study.judgements) - 0.5, -0.5)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.tick_params(length=0, colors=INK)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("errors, % (the fewer the better, logarithmic)", fontsize=9, color=INK)
    shown = dict.fromkeys(one.verdict for study in studies for one in study.judgements)
    handles = [
        Line2D([], [], color=LOOKS[verdict][0], marker=LOOKS[verdict][1], linestyle="", markersize=7, label=verdict)
        for verdict in LOOKS
        if verdict in shown
    ]
    figure.legend(handles=handles, loc="upper right", ncols=2, frameon=False, fontsize=9, bbox_to_anchor=(0.995, 0.995))
    figure.savefig(path, format="png", metadata={"Software": None})


def letters(adapter: str) -> str:
    """The three flags in letters: T T F."""
    return " ".join("T" if value else "F" for value in flags_of(adapter))
