"""What is said of a place where nothing is: what may have been meant, and why the Hub has not got it either."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path


def nearest_place(text: str, names: Iterable[str] = (), *, fits: Callable[[Path], bool] = Path.exists) -> str:
    """A hint for what was meant by the path of nothing: a known name or what lies here, closest to it; else empty.

    Arguments: `fits` says whether a place can have been meant.
    """
    missing = Path(text).expanduser()
    rest: list[str] = []
    try:
        if missing.exists():
            return ""
        close = difflib.get_close_matches(text[:100], sorted(names), n=1, cutoff=0.6)
        if close:
            return f"Did you mean `{close[0]}`?"
        while not missing.parent.is_dir() and missing != missing.parent:
            rest.insert(0, missing.name)
            missing = missing.parent
        entries = sorted(entry.name for entry in missing.parent.iterdir())
        close = difflib.get_close_matches(missing.name[:100], entries, n=3, cutoff=0.6)
        whole = (missing.parent.joinpath(name, *rest) for name in close)
        found = next((place for place in whole if place.exists() and fits(place)), None)
    except (OSError, ValueError):  # not to be read, or no path at all
        return ""
    return f"Did you mean `{found}`?" if found is not None else ""


def is_model(place: Path) -> bool:
    """Whether a folder can be that of a model."""
    return (place / "config.json").is_file()


_FAULTS = (
    ({"GatedRepoError"}, "the Hub gives it only to those who asked for it there"),
    ({"RepositoryNotFoundError", "DatasetNotFoundError"}, "the Hub has none of that name, or keeps it private"),
    ({"RevisionNotFoundError"}, "the Hub has none of that revision"),
    (
        {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ConnectTimeout"},
        "the Hub could not be reached for it, nor has the local cache any of that name",
    ),
)
"""By the classes of its client's errors, why the Hub did not give something."""


def absent(error: BaseException) -> str:
    """What is said of a name that stands for no place here, and for which the Hub's client raised an error."""
    return f"no such folder is here, and {_fault(error)}"


def _fault(error: BaseException) -> str:
    raised: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        raised |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    return next((words for kinds, words in _FAULTS if kinds & raised), f"the Hub gave none: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path."""
    return name.startswith((".", "/", "~"))


def no_model(name: str, error: BaseException | None = None, *, types: Iterable[str] = ()) -> str:
    """What is said of a name that stands for no model.

    Arguments: `error` is what the library raised, if it was asked; `types` are what may be named instead.
    """
    known = sorted(types)
    kinds = "a folder with a `config.json`, " + ("a model type such as `vit`, " if known else "")
    advice = "Give the folder that `save_pretrained` wrote."
    if _exists(name):
        fault = "a file" if error is None else first_line(error)
    else:
        fault = "no such folder is here" if error is None else absent(error)
        hint = nearest_place(name, () if "/" in name else ["demo", *known], fits=is_model)
        advice = hint or (advice if error is None else "Check the name and the connection.")
    return f"A model is `demo`, {kinds}or the id of a model on the Hub; got `{name}`: {fault}. {advice}"


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, ValueError):
        return False
