"""What is trained: which weights can be, and what they add to the loss."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .attach import methods_in
from .bank import Modules
from .core.errors import SetupError
from .methods import AbstractMethod
from .tensors import is_quantised, is_skeleton


def check_trainable(model: nn.Module, own: Mapping[str, nn.Parameter], head: Mapping[str, nn.Parameter]) -> None:
    """Raise `SetupError` for weights, of adapters or of a task head, that cannot be trained where they are."""
    for key, parameter in head.items():
        if is_quantised(parameter):
            raise SetupError(
                f"A task head is trained in floating point; got quantised weights at `{key}` of "
                f"{type(model).__name__}. Leave it out of the quantisation (`llm_int8_skip_modules`, "
                "`modules_to_not_convert`), or pass `head=False` to `train`."
            )
    for key, parameter in (*own.items(), *head.items()):
        if parameter.is_meta and not is_skeleton(model):
            raise SetupError(
                f"What is trained stays in memory; got offloaded weights at `{key}` of {type(model).__name__}. Add or "
                "load adapters after the model is offloaded, and keep the task head in memory, or pass `head=False` to "
                "`train`."
            )


def penalty(trained: Iterable[Modules]) -> Tensor:
    """The sum of what the modules of adapters that are trained add to the loss; zero where there are none."""
    found = torch.zeros(())
    for modules in trained:
        for _, module in methods_in(modules):
            part = module.penalty() if isinstance(module, AbstractMethod) else None
            if part is not None and part.requires_grad:
                found = found.to(part.device) + part
    return found
