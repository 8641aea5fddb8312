"""Makes `tests/fixtures/adapters_surface.json`: the public names of the library `adapters`, with what each takes.

It runs with that library (adapters 1.3.0, transformers 4.57), in an environment of its own:

    python scripts/adapters_surface.py
"""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import adapters
from adapters.models.bert.mixin_bert import BertModelAdaptersMixin

TARGET = Path(__file__).parent.parent / "tests" / "fixtures" / "adapters_surface.json"
MODULES = ("composition", "configuration", "context", "heads", "trainer", "training")
FUNCTIONS = ("init", "load_model", "AdapterSetup", "setup_adapter_training", "parse_composition")


def own_names(module: Any) -> list[str]:
    """What a module of the library defines, or brings from another one of it."""
    found = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    return sorted(
        name
        for name, value in found.items()
        if not inspect.ismodule(value)
        and "." not in name
        and str(getattr(value, "__module__", "adapters")).startswith("adapters")
    )


def takes(function: Any) -> dict[str, Any]:
    """What a function takes by name, with its defaults; one without a default has `...`."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name: "..." if parameter.default is parameter.empty else plain(parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind not in kinds
    }


def plain(value: Any) -> Any:
    """A default as JSON data."""
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


def fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration class, with the values of an instance made without arguments where there is one."""
    try:
        made = config()
    except TypeError:
        made = None
    found = {field.name: getattr(made, field.name, "...") for field in dataclasses.fields(config)}
    return {name: plain(value) for name, value in found.items()}


def methods(*kinds: type) -> tuple[dict[str, Any], list[str]]:
    """The methods of models, and the properties, that the library brings."""
    calls, properties = {}, []
    for kind in kinds:
        for name in dir(kind):
            owner = next(base for base in kind.__mro__ if name in vars(base))
            found = inspect.getattr_static(kind, name)
            if name.startswith("_") or not owner.__module__.startswith("adapters"):
                continue
            found = getattr(found, "__func__", found)
            if inspect.isfunction(found):
                calls[name] = takes(found)
            else:
                properties.append(name)
    return calls, sorted(set(properties))


def main() -> None:
    """Write the list."""
    calls, properties = methods(adapters.BertAdapterModel, BertModelAdaptersMixin)
    exports = own_names(adapters)
    data = {
        "version": "1.3.0",
        "exports": exports,
        "modules": {name: own_names(importlib.import_module(f"adapters.{name}")) for name in MODULES},
        "functions": {name: takes(getattr(adapters, name)) for name in FUNCTIONS},
        "heads": {name: takes(getattr(adapters, name)) for name in exports if name.endswith("Head")},
        "configurations": {
            name: fields(found)
            for name in exports
            if name.endswith("Config") and dataclasses.is_dataclass(found := getattr(adapters, name))
        },
        "trainer": list(takes(adapters.AdapterTrainer)),
        "arguments": {field.name: plain(field.default) for field in dataclasses.fields(adapters.AdapterArguments)},
        "methods": dict(sorted(calls.items())),
        "properties": properties,
    }
    TARGET.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
