"""Puts the methods on a model, and keeps what is assigned to it in step with its handle."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import AutoModel

from ..compose import Setup, names
from ..core.errors import SetupError
from ..handle import Adapters, attach
from ..train.trainer import AdapterTrainer as AdapterTrainer
from .methods import METHODS, Active, ModelMethods, as_setup

_MODELS: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def init(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """`adapters = inarch.attach(model)`: give a model the methods of the library `adapters`."""
    if args or any(value is not None for value in kwargs.values()):
        raise SetupError(
            "inarch finds the places of adapters by itself; got a configuration or an interface for "
            f"{type(model).__name__}. Call `init(model)` alone; add adapters with `model.add_adapter`."
        )
    handle = attach(model)
    door = _Door(handle)
    for name in METHODS:
        handle.model.__dict__[name] = _Bound(door, name)
    door.show()
    handle.model.register_forward_pre_hook(door.before_forward, with_kwargs=True, prepend=True)
    _MODELS.add(handle.model)


class _Door:
    """Reads what was assigned to a model since it was last looked at, and shows there what is active."""

    def __init__(self, handle: Adapters) -> None:
        self.handle = handle
        self.methods = ModelMethods(handle)
        self._head = handle.active_head

    def show(self) -> None:
        """Put what is active where it is read."""
        model = self.handle.model
        self._head = self.handle.active_head
        model.__dict__["active_adapters"] = Active(self.handle.setup, _OwnActive(model))
        model.__dict__["active_head"] = self._head

    def read(self) -> None:
        """Activate what was assigned."""
        setup, head = (self.handle.model.__dict__.get(name) for name in ("active_adapters", "active_head"))
        if not isinstance(setup, Active):
            self.methods.set_active_adapters(setup)
        if head != self._head:
            self.handle.active_head = head
        self.show()

    def before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Pre-hook on the model: what was assigned holds from this forward on."""
        before = tuple(model._forward_pre_hooks)
        self.read()
        if tuple(model._forward_pre_hooks) != before:
            raise SetupError(
                "A setup that prepares the inputs of a model is activated before the model is called; got "
                f"{self.handle.setup} assigned to `active_adapters` of {type(model).__name__}. Call the model again, "
                "or use `model.set_active_adapters`."
            )


class _Bound:
    """One of the methods, on a model."""

    def __init__(self, door: _Door, name: str) -> None:
        self.door = door
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.door.read()
        try:
            return getattr(self.door.methods, self._name)(*args, **kwargs)
        finally:
            self.door.show()


class _OwnActive:
    """The method `active_adapters` that a model's class has."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self) -> Any:
        return type(self._model).active_adapters(self._model)  # type: ignore[attr-defined]  # transformers'


@contextmanager
def AdapterSetup(adapter_setup: Any, head_setup: Any = None) -> Iterator[None]:
    """`with adapters.using(setup)`: a block with another setup, on every model that has its adapters."""
    setup = as_setup(adapter_setup)
    doors = [door for model in _MODELS if _has((door := _door_of(model)).handle, setup)]
    if not doors:
        raise SetupError(
            f"A setup is for models that have its adapters; got {setup!r} and {len(_MODELS)} models. Add them first."
        )
    with ExitStack() as stack:
        for door in doors:
            stack.callback(door.show)  # when all is as it was
            stack.enter_context(door.handle.using(setup))
            if head_setup is not None:
                door.handle.active_head = head_setup
            door.show()
        yield


def _has(handle: Adapters, setup: Setup) -> bool:
    return all(name in handle for name in names(setup))


def _door_of(model: nn.Module) -> _Door:
    found: _Door = model.__dict__["add_adapter"].door
    return found


class AutoAdapterModel:
    """`AutoModel` and `inarch.attach`: a base model for adapters and flexible heads."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The base model of that name."""
        model = AutoModel.from_pretrained(*args, **kwargs)
        init(model)
        return model

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """A base model with initial weights."""
        model = AutoModel.from_config(*args, **kwargs)  # type: ignore[no-untyped-call]
        init(model)
        return model


def load_model(model_name_or_path: str, model_class: Any, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(...)` and `inarch.attach`."""
    model = model_class.from_pretrained(model_name_or_path, **kwargs)
    init(model)
    return model
