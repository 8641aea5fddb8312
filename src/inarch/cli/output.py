"""What the commands print: tables and messages for people, JSON for programs.

Results go to standard output, everything else to standard error. On a terminal tables have colours (unless `NO_COLOR`
is set); in a pipe or a file they are plain text, never cut to a width.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.table import render


def program() -> str:
    """What the user types to run inarch here: the program that was started, where no shell finds it by its name."""
    if shutil.which("inarch"):
        return "inarch"
    started = Path(sys.argv[0])
    return shlex.quote(str(started)) if started.name == "inarch" else f"{shlex.quote(sys.executable)} -m inarch"


def out() -> Console:
    """The console for results. Made anew each time, because tests replace the streams."""
    return _console(sys.stdout)


def err() -> Console:
    """The console for messages."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    console.soft_wrap = not console.is_terminal  # people read lines, programs want them whole
    return console


def say(text: str = "", style: str = "") -> None:
    """One line of a result, for people."""
    console = out()
    console.print(Text(text, style=style if console.is_terminal else ""))


def note(text: str, style: str = "") -> None:
    """One line beside the results."""
    err().print(Text(text, style=style))


def watch(text: str) -> None:
    """What goes on, for someone at a terminal."""
    console = err()
    if console.is_terminal:
        console.print(Text(f"{text} ...", style="dim"))


def fail(message: str) -> None:
    """Say what went wrong."""
    err().print(Text.assemble(("Error: ", "bold red"), message))


def say_json(data: Any) -> None:
    """One JSON document."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def say_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, styles: Sequence[str] = ()) -> None:
    """A table. `styles`: the colour of each row, on a terminal."""
    console = out()
    if not console.is_terminal:
        sys.stdout.write(render(headers, rows) + "\n")
        return
    numeric = [bool(rows) and all(isinstance(row[column], int) for row in rows) for column in range(len(headers))]
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    shown, widths, gap = _fitted(headers, cells, console.width)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, gap, 0, 0))
    for header, width, is_number in zip(shown, widths, numeric, strict=True):
        table.add_column(header, width=width, justify="right" if is_number else "left", overflow="fold")
    for number, row in enumerate(cells):
        table.add_row(*map(Text, row), style=styles[number] if styles else "")
    console.print(table)


def _fitted(
    headers: Sequence[str], rows: Sequence[Sequence[str]], room: int
) -> tuple[list[str], list[int] | list[None], int]:
    """Headers, widths of columns and the gap between them, so that no word is broken where that can be helped.

    The widths are None where there is no room for every word.
    """
    columns = [[header, *(row[place] for row in rows)] for place, header in enumerate(headers)]
    whole = [max(map(cell_len, column)) for column in columns]
    gaps = len(columns) - 1
    if sum(whole) + 2 * gaps <= room:
        return list(headers), whole, 2
    # The names of settings are written as words, which may stand below each other.
    columns = [[header.replace("_", " "), *column[1:]] for header, column in zip(headers, columns, strict=True)]
    widths = [max(cell_len(word) for text in column for word in text.split() or [""]) for column in columns]
    gap = 2 if sum(widths) + 2 * gaps <= room else 1
    spare = room - sum(widths) - gap * gaps
    if spare < 0:
        return [column[0] for column in columns], [None] * len(columns), gap
    bodies = [max(map(cell_len, column[1:]), default=0) for column in columns]
    for wanted in (bodies, whole):  # a heading in two lines costs one line, a cell in two one for each row
        for place in sorted(range(len(columns)), key=wanted.__getitem__):  # what is left is for the longest texts
            more = max(0, min(spare, wanted[place] - widths[place]))
            widths[place] += more
            spare -= more
    return [column[0] for column in columns], widths, gap


def _unseen(done: int, total: int) -> None:
    """Progress that nobody watches."""


@contextmanager
def progress(what: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal; called with how much is done and how much there is."""
    console = err()
    if not (shown and console.is_terminal):
        yield _unseen
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
