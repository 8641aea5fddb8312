"""`inarch sweep`: a study over configurations."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ConfigError, InarchError, StateError
from ..core.interrupt import importing
from ..core.records import STUDY, StudyRecord, TrialRecord, nothing_to_resume, read_study
from ..core.table import counted
from ..sweep.study import StudyConfig, read_study_file
from ..train.recipe import DataConfig, Recipe
from .guard import ERROR, lacking
from .options import configured, in_options, made_from
from .output import err, note, say, say_json, say_table

if TYPE_CHECKING:
    from ..sweep.trial import Ahead, Audience

VARY_HELP = (
    "A field of the adapter or of the recipe and its values: `reduction_factor=4,16,64`, "
    "`learning_rate=1e-4..1e-2:log`, `adapter=seq_bn,lora`, or a field alone that is true or false. Repeat it."
)
STUDY_HELP = (
    "A ready study, as `norm-flags`: the eight combinations of three flags, with three seeds each, the unsound ones "
    "trained on purpose; minutes for `demo`. Or a JSON file: what other options do not say."
)
STORAGE_HELP = (
    "Where the study is kept: `postgresql://USER@HOST/DATABASE` lets the same command on several machines work on one "
    "study. [default: a file in the output folder]"
)
SPARING = {"stop_early": True}
"""What a study's recipe says where nobody says otherwise."""

GRACE_HELP = "Seconds without a sign of life after which a worker of another machine counts as dead."
STYLES = {"finished": "", "repeated": "dim", "refused": "dim", "pruned": "dim", "stopped": "yellow"}


@configured(SPARING, study_options=StudyConfig, data_options=DataConfig, recipe_options=Recipe)
def sweep(
    *,
    output: Annotated[Path, typer.Option(help="Folder of the study.", metavar="FOLDER", show_default=False)],
    study: Annotated[str | None, typer.Option(help=STUDY_HELP, metavar="NAME|FILE", show_default=False)] = None,
    vary: Annotated[list[str] | None, typer.Option(help=VARY_HELP, metavar="FIELD=VALUES", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="`demo`, a folder, or the Hub id of a model for images.", show_default=False)
    ] = None,
    storage: Annotated[str | None, typer.Option(help=STORAGE_HELP, metavar="URL", show_default=False)] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the study in a database. [default: that of the folder]")
    ] = None,
    grace: Annotated[float, typer.Option(help=GRACE_HELP, min=1)] = 120,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the study in the output folder; its options are remembered.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the study.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record of the study as JSON.")] = False,
    study_options: dict[str, Any],
    data_options: dict[str, Any],
    recipe_options: dict[str, Any],
) -> None:
    """Try configurations of an adapter on labelled images, and say which is best.

    What is proved to fail is not trained; what is behind, or does not learn, is given up (not with `--pruner none`,
    `--no-stop-early`). The same command goes on with a study that was ended in any way, and several at once share its
    work. Exit code 0 if a trial came to its end, else 1.
    """
    try:
        request = _remembered(output) if resume else read_study_file(study) if study else {"study": {}}
        varied = _varied(vary or [])
        asked = {**request["study"], **study_options}
        if varied or not asked.get("vary"):
            asked["vary"] = {**asked.get("vary", {}), **varied}
        data = {**request.get("data", {}), **data_options}
        chosen = model or request.get("model")
        missing = [flag for flag, value in (("--model", chosen), ("--data", data.get("data"))) if not value]
        if missing or not asked["vary"]:
            raise lacking("A study has a model, data, and what it varies", (missing or ["--vary"])[0])
        options = {
            "study": made_from(StudyConfig, asked),
            "recipe": made_from(Recipe, {**SPARING, **request.get("recipe", {}), **recipe_options}),
            "data": made_from(DataConfig, data),
            "model": chosen,
            "output": output,
            "storage": storage,
            "name": name,
            "grace": grace,
            "overwrite": overwrite,
        }
        record = _run(options, is_quiet=quiet or json)
    except InarchError as error:
        raise type(error)(in_options(str(error), StudyConfig, Recipe, DataConfig)) from error
    except KeyboardInterrupt:
        if (output / STUDY).is_file():
            again = f" --storage {_masked(storage)}" if storage else ""
            again += f" --name {shlex.quote(name)}" if name else ""
            note(f"The study is kept. Go on with `inarch sweep --output {shlex.quote(str(output))} --resume{again}`.")
        raise
    say_json(record.to_dict()) if json else _say_result(record, output)
    if record.best is None:
        raise typer.Exit(ERROR)


def _masked(url: str) -> str:
    from ..sweep.storage import masked

    return masked(url)


def _remembered(output: Path) -> dict[str, Any]:
    if not (output / STUDY).is_file():
        raise StateError(nothing_to_resume(output, STUDY))
    return dict(read_study(output).job)


def _varied(words: list[str]) -> dict[str, str]:
    """By field, the text after the `=`."""
    found: dict[str, str] = {}
    for word in words:
        field, _, values = word.partition("=")
        if field.strip() in found:
            raise ConfigError(f"A field is varied once; got `{field.strip()}` twice at `--vary`. Join its values.")
        found[field.strip()] = values.strip()
    return found


def _run(options: dict[str, Any], *, is_quiet: bool) -> StudyRecord:
    with importing():
        from ..sweep.run import run_study
    with _teller(shown=not is_quiet) as audience:
        command = ("inarch", *(_masked(word) for word in sys.argv[1:]))
        return run_study(**options, audience=audience, command=command)


@contextmanager
def _teller(*, shown: bool) -> "Iterator[Audience]":
    """An audience that prints a line for each trial that is over, and on a terminal shows how far the others are."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    from ..sweep.trial import Audience

    if not shown:
        yield Audience()
        return
    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    study = bars.add_task("trials", total=None)
    training = bars.add_task("training", total=None, visible=False)

    class Teller(Audience):
        """Prints."""

        is_waiting = False

        ahead = 0

        def begin(self, total: int, done: int, ahead: "Ahead") -> None:
            bars.update(study, total=total, completed=done)
            self.ahead = ahead.steps
            console.print(Text(_plan(total, done, ahead)))

        def judged(self, trial: TrialRecord) -> None:
            bars.reset(training, description=f"trial {trial.number}", total=None, visible=True)

        def step(self, trial: TrialRecord, seed: int, done: int, total: int, value: float | None) -> None:
            so_far = f", {value:.4f}" if value is not None else ""
            bars.update(training, description=f"trial {trial.number}, seed {seed}{so_far}", completed=done, total=total)

        def finish(self, trial: TrialRecord) -> None:
            bars.update(training, visible=False)
            bars.advance(study)
            bars.console.print(Text(_line(trial)))
            if self.ahead and trial.steps:  # the first that was trained shows how long the rest takes
                minutes = trial.seconds / trial.steps * (self.ahead - trial.steps) / 60
                bars.console.print(Text(f"at this pace the others take {max(1, round(minutes))} min at most"))
                self.ahead = 0

        def wait(self, running: int) -> None:
            if not self.is_waiting:
                console.print(Text(f"Waiting for {counted(running, 'trial')} of other workers."))
            self.is_waiting = True

    with bars:
        yield Teller()


def _plan(total: int, done: int, ahead: "Ahead") -> str:
    """What the study is about to do, as it is told before it begins."""
    words = counted(total, "trial") + (f", {done} of them over" if done else "")
    words += f", each with {ahead.seeds} seeds" if ahead.seeds > 1 else ""
    words += f"; {ahead.steps:,} steps of training at most" if ahead.steps else ""
    if ahead.unsound:
        words += ". What is proved unsound is trained too: this study asks for it, to show what becomes of it"
    return f"{words}."


def _line(trial: TrialRecord) -> str:
    values = ", ".join(f"{name}={_word(value)}" for name, value in trial.values.items())
    words = [f"trial {trial.number}", values, _outcome(trial)]
    if trial.value is not None:
        words.append(f"{trial.value:.4f}")
    if trial.reason:
        words.append(trial.reason.splitlines()[0])
    return "  ".join(words)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _outcome(trial: TrialRecord) -> str:
    by = {"check": " by the check", "hyperband": " by Hyperband", "monitor": " by the monitor"}.get(
        trial.decided_by, ""
    )
    return f"repeats {trial.same_as}" if trial.same_as is not None else f"{trial.status}{by}"


def _verdict(trial: TrialRecord) -> str:
    if trial.verdict is None:
        return ""
    return ", ".join(dict.fromkeys(group.verdict for group in trial.verdict.groups)) or "preserved"


def _say_result(record: StudyRecord, output: Path) -> None:
    fields = list(record.fields)
    several = any(trial.std is not None for trial in record.trials)
    headers = ("trial", *fields, "verdict before", "outcome", record.metric, *(["±"] if several else []), "steps")
    rows = [
        (
            trial.number,
            *(_word(trial.values[name]) if name in trial.values else "" for name in fields),
            _verdict(trial),
            _outcome(trial),
            f"{trial.value:.4f}" if trial.value is not None else "",
            *([f"{trial.std:.4f}" if trial.std is not None else ""] if several else []),
            trial.steps,
        )
        for trial in record.trials
    ]
    styles = ["bold green" if one.number == record.best else STYLES.get(one.status, "red") for one in record.trials]
    say_table(headers, rows, styles=styles)
    say()
    counts: dict[str, int] = {}
    for trial in record.trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    say(", ".join(f"{number} {status}" for status, number in counts.items()))
    if record.steps_in_full:
        share = record.steps / record.steps_in_full
        say(
            f"{record.steps:,} training steps, {share:.0%} of the {record.steps_in_full:,} that train every "
            "configuration to its end"
        )
    if record.best is None:
        note("No trial came to its end.")
        return
    best = record.trials[record.best]
    values = ", ".join(f"{name}={_word(value)}" for name, value in best.values.items())
    say(f"best: trial {best.number}, {values}: {record.metric} {best.value:.4f}", style="bold")
    say(f"its run is in {output / best.runs[0]}; the record of the study is {output / STUDY}")
