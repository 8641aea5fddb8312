"""Writes `docs/migrate.md` from `inarch.compat`: `python scripts/docs_migrate.py`."""

from pathlib import Path

from inarch.compat import METHODS
from inarch.compat.configuration import PRESETS
from inarch.compat.models import AdapterSetup, AutoAdapterModel, init, load_model

PAGE = Path(__file__).parent.parent / "docs" / "migrate.md"
HEAD = """# From the library `adapters`

Replace `import adapters` by `import inarch.compat as adapters`, and `adapters.composition` by
`inarch.compat.composition`; programs that call what is listed below run as they are, on any Transformer and without
forked classes. Or call inarch itself: `adapters = inarch.attach(model)` is the handle whose calls stand on the right.
(This page is written by `scripts/docs_migrate.py`.)

What differs:

* A configuration that loses the pre-trained function is refused when it is added, with what to change.
* The head of a task class (`AutoModelForSequenceClassification`) is trained as it is; a flexible head is added to a
  base model (`AutoAdapterModel`), or beside it.
* `model.active_adapters = setup` holds from the next forward on. Where a setup copies or cuts the batch (`Parallel`,
  `BatchSplit`, `MultiTask`), use `model.set_active_adapters(setup)`.
* Folders are written in the format of inarch, `adapter.safetensors` and `inarch.json`, and read in both;
  `inarch convert` writes those of `adapters`.
* Fusion layers of `Fuse("a", "b")` are named `a+b`, not `a,b`.
* `AdapterTrainer` adds the regularisation of fusion layers and refuses a model with nothing to train, or a base that is
  not frozen.
* In data for dependency parsing negative numbers are padding, whatever the `pad_token_id` is.
"""


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """A table of two columns."""
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {left} | {right} |" for left, right in rows)]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    calls = [(f"`model.{name}(...)`", told.replace("|", "\\|")) for name, told in METHODS.items()]
    other = [
        (f"`adapters.{name}`", str(found.__doc__).splitlines()[0])
        for name, found in (
            ("init(model)", init),
            ("load_model(name, class)", load_model),
            ("AutoAdapterModel", AutoAdapterModel),
            ("AdapterSetup(setup)", AdapterSetup),
        )
    ]
    other += [("`adapters.AdapterTrainer`", "`inarch.AdapterTrainer`"), ("`adapters.ConfigUnion(a, b)`", '`"a\\|b"`')]
    configs = [(f"`adapters.{name}(...)`", f'`"{preset}[...]"`') for name, preset in PRESETS.items()]
    parts = [
        HEAD,
        "## Calls on a model\n",
        table(("`adapters`", "inarch"), calls) + "\n",
        "## Other names\n",
        table(("`adapters`", "inarch"), other) + "\n",
        "## Configurations\n",
        table(("`adapters`", "inarch"), configs),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
