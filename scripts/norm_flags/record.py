"""The record of a study, kept as JSON after every training, so that one that was stopped goes on."""

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .subjects import ROOT
from .trials import Judgement, Outcome, Trial

FOLDER = ROOT / "docs" / "norm-flags"


@dataclass(slots=True)
class Record:
    """What was proved, and what came of the trainings."""

    path: Path
    judgements: list[Judgement] = field(default_factory=list)
    outcomes: dict[Trial, Outcome] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, folder: Path = FOLDER) -> "Record":
        """The record of a study, empty where there is none."""
        path = folder / f"{name}.json"
        if not path.exists():
            return cls(path)
        data = json.loads(path.read_text(encoding="utf-8"))
        judgements = [Judgement(**{**row, "fixes": tuple(row["fixes"])}) for row in data["judgements"]]
        outcomes = [Outcome.from_dict(row) for row in data["outcomes"]]
        return cls(path, judgements, {one.trial: one for one in outcomes}, data["versions"])

    def write(self) -> None:
        """Write the record in the place of an earlier one."""
        self.versions = {"python": platform.python_version()} | {
            name: version(name) for name in ("torch", "transformers", "numpy")
        }
        rows: dict[str, list[dict[str, Any]]] = {
            "judgements": [asdict(one) for one in self.judgements],
            "outcomes": [one.to_dict() for one in self.outcomes.values()],
        }
        # a line for each row: short, and small where it changes
        lists = ",\n".join(
            f' "{key}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in found) + "\n ]"
            for key, found in rows.items()
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        draft.write_text(f'{{\n "versions": {json.dumps(self.versions)},\n{lists}\n}}\n', encoding="utf-8")
        draft.replace(self.path)
