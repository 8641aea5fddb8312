"""Parameters that several adapters share, as tasks that are trained together do (MTL-LoRA)."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from .attach import methods_in, stored
from .core.errors import SetupError
from .core.site import Sites
from .methods import AdapterConfig, LinearMethod, method_of


def share(model: nn.Module, sites: Sites, names: Sequence[str], configs: Mapping[str, AdapterConfig]) -> None:
    """Let adapters have the shareable parameters of the first. Raises `SetupError` where they cannot."""
    if isinstance(names, str) or not names:
        raise SetupError(
            f"The adapters that share parameters are named in a list; got {names!r} for {sites.model_class}. Write "
            "`share([...])`."
        )
    for name in names:
        if not any(method.shareable for method in _methods(configs[name])):
            raise SetupError(
                f"Adapters share parameters where their method has some for several tasks; got `{name}` "
                f"({configs[name]}). Use `mtl_lora`."
            )
        if configs[name] != configs[names[0]]:
            raise SetupError(
                f"Adapters that share parameters have one configuration; got `{names[0]}` ({configs[names[0]]}) and "
                f"`{name}` ({configs[name]}). Add them alike."
            )
    first = dict(_modules(model, sites, names[0]))
    for name in names[1:]:
        for key, module in _modules(model, sites, name):
            for leaf in module.shareable:
                module.register_parameter(leaf, first[key].get_parameter(leaf))


def unshare(model: nn.Module, sites: Sites, names: Sequence[str]) -> None:
    """Give adapters shareable parameters of their own, of the same values."""
    for name in names:
        for _, module in _modules(model, sites, name):
            for leaf in module.shareable:
                shared = module.get_parameter(leaf)
                with torch.no_grad():
                    module.register_parameter(leaf, nn.Parameter(shared.clone(), shared.requires_grad))


def _methods(config: AdapterConfig) -> Iterator[type[LinearMethod]]:
    for part in config.parts:
        method = method_of(part)
        if issubclass(method, LinearMethod):
            yield method


def _modules(model: nn.Module, sites: Sites, name: str) -> Iterator[tuple[str, LinearMethod]]:
    for site, modules in stored(model, sites, name).items():
        for key, module in methods_in(modules):
            if isinstance(module, LinearMethod) and module.shareable:
                yield f"{site}.{key}", module
