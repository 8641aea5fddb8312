"""The classes, configurations and models of the zoo."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from inarch.testing import perturb

from .exceptions import CLASSES, COMPLETE, CONFIGS
from .shrink import tiny_overrides

MOST_PARAMETERS = 400_000_000


def model_types() -> list[str]:
    """Every type of the installed transformers' `AutoModel`."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return list(MODEL_MAPPING_NAMES)


def model_class(model_type: str) -> Any:
    """The class that `AutoModel` takes for a type; the first where it takes several."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    if model_type in CLASSES:
        return getattr(transformers, CLASSES[model_type])
    found = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    return found[0] if isinstance(found, tuple) else found


def default_config(model_type: str) -> Any:
    """The configuration without any argument: mostly that of a released model, full size."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return _with(kind(), {}, COMPLETE.get(model_type, {}))


def tiny_config(model_type: str) -> Any:
    """The default configuration, shrunk by the rules and by what is known of the type."""
    default = default_config(model_type)
    return _with(default, tiny_overrides(default), CONFIGS.get(model_type, {}))


def _with(config: Any, overrides: dict[str, Any], settings: Mapping[str, Any]) -> Any:
    """A configuration of the same class with `overrides`, in whose parts single settings are changed as well."""
    if not overrides and not settings:
        return config
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in settings.items():
        name, _, rest = key.partition(".")
        if rest:
            parts[name][rest] = value
        else:
            overrides[name] = value
    for name, inner in parts.items():
        part = overrides.get(name) or getattr(config, name)
        overrides[name] = _with(part, _own_settings(part), inner)
    return type(config)(**overrides)


def _own_settings(config: Any) -> dict[str, Any]:
    """What a configuration was made with, as far as it differs from its class."""
    usual = vars(type(config)())
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_") and name in usual and value != usual[name] and not hasattr(value, "to_dict")
    } | {name: value for name, value in vars(config).items() if hasattr(value, "to_dict")}


def tiny_model(model_type: str, seed: int = 0) -> nn.Module:
    """A tiny random model in eval mode, all of whose parameters are off their initial ones and zeros."""
    config = tiny_config(model_type)
    chosen = model_class(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = chosen(config).eval()
        count = sum(parameter.numel() for parameter in model.parameters())
        if count > MOST_PARAMETERS:
            raise ValueError(f"a tiny model has at most {MOST_PARAMETERS:,} parameters; got {count:,}")
        perturb(model)
    return model
