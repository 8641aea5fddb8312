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
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column, header in enumerate(headers):
        numeric = bool(rows) and all(isinstance(row[column], int) for row in rows)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for number, row in enumerate(rows):
        cells = [Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row]
        table.add_row(*cells, style=styles[number] if styles else "")
    console.print(table)


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
