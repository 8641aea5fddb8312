"""The layouts that the tiny models had when they were last looked at: a new release of transformers may change them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .describe import differences

FILE = Path(__file__).parent / "layouts.json"


def recorded() -> dict[str, list[str]]:
    """The lines of `describe.lines`, by type."""
    kept: dict[str, list[str]] = _read()["layouts"]
    return kept


def recorded_with() -> str:
    """The release of transformers they were recorded with."""
    return str(_read()["transformers"])


def _read() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data


def changes(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the records of a run say that the file does not, and the other way round; each line names its type."""
    known = recorded()
    found = []
    for model_type, record in sorted(records.items()):
        found += [f"{model_type}: {text}" for text in differences(known.get(model_type, []), _layout(record))]
    return found


def _layout(record: Mapping[str, Any]) -> list[str]:
    """The layout of a record, if its type adapts: what is found of others is known to be wrong or half."""
    return list(record.get("layout", ())) if record["verdict"] == "adapts" else []


def write(records: Mapping[str, Mapping[str, Any]]) -> int:
    """Take the layouts of a run for those to compare with; how many there are."""
    import transformers

    kept = {name: layout for name in sorted(records) if (layout := _layout(records[name]))}
    data = {"transformers": transformers.__version__, "layouts": kept}
    FILE.write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")
    return len(kept)
