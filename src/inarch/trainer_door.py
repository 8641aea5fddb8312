"""Answers what a trainer asks of a model whose base is frozen and whose adapters are trained.

Two questions, and nothing else. Under reentrant checkpointing a layer has gradients only if its input requires one,
which a frozen embedding never gives: whoever turns checkpointing on gets inputs that do, and layers that run again, in
the backward pass, with the setup of their forward or not at all. And a quantised base may be trained only with adapters
on it: the flag that transformers reads says that there are some.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .compose import Setup
from .core.errors import SetupError

_FLAG = "_hf_peft_config_loaded"
_ENABLE = "activation_checkpointing_enable", "gradient_checkpointing_enable"
"""The method that turns checkpointing on, and its name before transformers renamed it."""
_FUNCTION = "_gradient_checkpointing_func"
"""What transformers has a layer call to run under checkpointing; there is no public name for it."""


class Handle(Protocol):
    """What the door needs of the handle of a model."""

    model: nn.Module

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def setup(self) -> Setup | None: ...
    @property
    def skipped(self) -> tuple[int, ...]: ...


class TrainerDoor:
    """Stands in the method that turns checkpointing on, and sets the flag of a quantised model."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._hooks: list[RemovableHandle] = []
        self._flagged = False
        model = handle.model
        self._method = next((name for name in _ENABLE if hasattr(type(model), name)), None)
        if self._method is not None:
            if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                self._require_input_gradients()
                self._keep_setups()
            model.__dict__[self._method] = self.enable_checkpointing

    def close(self) -> None:
        """Leave the model as it was."""
        if self._method is not None:
            self._handle.model.__dict__.pop(self._method, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module, function in self._checkpointed():
            if isinstance(function, Checkpointing):
                module.__dict__[_FUNCTION] = function.inner
        self._flag(wanted=False)

    def tell_adapters(self) -> None:
        """Set or take back the flag of a quantised model after a change of its adapters."""
        self._flag(wanted=bool(self._handle.names) and bool(getattr(self._handle.model, "is_quantized", False)))

    def _flag(self, *, wanted: bool) -> None:
        model = self._handle.model
        if wanted and not getattr(model, _FLAG, False):
            model.__dict__[_FLAG] = self._flagged = True
        elif self._flagged and not wanted:
            model.__dict__.pop(_FLAG, None)
            self._flagged = False

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Take the flag back for the length of a `with` block in which it would make transformers look for PEFT."""
        flagged = self._flagged
        self._flag(wanted=False)
        try:
            yield
        finally:
            self._flag(wanted=flagged)

    def enable_checkpointing(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own method, and then inputs of the layers that require gradients."""
        model: Any = self._handle.model
        assert self._method is not None
        with self.as_base():
            result = getattr(type(model), self._method)(model, *args, **kwargs)
        self._require_input_gradients()
        self._keep_setups()
        return result

    def _keep_setups(self) -> None:
        for module, function in self._checkpointed():
            if not isinstance(function, Checkpointing):
                module.__dict__[_FUNCTION] = Checkpointing(function, self._handle)

    def _checkpointed(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """The modules that run under checkpointing while it is on, and how."""
        for module in self._handle.model.modules():
            if callable(function := module.__dict__.get(_FUNCTION)):
                yield module, function

    def _require_input_gradients(self) -> None:
        model: Any = self._handle.model
        if self._hooks or getattr(model, "_require_grads_hooks", None) or hasattr(model, "_require_grads_hook"):
            return
        self._hooks += [module.register_forward_hook(self.require_gradients) for module in _embeddings(model)]
        if not self._hooks and _is_reentrant(model):
            raise SetupError(
                "Reentrant checkpointing trains adapters only where the input embeddings are known, whose output is "
                f"made to require gradients; got none for {type(model).__name__}. Use "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )

    def require_gradients(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook on embeddings: the first tensor they give requires gradients, though no weight of theirs does."""
        first = output if isinstance(output, Tensor) else next((x for x in output if isinstance(x, Tensor)), None)
        if first is not None and first.is_leaf and first.is_floating_point():
            first.requires_grad_(True)


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """Stands in the function with which a module runs a layer under checkpointing."""

    inner: Callable[..., Any]
    handle: Handle

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the function gives, of a layer that runs again with the setup that it has now, or not at all."""
        if torch.compiler.is_compiling():  # a graph is compiled anew for each setup, both passes together
            return self.inner(layer, *args, **kwargs)
        return self.inner(_OfSetup(layer, self.handle, self.handle.setup, self.handle.skipped), *args, **kwargs)


@dataclass(frozen=True, slots=True)
class _OfSetup:
    """A layer that runs with one setup alone."""

    layer: Callable[..., Any]
    handle: Handle
    setup: Setup | None
    skipped: tuple[int, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now, skipped = self.handle.setup, self.handle.skipped
        if (now, skipped) != (self.setup, self.skipped):
            got, model = f"{_words(now, skipped)} after {_words(self.setup, self.skipped)}", self.handle.model
            raise SetupError(
                "Under checkpointing, layers run again in the backward pass, with the setup of their forward; got "
                f"{got} in {type(model).__name__}. Call `backward` before another setup is active, so inside of a "
                "`using` block."
            )
        return self.layer(*args, **kwargs)


def _words(setup: Setup | None, skipped: tuple[int, ...]) -> str:
    told = "no setup" if setup is None else f"`{setup}`"
    return f"{told} without layers {', '.join(map(str, skipped))}" if skipped else told


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """What the models inside this one name as their input embeddings."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        own: Any = getattr(module, "get_input_embeddings", None)
        try:
            embeddings = own() if own is not None else None
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Module):
            found[id(embeddings)] = embeddings
    return list(found.values())


def _is_reentrant(model: nn.Module) -> bool:
    """Whether some layer runs under reentrant checkpointing, torch's own default."""
    functions = [
        getattr(module, _FUNCTION)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, _FUNCTION)
    ]
    functions = [function.inner if isinstance(function, Checkpointing) else function for function in functions]
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions)
