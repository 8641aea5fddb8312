"""Writes `docs/migrate.md` from `inarch.compat`: `python scripts/docs_migrate.py`."""

from pathlib import Path

from inarch.compat import METHODS, refused
from inarch.compat.composition import parse_composition
from inarch.compat.configuration import FIXED, PRESETS, RENAMED, UNIONS, AdapterConfig
from inarch.compat.models import AdapterSetup, AutoAdapterModel, init, load_model
from inarch.compat.trainer import AdapterTrainer, Seq2SeqAdapterTrainer
from inarch.compat.training import setup_adapter_training
from inarch.convert.peft_record import OTHER_FIELDS, OTHER_METHODS

PAGE = Path(__file__).parent.parent / "docs" / "migrate.md"
HEAD = """# From the library `adapters`

Replace `import adapters` by `import inarch.compat as adapters`, and `adapters.composition` by
`inarch.compat.composition`; programs that call what is listed below run as they are, on any Transformer and without
forked classes. Or call inarch itself: `adapters = inarch.attach(model)` is the handle whose calls stand on the right.
(This page is written by `scripts/docs_migrate.py`.)

What differs:

* Every public name of adapters 1.3.0, and every argument of its methods, is here or is refused with what to write
  instead (`tests/test_compat_surface.py` compares them with a list made there).
* A configuration that loses the pre-trained function is refused when it is added, with what to change.
* The head of a task class (`AutoModelForSequenceClassification`) is trained as it is; a flexible head is added to a
  base model (`AutoAdapterModel`), or beside it.
* `model.active_adapters = setup` holds from the next forward on. Where a setup copies or cuts the batch (`Parallel`,
  `BatchSplit`, `MultiTask`), use `model.set_active_adapters(setup)`.
* `output_adapter_gating_scores=True` and `output_adapter_fusion_attentions=True` are refused in a forward: call the
  model in `with inarch.attach(model).scores() as scores:`, which has both.
* What several heads return is a sequence of their outputs, as there, and a mapping of `loss` and `logits` alone.
* `model.active_adapters` reads as the active block, and is None where nothing is active. It can be called, as in
  transformers, and so is no instance of `Stack`: `model.adapters_config.active_setup` is the setup itself.
* A list is a `Stack`, and a list in it a `Fuse`, in every call of `inarch.compat`; inarch itself takes names and
  blocks alone.
* An error names what is typed in `adapters` (`overwrite_ok=True`), or a call of `inarch.attach(model)` where there is
  nothing to type.
* Folders are written in the format of inarch, `adapter.safetensors` and `inarch.json`, and read in both;
  `inarch convert` writes those of `adapters`.
* Fusion layers of `Fuse("a", "b")` are named `a+b`, not `a,b`.
* `use_safetensors` chooses nothing: no folder is written with a pickle, and one that is read is not run. The folder
  says what its adapter is, so `config` and `model_name` of `load_adapter` are not needed; `version` is a revision.
* `model.get_adapter(name)` names modules by layer and by the role of their site, `adapter_summary(as_dict=True)` has
  the columns of `adapters.rows()`, and `"vera"` is the preset of the paper (`r=256`, `VeraConfig()` has 8).
* `AdapterSetup` holds for every thread, and for deep copies of a model too.
* After `adapters.detach()` the methods are gone with the adapters.
* `AdapterTrainer` adds the regularisation of fusion layers and refuses a model with nothing to train, or a base that is
  not frozen.
* In data for dependency parsing negative numbers are padding, whatever the `pad_token_id` is.
"""

PEFT = """## Folders of PEFT

`load`, `check` and `convert` read them too, also those made under older module names of transformers: LoRA (with
patterns of ranks and scales, rsLoRA, biases, starts such as PiSSA and OLoRA, and experts by `target_parameters`), DoRA,
VeRA, (IA)³, trained norms, prefixes and prompts; modules that were trained whole (`modules_to_save`) are the head. LoRA
and DoRA are written, by `inarch convert --to peft`. `scripts/peft_table.py` compares what PEFT computes with what is
computed here.

Refused by name: {}; any other `peft_type`; and any setting that this version does not know."""


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
            ("AdapterTrainer", AdapterTrainer),
            ("Seq2SeqAdapterTrainer", Seq2SeqAdapterTrainer),
            ("AdapterConfig.load(config)", AdapterConfig),
            ("setup_adapter_training(model, args, name)", setup_adapter_training),
            ("parse_composition(setup)", parse_composition),
        )
    ]
    other += [("`adapters.ConfigUnion(a, b)`", '`"a\\|b"`')]
    other += [("`adapters.BertAdapterModel`, ...", "`AutoModel` and `inarch.attach`, for one model type")]
    made = {**PRESETS, **{name: preset for name, (preset, _) in UNIONS.items()}}
    configs = [(f"`adapters.{name}(...)`", f'`"{preset.partition("[")[0]}[...]"`') for name, preset in made.items()]
    fields = [
        (f"`{name}({field}=...)`", f"is `{value!r}`. {told}")
        for name, values in FIXED.items()
        for field, (value, told) in values.items()
    ]
    fields += [(f"`{name}({old}=...)`", f"`{new}`") for name, names in RENAMED.items() for old, new in names.items()]
    refusals = [(f"`model.{name}(...)`", told) for name, told in refused.METHODS.items()]
    refusals += [(f"`adapters.{name}`", told) for name, told in refused.NAMES.items()]
    refusals += [(f"the argument `{name}`", told) for name, told in refused.KEYWORDS.items()]
    parts = [
        HEAD,
        "## Calls on a model\n",
        table(("`adapters`", "inarch"), calls) + "\n",
        "## Other names\n",
        table(("`adapters`", "inarch"), other) + "\n",
        "## Configurations\n",
        table(("`adapters`", "inarch"), configs) + "\n",
        "Fields that have one value or another name:\n",
        table(("`adapters`", "inarch"), fields) + "\n",
        "## What is refused\n",
        table(("`adapters`", "instead"), refusals) + "\n",
        PEFT.format(", ".join([*OTHER_METHODS.values(), *OTHER_FIELDS.values()])),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
