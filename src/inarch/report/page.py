"""The page, from the records to the file: one HTML document with its style, its script and its charts inside.

Every text that comes from a record is escaped by the templates; only the SVG of the charts, which Vega escapes, goes in
as it is.
"""

import json
import os
import re
import shlex
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..core.errors import StateError
from ..core.records import FindingRecord, StudyRecord, TrialRecord, VerdictRecord
from ..version import __version__
from .charts import charts
from .draw import colours, headed, shown, words
from .drawing import grafts
from .entries import Entry, Value, differing

_MARK = '<meta name="generator" content="inarch '
_LEVELS = ("error", "warning", "note")
MAX_FILTERS = 6
_MAX_CHOICES = 12


def write_report(entries: Sequence[Entry], path: str | os.PathLike[str], *, title: str = "") -> Path:
    """Write the page of some runs to a file, in the place of an earlier report.

    Raises `StateError` where there are no runs, where the file is something else, or where it cannot be written.
    """
    target = Path(path)
    if not entries:
        raise StateError(f"A report is of at least one run; got none for `{target}`. Name the folder of a run.")
    if target.is_dir():
        raise StateError(f"A report is written to a file; got the folder `{target}`. Name a file in it.")
    if target.exists() and not is_report(target):
        raise StateError(
            f"A report is written to a new file, or over another report; got `{target}`, which is something else. "
            "Name another file."
        )
    page = render(entries, title=title)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(page, encoding="utf-8", errors="backslashreplace")
        draft.replace(target)
    except OSError as error:
        raise StateError(
            f"The report must be writable; got `{target}`: {error.strerror or error}. Free some space or name another "
            "file."
        ) from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return target


def is_report(path: Path) -> bool:
    """Whether a file is a page of this module."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return _MARK in file.read(1000)
    except OSError:
        return False


def render(entries: Sequence[Entry], *, title: str = "") -> str:
    """The page as text."""
    keys = differing(entries)
    best = max((entry for entry in entries if entry.value is not None), key=lambda entry: entry.rank, default=None)
    environment = Environment(
        loader=PackageLoader("inarch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"colours": colours(entries), "headed": headed, "shown": shown, "words": words}
    environment.globals |= {
        "breakable": _breakable,
        "by_word": _by_word,
        "coded": _coded,
        "duration": _duration,
        "short": _short,
    }
    # The style and the script are the package's own; nothing of a record is in them.
    own = {name: Markup(environment.loader.get_source(environment, name)[0]) for name in ("page.css", "page.js")}  # type: ignore[union-attr]  # noqa: S704
    return environment.get_template("page.html").render(
        title=title or _title(entries),
        version=__version__,
        made=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        css=own["page.css"],
        js=own["page.js"],
        entries=entries,
        best=best,
        keys=keys,
        filters=_filters(entries, keys),
        findings=_findings(entries),
        grafts=grafts(entries),
        # Vega escapes what it writes.
        charts=[(chart, Markup(chart.svg), Markup(chart.full)) for chart in charts(entries)],  # noqa: S704
        environments=_environments(entries),
        again=_again(entries),
        seconds=sum(entry.all_seconds for entry in entries),
        studies=_studies(entries),
    )


def _title(entries: Sequence[Entry]) -> str:
    if len(entries) == 1:
        return f"{entries[0].name}: {entries[0].configuration}"
    known = (entry.first.data if entry.first else entry.study.data if entry.study else {} for entry in entries)
    names = [name for name in dict.fromkeys(str(data.get("name", "")) for data in known) if name]
    kind = "trials" if all(entry.trial is not None for entry in entries) else "runs"
    return f"{len(entries)} {kind}" + (f" on {', '.join(names)}" if 0 < len(names) <= 3 else "")


def _filters(entries: Sequence[Entry], keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The settings that runs can be chosen by, with their values in order."""
    found = []
    for key in keys:
        values = list(dict.fromkeys(entry.settings.get(key) for entry in entries))
        if len(values) <= _MAX_CHOICES:
            found.append((key, [shown(value) for value in sorted(values, key=_in_order)]))
    return found[:MAX_FILTERS]


def _in_order(value: Value) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (not is_number, float(value or 0) if is_number else 0.0, str(value))


def _findings(entries: Sequence[Entry]) -> list[tuple[FindingRecord, list[Entry]]]:
    """Every different finding with the runs that have it, errors first."""
    found: dict[FindingRecord, list[Entry]] = {}
    for entry in entries:
        for finding in _of_verdict(entry.verdict):
            found.setdefault(finding, []).append(entry)
    return sorted(found.items(), key=lambda item: _LEVELS.index(item[0].level) if item[0].level in _LEVELS else 3)


def _of_verdict(verdict: VerdictRecord | None) -> list[FindingRecord]:
    if verdict is None:
        return []
    if verdict.details:
        return list(verdict.details)
    # An older record has each as one line, which begins with its level.
    return [FindingRecord(code="", level=text.partition(" ")[0], place="", message=text) for text in verdict.findings]


def _studies(entries: Sequence[Entry]) -> list[tuple[StudyRecord, list[tuple[str, int]]]]:
    """Every study with the number of its trials by how they ended."""
    found: dict[str, tuple[StudyRecord, Counter[str]]] = {}
    for entry in entries:
        if entry.study is not None:
            found.setdefault(entry.place, (entry.study, Counter()))[1][entry.state] += 1
    return [(study, counts.most_common()) for study, counts in found.values()]


def _again(entries: Sequence[Entry]) -> list[tuple[str, list[tuple[str, list[Entry]]]]]:
    """Every different command, and in it everything different that was asked for with the runs that came of it."""
    found: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        asked = json.dumps(entry.job, indent=2, ensure_ascii=False, default=str)
        found.setdefault(_command(entry), {}).setdefault(asked, []).append(entry)
    return [(command, list(settings.items())) for command, settings in found.items()]


def _environments(entries: Sequence[Entry]) -> list[tuple[list[tuple[str, str]], list[Entry]]]:
    """Every different machine with the runs made on it."""
    found: dict[tuple[tuple[str, str], ...], list[Entry]] = {}
    for entry in entries:
        known = entry.first.environment if entry.first else entry.study.environment if entry.study else {}
        if not known:
            continue
        facts = {key: value for key, value in known.items() if key != "versions"} | dict(known.get("versions", {}))
        found.setdefault(tuple((words(str(key)), shown(value)) for key, value in facts.items()), []).append(entry)
    return [(list(facts), same) for facts, same in found.items()]


def _command(entry: Entry) -> str:
    """The command line as it is typed; empty where the run was started from Python."""
    if isinstance(entry.record, TrialRecord):
        return shlex.join(entry.study.command if entry.study is not None else ())
    return shlex.join(entry.record.command or (entry.first.command if entry.first is not None else ()))


def _short(number: float | None) -> str:
    """A large number in few signs: 1.2 M."""
    if number is None:
        return "unknown"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _coded(text: str) -> Markup:
    """A text with what stands between backticks as code."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # one has no partner
        return escape(text)
    code = Markup("<code>{}</code>")
    return Markup("").join(code.format(piece) if number % 2 else escape(piece) for number, piece in enumerate(pieces))


def _breakable(text: str) -> Markup:
    """A configuration that may be broken after its commas and its bracket, where a line is full."""
    return Markup("<wbr>").join(map(escape, re.split(r"(?<=[,\[|])", text)))


def _by_word(command: str) -> Markup:
    """A command whose options are not broken at their hyphens."""
    word = Markup('<span class="whole">{}</span>')
    return Markup(" ").join(map(word.format, command.split(" ")))
