"""`inarch report`: one page of everything that runs left behind."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import InarchError
from ..core.interrupt import importing
from ..core.records import REPORT
from ..core.table import counted
from .output import say

if TYPE_CHECKING:
    from collections.abc import Sequence

RUNS_HELP = "Output folders of `inarch train`, `inarch sweep` or `inarch demo`, or folders with such folders."
OUTPUT_HELP = f"The page. [default: {REPORT} in the folder, or here for several]"


def report(
    runs: Annotated[list[Path], typer.Argument(help=RUNS_HELP, metavar="RUN...", show_default=False)],
    *,
    output: Annotated[Path | None, typer.Option(metavar="FILE.html", help=OUTPUT_HELP, show_default=False)] = None,
    title: Annotated[str, typer.Option(help="What the page is called.", show_default=False)] = "",
) -> None:
    """Write one HTML page about runs: results, curves, the model with its adapters, findings, how to reproduce it.

    The page needs no network and no other file.
    """
    if output is None:
        folder = runs[0] if runs[0].is_dir() else runs[0].parent
        output = folder / REPORT if len(runs) == 1 else Path(REPORT)
    number = make_report(runs, output, title=title)
    size = output.stat().st_size
    say(f"Wrote {output}: {counted(number, 'run')}, {size / 1e3:.0f} kB")


def make_report(runs: "Sequence[Path]", output: Path, *, title: str = "") -> int:
    """Write the page; returns how many runs it shows. Raises `InarchError` where a package is missing."""
    with importing():
        try:
            from ..report import read_entries, write_report
        except ModuleNotFoundError as error:
            from ..data.extras import missing

            message = missing(error.name or "vl_convert", error)
            raise InarchError(message) from error
    entries = read_entries(runs)
    write_report(entries, output, title=title)
    return len(entries)
