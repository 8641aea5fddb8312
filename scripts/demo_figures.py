"""The figures that both readmes tell of the demonstration: `docs/demo.json`, from the demonstration itself.

    .venv/bin/python scripts/demo_figures.py

It is run as `make demo` runs it, and once more with four times the epochs; minutes on one core. A test compares the
readmes with the file, and with `INARCH_FULL_DEMO_TEST=1` the file with a demonstration that is run anew.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from inarch.train.demo import RECIPE, WAYS, run_demo
from inarch.train.recipe import Recipe

FIGURES = Path(__file__).parent.parent / "docs" / "demo.json"
LONGER = RECIPE.replace(epochs=4 * RECIPE.epochs)
KEPT = ("configuration", "sound", "formulas", "accuracy", "best_accuracy", "trainable_parameters", "seeds")


def main() -> None:
    """Write the file."""
    found = {"short": figures(RECIPE), "longer": figures(LONGER)}
    FIGURES.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def figures(recipe: Recipe) -> dict[str, Any]:
    """What a demonstration with this recipe finds, without what depends on the machine's speed."""
    with tempfile.TemporaryDirectory(prefix="inarch-") as folder:
        result = run_demo(Path(folder) / "demo", recipe=recipe).to_dict()
    ways = {way.key: {key: result[way.key][key] for key in KEPT} for way in WAYS}
    return {"recipe": recipe.to_dict(), **ways, **{key: result[key] for key in ("adapter_bytes", "data", "versions")}}


if __name__ == "__main__":
    main()
