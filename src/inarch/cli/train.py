"""`inarch train`: from a folder of images to an adapter folder."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ConfigError, InarchError
from ..core.interrupt import importing
from ..core.records import EpochRecord, RunRecord, SeedsRecord
from ..core.table import counted
from ..train.folder import RunFolder
from ..train.recipe import DataConfig, Recipe
from .check import CONFIG_HELP, say_report
from .guard import ERROR, lacking
from .options import configured, in_options, made_from
from .output import err, fail, note, say, say_json, say_table

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ..check import Data

DEFAULT_ADAPTER = "seq_bn[reduction_factor=16]"
OUTPUT_HELP = "Folder for the adapter, the checkpoints and the record of the run."
NAME_HELP = "Name of the adapter. [default: adapter]"
MODEL_HELP = "`demo`, a folder, or the Hub id of a model for images. A new run needs it."


@configured(data_options=DataConfig, recipe_options=Recipe)
def train(
    *,
    output: Annotated[Path, typer.Option(help=OUTPUT_HELP, metavar="FOLDER", show_default=False)],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default=False)] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help=f"{CONFIG_HELP} [default: {DEFAULT_ADAPTER}]", metavar="CONFIG", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help=NAME_HELP, show_default=False)] = None,
    head_only: Annotated[bool, typer.Option("--head-only", help="Train the task head alone, for comparison.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train the whole model, for comparison.")] = False,
    allow_unsound: Annotated[
        bool, typer.Option("--allow-unsound", help="Train a configuration that loses the pre-trained function.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Train with this many seeds; report mean and standard deviation.", min=1)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder; its options are remembered.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the output folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record of the run as JSON.")] = False,
    data_options: dict[str, Any],
    recipe_options: dict[str, Any],
) -> None:
    """Train an adapter that classifies images, and write it to a folder with all that is needed to use it.

    Started by `accelerate launch` or `torchrun` with several processes, it computes the same.
    """
    given = {
        "model": model,
        "adapter": adapter,
        "name": name,
        "trains": _trains(head_only=head_only, full=full),
        "unsound": "allow" if allow_unsound else None,
        "seeds": seeds,
    }
    try:
        request = _request(
            {key: value for key, value in given.items() if value is not None},
            output,
            resume=resume,
            quiet=quiet or json,
        )
        data = {**request["data"], **data_options}
        missing = [
            flag for key, place, flag in (("model", request, "--model"), ("data", data, "--data")) if key not in place
        ]
        if missing:
            raise lacking("A new run has a model and data", missing[0])
        request["data"] = made_from(DataConfig, data)
        request["recipe"] = made_from(Recipe, {**request["recipe"], **recipe_options})
        record = _run(request, output, resume=resume, overwrite=overwrite, is_quiet=quiet or json)
    except InarchError as error:
        if not _is_main():
            raise typer.Exit(ERROR) from None  # one process says what all of them met
        message = in_options(str(error), Recipe, DataConfig)
        raise type(error)(message.replace('pass `unsound="allow"` to `add`', "pass `--allow-unsound`")) from error
    except KeyboardInterrupt:
        if _is_main():
            note(_how_to_go_on(output))
        raise
    if _is_main():
        say_json(record.to_dict()) if json else _say_result(record, output)
    runs = record.runs if isinstance(record, SeedsRecord) else (record,)
    if any(run.status in ("diverged", "stopped") for run in runs):
        raise typer.Exit(ERROR)


_TOLD = {
    "finished": "This run is finished: nothing is left to train.",
    "stopped": "This run was ended by its monitor. With `--no-stop-early` it goes on.",
}
"""What is said of a run that there is nothing to go on with, by its status."""


def _trains(*, head_only: bool, full: bool) -> str | None:
    if head_only and full:
        raise ConfigError("`--head-only` and `--full` exclude each other; got both. Leave one out.")
    return "head" if head_only else "full" if full else None


def _request(given: dict[str, Any], output: Path, *, resume: bool, quiet: bool) -> dict[str, Any]:
    """What to train: as given or, for a resumed run, as remembered where nothing else is given."""
    request: dict[str, Any] = {"trains": "adapter", "name": "adapter", "unsound": "refuse", "data": {}, "recipe": {}}
    if resume:
        record = RunFolder(output).resumable()
        if not quiet and _is_main():
            request["told"] = _TOLD.get(record.status, "")
        if isinstance(record.job.get("data"), dict) and "object" in record.job["data"]:
            raise ConfigError(
                f"A run on data that were made in Python is resumed there; got `{output}`. Call "
                "`inarch.train.run.train_run` with `resume=True`."
            )
        request |= record.job
    request |= given
    if request["trains"] != "adapter" and "adapter" in given:
        raise ConfigError(
            f"`--adapter` is for training an adapter; got `{given['adapter']}` with `--{request['trains']}"
            f"{'-only' if request['trains'] == 'head' else ''}`. Leave one of them out."
        )
    if request["trains"] == "adapter":
        request["adapter"] = request.get("adapter") or DEFAULT_ADAPTER
    else:
        request["adapter"] = None
    return request


def _run(request: dict[str, Any], output: Path, *, resume: bool, overwrite: bool, is_quiet: bool) -> Any:
    with importing():
        from ..train.run import train_run, train_seeds

    num_seeds, told = request.pop("seeds", None) or 1, request.pop("told", "")
    options = {
        **request,
        "output": output,
        "resume": resume,
        "overwrite": overwrite,
        "command": ("inarch", *sys.argv[1:]),
    }
    with ExitStack() as stack:
        callbacks = [] if is_quiet or not _is_main() else [_shown(num_seeds, stack)]
        if num_seeds > 1:
            found: Any = train_seeds(**options, num_seeds=num_seeds, callbacks=callbacks)
        else:
            found = train_run(**options, callbacks=callbacks)
    if told and found.status in _TOLD:  # not before: with other options it is no run to go on with
        note(told)
    return found


def _is_main() -> bool:
    """Whether this process is the one that prints."""
    import os

    return os.environ.get("RANK", "0") == "0"


def _how_to_go_on(output: Path) -> str:
    from ..train.resume import latest

    places = [output / "checkpoints", *(folder / "checkpoints" for folder in sorted(output.glob("seed-*")))]
    if any(latest(place) for place in places):
        return f"The newest checkpoint is kept. Go on with `inarch train --output {output} --resume`."
    if (output / "run.json").is_file():
        return f"There is no checkpoint yet. Start again with `inarch train --output {output} --resume`."
    return "Nothing was written."


def _shown(num_seeds: int, stack: ExitStack) -> "TrainerCallback":
    """What shows how a training goes: the verdict before it, a line for each epoch, and on a terminal a bar.

    However the training ends, `stack` takes the bar away: it hides the cursor.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text
    from transformers import TrainerCallback

    from ..check import Training
    from ..handle import attached
    from ..train.callbacks import epochs_of

    class Shown(TrainerCallback):
        """Prints what happens: the verdict as a result, the rest beside the results."""

        def __init__(self) -> None:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            console = err()
            self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
            self.task = self.bar.add_task("training", total=None)
            self.is_first = True
            self.data: Data | None = None

        def say(self, text: str) -> None:
            self.bar.console.print(Text(text))  # above the bar

        def on_known(self, data: "Data") -> None:
            self.data = data

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            handle = attached(rest["model"])
            if self.is_first:
                say(_data_line(rest["model"], rest["train_dataloader"]))
            if handle is not None and self.is_first:
                # What a batch shows of the initial weights says nothing of a run that goes on.
                training = Training(learning_rate=args.learning_rate)
                say_report(handle.check(training=training, data=self.data, measure=state.global_step == 0))
            self.is_first = False
            if num_seeds > 1:
                self.say(f"seed {args.seed}")
            self.bar.reset(self.task, total=state.max_steps, completed=state.global_step)
            self.bar.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.bar.update(self.task, completed=state.global_step)

        def on_verdict(self, monitor: Any) -> None:
            self.say(str(monitor))

        def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            logs = rest.get("logs") or {}
            is_last_of_epoch = any(key.startswith("eval_") for key in logs) or args.eval_strategy == "no"
            if is_last_of_epoch and "train_runtime" not in logs:
                self.say(_epoch_line(epochs_of(state.log_history)[-1]))

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.bar.stop()

    shown = Shown()
    stack.callback(shown.bar.stop)
    return shown


def _data_line(model: Any, train: Any) -> str:
    """What was understood of the data: how many images, which labels, and whether an image may have several."""
    labels = _labels(model)
    shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
    several = ", several an image" if model.config.problem_type == "multi_label_classification" else ""
    return f"{counted(len(train.dataset), 'image')} to train on; {counted(len(labels), 'label')}{several}: {shown}"


def _labels(model: Any) -> list[str]:
    return [str(label) for label in model.config.id2label.values()]


def _epoch_line(epoch: EpochRecord) -> str:
    words = [f"epoch {epoch.epoch:.3g}"]
    words += [f"train loss {epoch.train_loss:.4f}"] if epoch.train_loss is not None else []
    words += [f"{key.replace('_', ' ')} {value:.4f}" for key, value in epoch.metrics.items() if value is not None]
    return "  ".join(words)


def _say_result(record: RunRecord | SeedsRecord, output: Path) -> None:
    if isinstance(record, SeedsRecord):
        rows = [(key, f"{value:.4f}", f"{record.std.get(key, 0):.4f}") for key, value in record.mean.items()]
        say_table(("result", "mean", "standard deviation"), rows)
        say(f"{record.num_seeds} runs in {output}")
        return
    if record.status == "diverged":
        fail(
            f"The loss of a training must stay a number; got none in `{output}`. Start it again with a smaller "
            "`--learning-rate`."
        )
        return
    if record.status == "stopped":
        fail(
            f"A training with `--stop-early` must learn; got {record.monitor}, in `{output}`. Mend that and start "
            f"again, or go on with `inarch train --output {output} --resume --no-stop-early`."
        )
        return
    best = f" at epoch {record.best_epoch:.3g}" if record.best_epoch is not None else ""
    words = [f"{key.replace('_', ' ')} {value:.4f}" for key, value in record.results.items() if value is not None]
    say(f"{', '.join(words)}{best}", style="bold")
    what = f"adapter in {output / 'adapter'}" if record.adapter else f"model in {output / 'model'}"
    say(f"{record.model['trainable']:,} of {record.model['parameters']:,} parameters trained; {what}")
