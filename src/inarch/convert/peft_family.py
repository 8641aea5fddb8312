"""Whether a PEFT folder says that its adapter was made for a model of another type.

It says so in two places, where it does at all:

    auto_mapping    the class of the base and the file that defines it, for adapters without a task. The model must have
                    that class, or another one of that file, among its modules: BERT with another head, or a text tower.
    module paths    often begin with what transformers calls the base model in a model with a head, `bert.encoder...`.
                    One that begins with the name of a model type that this model is not is one of another type.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .consent import consent
from .peft_source import Source


def check_family(source: Source, adapted: Iterable[str]) -> str:
    """How an adapter was made for another model type, as far as anything says so; empty for none.

    Arguments: `adapted` are the module paths of the folder.

    Raises `StateError` where that is to be refused.
    """
    record, model = source.record, source.model
    made_for: Mapping[str, Any] = record.get("auto_mapping") or {}
    name, library = (str(made_for.get(key) or "") for key in ("base_model_class", "parent_library"))
    foreign = next((path for path in adapted if path not in source.names.paths and _is_foreign(path, model)), "")
    if name and not _has(model, name, library):
        difference = f"`{name}`"
    elif foreign:
        difference = f"modules such as `{foreign}`"
    else:
        return ""
    text = (
        f"the model that an adapter was made for must be of the same type; got {difference} at `{source.folder}` and "
        f"{type(model).__name__}"
    )
    remedy = f"Load the base model `{record.get('base_model_name_or_path')}`"
    return consent(text, remedy, source.folder, source.other_base)


def _has(model: nn.Module, name: str, library: str) -> bool:
    """Whether a model has a module of a class, or of another one of the file that defines it."""
    file = library.rpartition(".")[2]  # a later release, or another copy of it, may have the file elsewhere
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return any(kind.__name__ == name or kind.__module__.rpartition(".")[2] == file for kind in kinds)


def _is_foreign(path: str, model: nn.Module) -> bool:
    """Whether a path begins with the name of a model type that is neither the model's nor in a path of its modules."""
    from transformers import CONFIG_MAPPING

    word = path.partition(".")[0]
    own = {str(getattr(model, "base_model_prefix", "")), str(getattr(getattr(model, "config", None), "model_type", ""))}
    own |= {part for name, _ in model.named_modules() for part in name.split(".")}
    types = {kind.replace("-", "_") for kind in CONFIG_MAPPING}
    return word in types and word not in {name.replace("-", "_") for name in own}
