"""The classes, configurations and models of the zoo."""

from typing import Any

import torch
from torch import nn

from inarch.testing import perturb

from .exceptions import CONFIGS
from .shrink import tiny_overrides

MOST_PARAMETERS = 60_000_000


def model_types() -> list[str]:
    """Every type of the installed transformers' `AutoModel`."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return list(MODEL_MAPPING_NAMES)


def model_class(model_type: str) -> Any:
    """The class that `AutoModel` takes for a type; the first where it takes several."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    found = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    return found[0] if isinstance(found, tuple) else found


def default_config(model_type: str) -> Any:
    """The configuration without any argument: mostly that of a released model, full size."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]()


def tiny_config(model_type: str) -> Any:
    """The default configuration, shrunk by the rules and by what is known of the type."""
    default = default_config(model_type)
    overrides = tiny_overrides(default)
    for key, value in CONFIGS.get(model_type, {}).items():
        *path, last = key.split(".")
        target: Any = overrides
        part = default
        for name in path:
            part = getattr(part, name)
            if name not in _settings(target):
                _put(target, name, part)
            target = _get(target, name)
        _put(target, last, value)
    return type(default)(**overrides)


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


def _settings(target: Any) -> Any:
    return target if isinstance(target, dict) else vars(target)


def _get(target: Any, name: str) -> Any:
    return target[name] if isinstance(target, dict) else getattr(target, name)


def _put(target: Any, name: str, value: Any) -> None:
    if isinstance(target, dict):
        target[name] = value
    else:
        setattr(target, name, value)
