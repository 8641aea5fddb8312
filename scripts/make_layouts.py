"""Makes the shipped layouts of some model types, from a fresh probe of the default configuration on the meta device.

    .venv/bin/python scripts/make_layouts.py vit bert gpt2
    .venv/bin/python scripts/make_layouts.py --check vit    # compares instead of writing; names what differs
    .venv/bin/python scripts/make_layouts.py --check        # all that are shipped; a minute or two

A record is made from the base model, and holds for every model with a head in which a probe finds the same sites.
"""

import argparse
import json
import sys
from collections.abc import Iterator

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from inarch.core.errors import SiteError
from inarch.core.site import Sites
from inarch.sites import golden, probe_now


def main() -> int:
    """Write a file for each model type, or say what differs from those there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="by default all that are shipped")
    parser.add_argument("--check", action="store_true", help="compare with what is shipped instead of writing it")
    options = parser.parse_args()
    failed = False
    for model_type in options.types or sorted(path.stem for path in golden.FOLDER.glob("*.json")):
        path = golden.file_of(model_type)
        assert path is not None
        if options.check:
            problems = check(golden.read(path), model_type)
            print(f"{model_type}: {'; '.join(problems) or 'as shipped'}")
            failed |= bool(problems)
        else:
            record = make(model_type)
            path.write_text(json.dumps(record.to_dict(), indent=1) + "\n", encoding="utf-8")
            print(f"{path.name}: {len(record.sites)} sites, {', '.join(record.classes)}")
    return int(failed)


def make(model_type: str) -> golden.Record:
    """The record of a model type, of its default configuration."""
    model = on_meta(modeling_auto.MODEL_MAPPING_NAMES[model_type], model_type)
    return golden.make(model, probe_now(model), list(tasks(model_type, type(model).__name__)))


def check(record: golden.Record, model_type: str) -> list[str]:
    """What a fresh probe finds that a record does not say, and the other way round."""
    problems = [f"{name} has changed" for name in record.changed_files()]
    for class_name, (prefix, _) in record.classes.items():
        model = on_meta(class_name, model_type)
        problems += [f"{class_name}: {text}" for text in golden.differences(record.at(prefix), probe_now(model))]
        if not problems and record.fit(model) is None:
            problems.append(f"{class_name}: the record does not fit, although nothing differs")
    return problems


def tasks(model_type: str, base: str) -> Iterator[tuple[nn.Module, Sites]]:
    """Every model with a head that the library knows for a type, with its sites, if a probe can tell them."""
    for class_name in dict.fromkeys(task_classes(model_type)):
        if class_name != base:
            try:
                model = on_meta(class_name, model_type)
                yield model, probe_now(model)
            except (SiteError, ValueError, TypeError, AttributeError) as error:
                print(f"  {class_name}: {str(error)[:120]}", file=sys.stderr)


def task_classes(model_type: str) -> Iterator[str]:
    """The classes that the library's maps from types to models name for a type."""
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
            found = mapping.get(model_type, ())
            yield from (found,) if isinstance(found, str) else found


def on_meta(class_name: str, model_type: str) -> nn.Module:
    """A model without weights, with a configuration of its own: some models change theirs."""
    config = transformers.AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, class_name)(config)
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
