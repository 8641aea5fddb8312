"""The command line.

Every command lives in a file of its own, which is imported when it is called: `inarch --help` is quick, and
`inarch probe` needs nothing that only training needs.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..core.interrupt import importing
from ..version import __version__
from .guard import ERROR, guarded, leave, loading, prepare_streams, share_cores, show_tracebacks

COMMANDS = {
    "probe": ("probe", "Find where adapters can go in a model."),
    "check": ("check", "Prove that an adapter keeps the pre-trained function."),
    "train": ("train", "Train an adapter on labelled images."),
    "sweep": ("sweep", "Try configurations of an adapter, and say which is best."),
    "predict": ("predict", "Predict what images show."),
    "eval": ("evaluate", "Compare predictions with the labels of images."),
    "report": ("report", "Write a page about runs, to open in a browser."),
    "convert": ("convert", "Write an adapter in the format of another library."),
    "demo": ("demo", "See it all at work in a minute."),
}
"""By name: the module of this folder with the function of the same name, and what it does in a line."""


class _Commands(TyperGroup):
    """All commands, loaded on use."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name in COMMANDS else command, rest


def _load(name: str) -> Any:
    module = COMMANDS[name][0]
    with loading(), importing():
        loaded = importlib.import_module(f".{module}", __package__)
    single = typer.Typer(**_STYLE)
    single.command(name)(guarded(getattr(loaded, module), getattr(loaded, "FAILURE", ERROR)))
    command = typer.main.get_command(single)
    command.name = name
    return command


_STYLE: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # with markup, help lines would lose the brackets of `seq_bn[reduction_factor=8]`
    "context_settings": {"help_option_names": ["--help", "-h"]},
}

app = typer.Typer(
    name="inarch",
    cls=_Commands,
    help="Graft trainable adapters onto any unmodified PyTorch Transformer.",
    no_args_is_help=True,
    **_STYLE,
)


def _stand_in() -> None:
    """What is listed for a command until it is called."""


for _name, (_, _summary) in COMMANDS.items():
    app.command(_name, help=_summary)(_stand_in)


def _say_version(value: bool) -> None:
    if value:
        typer.echo(f"inarch {__version__}")
        raise typer.Exit


@app.callback()
def settings(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001  its callback reads it
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and stop.")
    ] = False,
) -> None:
    """What holds for every command."""
    show_tracebacks(debug)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code. `--debug` may stand anywhere before a `--`."""
    prepare_streams()
    share_cores()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    if "--debug" in options:
        words.remove("--debug")
        words.insert(0, "--debug")
    try:
        with loading():  # what writes the help may find no room
            app(words, prog_name="inarch")
    except SystemExit as left:
        leave(left.code)
        raise
