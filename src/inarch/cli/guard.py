"""What surrounds every command: exceptions become messages, warnings become notes."""

import atexit
import errno
import functools
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import typer

from ..core.errors import InarchError
from ..core.interrupt import INTERRUPTED
from .output import fail, note

ERROR, USAGE = 1, 2

_OPTIONS = {
    f"`{name}`": f"`--{name.replace('_', '-')}`"
    for name in (
        "batch_size",
        "device",
        "image_column",
        "label_column",
        "num_train",
        "skip_bad",
        "subset",
        "validation",
    )
} | {
    "`labels=`": "`--labels`",
    '`unsound="allow"` to `add`': "`--allow-unsound`",
    '`other_base="allow"`': "`--other-base`",
    "`head=False`": "`--no-head`",
    "`inarch.attach(model, layout={...})`": "`--layout FILE`",
}
"""What messages call an argument, and its option."""

_shown = False
_own: frozenset[str] = frozenset(_OPTIONS.values())
"""The options of the command that runs: what it has no option for keeps its name."""


def show_tracebacks(shown: bool) -> None:
    """Whether the commands that follow let their exceptions through."""
    global _shown  # noqa: PLW0603  one process runs one command
    _shown = shown


def prepare_streams() -> None:
    """Let every text be written: to a stream that is closed, and where its encoding has no form for a file's name."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115  it stays open as long as the process
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115  the same
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def share_cores() -> None:
    """Let threads that wait for others give up their core, unless the user has chosen.

    OpenMP's threads spin while they wait. Where other programs want the cores too, the thread that is waited for gets
    none, and a training on two threads takes several times as long as on one. Torch reads this when it is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def guarded(command: Callable[..., None], failure: int = ERROR) -> Callable[..., None]:
    """The command, with every exception turned into a message and the exit code `failure`."""
    taken = inspect.signature(command).parameters

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        global _own  # noqa: PLW0603  as above
        _own = frozenset(option for option in _OPTIONS.values() if _parameter(option) in taken)
        with _settled():
            try:
                command(*args, **options)
                sys.stdout.flush()  # now, because a closed pipe could not be reported later
            except KeyboardInterrupt:
                note("Interrupted.")
                raise typer.Exit(INTERRUPTED) from None
            except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
                raise  # the first three are typer's to report; of the last nobody is there to hear
            except Exception as error:  # whatever it is, a user is told in words
                if _shown:
                    raise
                _stop(failure, describe(error))

    return run


def _parameter(option: str) -> str:
    """The parameter of a command whose option is named in a message."""
    return option.strip("`").split()[0].removeprefix("--").removeprefix("no-").replace("-", "_")


@contextmanager
def loading() -> Iterator[None]:
    """Around what is no command: importing one, which fails where a package is missing, and writing the help."""
    try:
        yield
    except (InarchError, ImportError, OSError) as error:
        if _shown:
            raise
        fail(describe(error))
        sys.exit(ERROR)


def leave(code: object) -> None:
    """Where processes train together: leave without taking the interpreter down, once everything is written.

    gloo's threads give back the tensors of the last exchange in their own time. One that comes when the interpreter is
    half gone aborts the process (seen in 3 % of runs with torch 2.13), and a finished training would count as failed.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    atexit._run_exitfuncs()  # noqa: SLF001  the interpreter would call it next
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


NEEDED = {
    "--model": "Give `demo`, a folder, or the Hub id of a model for images.",
    "--data": "Give `digits`, a folder of images by class, a CSV of labels, a CIFAR archive, or the id of a data set.",
    "--vary": "Give a field and its values, as in `--vary reduction_factor=4,16,64`, or `--study norm-flags`.",
}
"""What to give for an option that a command cannot do without."""


class Misused(typer.BadParameter):
    """A command asked for in a way that means nothing: told with the usage, in our words alone."""

    def format_message(self) -> str:
        return self.message


def lacking(what: str, option: str) -> Misused:
    """What is said of a command that was not given an option of `NEEDED`."""
    return Misused(f"{what}; got no `{option}`. {NEEDED[option]}")


def _stop(code: int, message: str) -> NoReturn:
    fail(message)
    raise typer.Exit(code) from None


def describe(error: Exception) -> str:
    """What to tell the user of an exception."""
    if isinstance(error, InarchError):
        return in_options(str(error))
    if isinstance(error, OSError):
        return _describe_system(error)
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "_ArrayMemoryError"):
        return f"The work must fit in memory; got `{_first_line(error)}`. Give a smaller `--batch-size`."
    return (
        "Nothing should fail without an explanation, but this did; got "
        f"`{type(error).__name__}: {_first_line(error)}`. Run it again with `--debug` to see where, and report it."
    )


def in_options(message: str) -> str:
    """A message of the library in the words of the command line: `--skip-bad` for `skip_bad`."""
    told, *names = re.split(r"(?= (?:Known|Did you mean):? `)", message, maxsplit=1)  # which name what was written
    for words, option in _OPTIONS.items():
        told = told.replace(words, option) if option in _own else told
    return "".join((told, *names))


def _describe_system(error: OSError) -> str:
    place = f" at `{os.fspath(error.filename)}`" if error.filename is not None else ""
    reason = f"`{error.strerror or _first_line(error)}`"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"The disk must have room for what is written; got {reason}{place}. Free some, or write elsewhere."
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"Files must be yours to read and write; got {reason}{place}. Change the permissions or the place."
        case _:
            return f"Files must be where they are said to be; got {reason}{place}. Correct the path and try again."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Notes(logging.Handler):
    """Passes the package's warnings on to the user."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"Warning: {in_options(record.getMessage())}", style="yellow")


@contextmanager
def _settled() -> Iterator[None]:
    """The package's own warnings go to standard error; those of other libraries nowhere: a user cannot mend them."""
    logger, handler = logging.getLogger("inarch"), _Notes(logging.WARNING)
    before = logger.propagate
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    if not _shown:  # it tells of every attempt to connect
        hub.setLevel(logging.ERROR)
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # where it is loaded later and sets its level itself
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            if not (sys.warnoptions or _shown):
                warnings.simplefilter("ignore")
            yield
    finally:
        hub.setLevel(hub_level)
        logger.removeHandler(handler)
        logger.propagate = before
