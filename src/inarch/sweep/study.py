"""What a study is, as data: what it varies, how it chooses, and when it gives up on a trial."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..core.config import Config, config_class, option, shown
from ..core.errors import ConfigError, nearest
from ..core.places import nearest_place
from ..core.records import STUDY

STUDIES = Path(__file__).parent / "studies"

PARTS = ("study", "recipe", "data", "model")
"""What a study file may hold: fields of `StudyConfig`, of the recipe and of the data, and the name of a model."""


@config_class
class StudyConfig(Config):
    """A study over configurations."""

    vary: Mapping[str, Any] = option(
        help="What is varied: by field of the recipe or of the adapter, a list of values or a range as text."
    )
    adapter: str = option(
        "seq_bn[reduction_factor=16]", "The configuration whose fields are varied: a preset with changes."
    )
    sampler: Literal["grid", "random", "tpe"] = option(
        "grid", "How configurations are chosen: all of them, at random, or from what the trials before them showed."
    )
    trials: int | None = option(None, "How many configurations are tried; a grid tries all.", at_least=1)
    seeds: int = option(1, "Seeds each configuration is trained with, from that of the recipe on.", at_least=1)
    sampler_seed: int = option(0, "Seed of the sampler.", at_least=0, less_than=2**32)
    pruner: Literal["hyperband", "none"] = option(
        "hyperband", "Whether a trial is given up, after an epoch, that is behind others at that epoch."
    )
    pruning_factor: int = option(3, "One in so many trials goes on at each look of the pruner.", at_least=2)
    first_look: int = option(1, "Epochs before the pruner looks at a trial first.", at_least=1)
    check: bool = option(True, "Judge every configuration before it is trained, and refuse what is proved to fail.")
    allow_unsound: bool = option(False, "Train a configuration that loses the pre-trained function, too.")
    reuse: bool = option(
        True, "Take the result of a trial that is proved to compute the same, instead of training it again."
    )

    def problems(self) -> list[str]:
        if (self.trials is None) != (self.sampler == "grid"):
            given, fix = ("none", "Give a number") if self.trials is None else (self.trials, "Leave it out")
            problem = (
                "`StudyConfig.trials` is how many configurations a sampler draws, and a grid draws none; got "
                f"{given} for the sampler `{self.sampler}`. {fix}."
            )
            return [problem]
        return []


def ready_studies() -> list[str]:
    """The names of the studies that come with inarch."""
    return sorted(path.stem for path in STUDIES.glob("*.json"))


def read_study_file(name: str | os.PathLike[str]) -> dict[str, Any]:
    """What a study file asks for, by part: `study`, and where it says so `recipe`, `data` and `model`.

    **Arguments**: `name` is that of a ready study, the path of a JSON file, or a folder that `run_study` wrote.

    Raises `ConfigError` if there is no such study, or it is none.
    """
    path = Path(name).expanduser()
    if str(name) in ready_studies() and not path.exists():
        path = STUDIES / f"{name}.json"
    if path.is_dir():
        path = path / STUDY
    if path.suffix == ".json" and not path.exists():
        raise ConfigError(
            f"A study file must be there; got nothing at `{path}`. "
            f"{nearest_place(str(path)) or 'Give its path, or the name of a ready study.'}"
        )
    if not path.is_file():
        raise ConfigError(
            f"A study is the name of a ready one or a JSON file; got `{name}`. {nearest(str(name), ready_studies())}"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"A study file must be readable JSON; got `{path}`: {error}. Correct the file.") from None
    if isinstance(data, dict) and data.get("kind") == "study":
        data = {key: value for key, value in data.get("job", {}).items() if key in PARTS}
    if not isinstance(data, dict) or not isinstance(data.get("study"), dict):
        raise ConfigError(
            "A study file has the form {'study': {'vary': {...}}, 'recipe': {...}}; got "
            f"{shown(data)} in `{path}`. Give it that form."
        )
    unknown = [key for key in data if key not in PARTS]
    if unknown:
        raise ConfigError(
            f"A study file has the parts {', '.join(f'`{part}`' for part in PARTS)}; got `{unknown[0]}` in `{path}`. "
            f"{nearest(unknown[0], PARTS)}"
        )
    return data
