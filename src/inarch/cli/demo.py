"""`inarch demo`: what `make demo` runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.interrupt import importing
from ..core.records import REPORT
from ..core.table import counted
from .output import err, note, out, program, say, say_table
from .report import make_report

if TYPE_CHECKING:
    from ..check import Report
    from ..train.demo import Audience, DemoResult, Outcome, Way

OUTPUT_HELP = "Where to write it, in the place of an earlier demonstration."


def demo(*, output: Annotated[Path, typer.Option(metavar="FOLDER", help=OUTPUT_HELP)] = Path("runs/demo")) -> None:
    """Teach digits to a small backbone that knows letters: with a new head, with an adapter, and with an unsound one.

    Takes about a minute and needs no network. Each configuration is judged before it is trained, and
    the adapter is loaded again in a fresh process.
    """
    with importing():
        from ..train.demo import run_demo

    say("A small Vision Transformer that was pre-trained on letters learns handwritten digits.", style="bold")
    with _teller() as audience:
        result = run_demo(output, audience=audience, command=("inarch", *sys.argv[1:]))
    has_page = _write_page(result.folder)
    _say_result(result, has_page=has_page)


def _write_page(folder: Path) -> bool:
    """Write the page of the runs; where its packages are missing, say so: the rest is there all the same."""
    if find_spec("jinja2") is None or find_spec("vl_convert") is None:
        note('For a page about these runs, `pip install "inarch[report]"`.')
        return False
    make_report([folder], folder / REPORT, title="A backbone that knows letters learns digits")
    return True


@contextmanager
def _teller() -> "Iterator[Audience]":
    """An audience that prints what goes on, with a progress bar on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..train.demo import Audience

    console = err()
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=out().is_terminal,  # else the results would go where the bars are
    )

    class Teller(Audience):
        """Prints."""

        num_runs = 1
        task: Any = None

        def begin(self, way: "Way", report: "Report | None", num_runs: int) -> None:
            say()
            say(way.key if way.adapter in (None, way.key) else f"{way.key}: {way.adapter}", style="bold")
            _say_verdict(report)
            self.num_runs = num_runs
            self.task = bars.add_task("training", total=None)
            if not console.is_terminal:
                note(f"  training{f' with {num_runs} seeds' if num_runs > 1 else ''} ...")

        def step(self, run: int, done: int, total: int, accuracy: float | None) -> None:
            which = f", run {run} of {self.num_runs}" if self.num_runs > 1 else ""
            so_far = f", accuracy {accuracy:.1%}" if accuracy is not None else ""
            completed, whole = (run - 1) * total + done, self.num_runs * total
            bars.update(self.task, description=f"training{which}{so_far}", completed=completed, total=whole)

        def finish(self, outcome: "Outcome") -> None:
            bars.remove_task(self.task)
            runs = f", the mean of {len(outcome.runs)} runs" if len(outcome.runs) > 1 else ""
            accuracy = f"accuracy on the held-out digits {_percent(outcome.accuracy)}{runs}, after the last epoch"
            say(f"  {accuracy}; {outcome.seconds:.0f} s a run")

        def reload(self) -> None:
            say()
            note("Loading the adapter in a fresh process ...")

    with bars:
        yield Teller()


def _say_verdict(report: "Report | None") -> None:
    """The formula and what was proved, before anything is trained."""
    if report is None:
        say("  y = x + h, as it was: the backbone is frozen, and only a new head is trained")
        return
    for group in report.sites:
        formula = group.proof.formula
        words = f"  y = {formula.adapted}, where it was y = {formula.pretrained}: {group.proof.verdict}"
        say(words, style="green" if group.proof.sound else "red")
    for finding in report.findings:
        say(f"  {finding}", style="red")


def _say_result(result: "DemoResult", *, has_page: bool) -> None:
    say()
    rows = [
        (
            outcome.way.key,
            "yes" if outcome.report is None or outcome.report.sound else "no",
            _percent(outcome.accuracy),
            _percent(outcome.best_accuracy),
            outcome.trainable_parameters,
            f"{outcome.seconds:.1f}",
        )
        for outcome in result.outcomes
    ]
    say_table(("configuration", "sound", "accuracy", "best epoch", "trained parameters", "seconds"), rows)
    say(
        "Accuracy is that after the last epoch; the page tells that of the best epoch, which is saved, and which was "
        "chosen on the same held-out digits."
    )
    say()
    reload = result.reload
    same = "the same" if reload.identical_labels else "OTHER"
    most = reload.max_probability_difference
    shares = f"probabilities differ by at most {most:.0e}" if most else "every probability is identical"
    say(
        f"In a fresh process the adapter ({result.adapter_bytes / 1e3:.0f} kB) predicts {same} labels for "
        f"{counted(reload.num_images, 'image')}; {shares}."
    )
    say()
    folder = result.folder
    say_table(
        ("written to", "what it is"),
        [
            *([(f"{folder}/{REPORT}", "all of it as a page to open in a browser")] if has_page else []),
            (f"{folder}/results.json", "all numbers"),
            (f"{folder}/curves.png", "accuracy over the epochs"),
            (f"{folder}/digits.png", "ten predictions"),
            (f"{folder}/adapter", "the adapter"),
        ],
    )
    say()
    start = program()
    say("Try next:", style="bold")
    say(f"  {start} predict {folder} {folder}/images")
    say(f"  {start} eval {folder} --data digits --picture {folder.parent}/confusion.png")
    say(f"  {start} check vit --adapter 'par_bn'")
    say(f"  {start} train --model demo --data YOUR/FOLDER --adapter lora --output runs/mine")


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"
