"""Puts the methods on a model, and keeps what is assigned to it in step with its handle."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NoReturn, Self

from torch import nn
from transformers import AutoConfig, AutoModel

from ..compose import Parallel, Setup, names, walk
from ..core.errors import SetupError
from ..handle import Adapters, attach, attached
from ..methods import AdapterConfig
from . import refused
from .active import Active
from .composition import as_setup
from .methods import METHODS, ModelMethods
from .refused import not_here
from .words import own_words

_DOORS: "weakref.WeakSet[_Door]" = weakref.WeakSet()
_ATTRIBUTE = "adapters_config"
"""Where a model has what leads to its door."""


def init(model: nn.Module, adapters_config: Any = None, interface: Any = None) -> None:
    """`adapters = inarch.attach(model)`: give a model the methods of the library `adapters`."""
    if adapters_config is not None or interface is not None:
        raise SetupError(
            "inarch finds the places of adapters by itself; got a configuration or an interface for "
            f"{type(model).__name__}. Call `init(model)` alone; add adapters with `model.add_adapter`."
        )
    handle = attach(model)
    before = _door_of(handle.model)
    if before is not None:
        if before.handle is handle:
            return
        before.close()
    door = _Door(handle)
    for name in METHODS:
        handle.model.__dict__[name] = _Bound(door, name)
    for name in refused.METHODS:
        if not hasattr(type(handle.model), name):
            handle.model.__dict__[name] = _Refused(name)
    handle.model.__dict__[_ATTRIBUTE] = _Known(door)
    door.show()
    door.hook = handle.model.register_forward_pre_hook(door.before_forward, with_kwargs=True, prepend=True)


class _Door:
    """Reads what was assigned to a model since it was last looked at, and shows there what is active."""

    def __init__(self, handle: Adapters) -> None:
        self.handle = handle
        self.methods = ModelMethods(handle)
        self.hook: Any = None
        self._head = handle.active_head
        self._active: Active | None = None
        _DOORS.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a model has a door of its own."""
        self.__dict__.update(state)
        _DOORS.add(self)

    def show(self) -> None:
        """Put what is active where it is read."""
        model, handle = self.handle.model, self.handle
        self._head = handle.active_head
        # Nothing is None there; where transformers has adapters of its own, what may be called stays.
        idle = handle.setup is None and not getattr(model, "_hf_peft_config_loaded", False)
        self._active = None if idle else Active(handle.setup, _OwnActive(model))
        model.__dict__["active_adapters"] = self._active
        model.__dict__["active_head"] = self._head
        model.__dict__["has_parallel_adapters"] = any(isinstance(block, Parallel) for block in walk(handle.setup or ""))
        model.__dict__["model_name"] = getattr(getattr(model, "config", None), "name_or_path", None)
        if callable(getattr(model, "get_input_embeddings", None)):
            model.__dict__["active_embeddings"] = handle.active_embeddings
            model.__dict__["loaded_embeddings"] = _Tables(handle)

    def read(self) -> None:
        """Activate what was assigned."""
        setup, head = (self.handle.model.__dict__.get(name) for name in ("active_adapters", "active_head"))
        if setup is not self._active:
            self.methods.set_active_adapters(setup)
        if head != self._head:
            self.handle.active_head = head
        self.show()

    def before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Pre-hook on the model: what was assigned holds from this forward on."""
        if attached(model) is not self.handle:
            self.close()
            return
        for word in ("output_adapter_gating_scores", "output_adapter_fusion_attentions"):
            if kwargs.get(word):
                raise SetupError(
                    f"What gates and fusions decide is read beside the forward; got `{word}=True` for "
                    f"{type(model).__name__}. Call the model in `with inarch.attach(model).scores() as scores:`."
                )
        before = tuple(model._forward_pre_hooks)
        with own_words():
            self.read()
        if tuple(model._forward_pre_hooks) != before:
            raise SetupError(
                "A setup that prepares the inputs of a model is activated before the model is called; got "
                f"{self.handle.setup} assigned to `active_adapters` of {type(model).__name__}. Call the model again, "
                "or use `model.set_active_adapters`."
            )

    def close(self) -> None:
        """Take what was put on the model, whose handle is detached."""
        self.hook.remove()
        model = self.handle.model
        for name in (*METHODS, *refused.METHODS, *_SHOWN, _ATTRIBUTE):
            model.__dict__.pop(name, None)
        _DOORS.discard(self)


_SHOWN = (
    "active_adapters",
    "active_head",
    "has_parallel_adapters",
    "model_name",
    "active_embeddings",
    "loaded_embeddings",
)


class _Bound:
    """One of the methods, on a model."""

    def __init__(self, door: _Door, name: str) -> None:
        self.door = door
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with own_words():
            self.door.read()
            try:
                return getattr(self.door.methods, self._name)(*args, **kwargs)
            finally:
                self.door.show()


class _Refused:
    """A method that says what to write instead."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise not_here(f"model.{self._name}", refused.METHODS[self._name])


class _OwnActive:
    """The method `active_adapters` that a model's class has."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self) -> Any:
        return type(self._model).active_adapters(self._model)  # type: ignore[attr-defined]  # transformers'


class _Known:
    """`model.adapters_config`: which adapters there are, and their configurations."""

    def __init__(self, door: _Door) -> None:
        self.door = door

    def __contains__(self, name: object) -> bool:
        return name in self.door.handle

    def __iter__(self) -> Iterator[str]:
        return iter(self.door.handle.names)

    def __len__(self) -> int:
        return len(self.door.handle.names)

    def get(self, name: str) -> AdapterConfig | None:
        """`adapters.config(name)`, or None."""
        return self.door.handle.config(name) if name in self else None

    @property
    def active_setup(self) -> Setup | None:
        """`adapters.setup`"""
        return self.door.handle.setup

    @property
    def skip_layers(self) -> tuple[int, ...]:
        """`adapters.skipped`"""
        return self.door.handle.skipped


class _Tables:
    """`model.loaded_embeddings`: the modules of token embeddings by name."""

    def __init__(self, handle: Adapters) -> None:
        self._handle = handle

    def __getitem__(self, name: str) -> nn.Module:
        return self._handle.embedding(name)

    def __contains__(self, name: object) -> bool:
        return name in self._handle.embeddings

    def __iter__(self) -> Iterator[str]:
        return iter(self._handle.embeddings)

    def __len__(self) -> int:
        return len(self._handle.embeddings)


class AdapterSetup:
    """`with adapters.using(setup)`: a block with another setup, on every model that has its adapters."""

    def __init__(self, adapter_setup: Any, head_setup: Any = None, ignore_empty: bool = False) -> None:
        self.adapter_setup, self.head_setup = as_setup(adapter_setup), head_setup
        self._is_idle = ignore_empty and adapter_setup is None and head_setup is None
        self._entered: list[ExitStack] = []

    def __enter__(self) -> Self:
        with own_words(), ExitStack() as stack:
            for door in () if self._is_idle else self._doors():
                door.read()
                stack.callback(door.show)  # when all is as it was
                stack.enter_context(door.handle.using(self.adapter_setup))
                if self.head_setup is not None:
                    door.handle.active_head = self.head_setup
                door.show()
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()

    def _doors(self) -> list[_Door]:
        wanted = () if self.adapter_setup is None else names(self.adapter_setup)
        open_doors = [door for door in _DOORS if attached(door.handle.model) is door.handle]
        doors = [door for door in open_doors if all(name in door.handle for name in wanted)]
        if not doors:
            raise SetupError(
                f"A setup is for models that have its adapters; got {self.adapter_setup!r} and {len(open_doors)} "
                "models. Add them first."
            )
        return doors


def _door_of(model: nn.Module) -> _Door | None:
    found = model.__dict__.get(_ATTRIBUTE)
    return found.door if isinstance(found, _Known) else None


class AutoAdapterModel:
    """`AutoModel` and `inarch.attach`: a base model for adapters and flexible heads."""

    types: tuple[str, ...] = ()
    """The model types that are meant; none for all."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """The base model of that name."""
        if cls.types:
            cls._check(kwargs.get("config") or AutoConfig.from_pretrained(name))
        model = AutoModel.from_pretrained(name, *args, **kwargs)
        init(model)
        return model

    @classmethod
    def from_config(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
        """A base model with initial weights."""
        cls._check(config)
        model = AutoModel.from_config(config, *args, **kwargs)  # type: ignore[no-untyped-call]
        init(model)
        return model

    def __new__(cls, config: Any) -> Any:
        """A base model with initial weights, as `BertAdapterModel(config)` is."""
        return cls.from_config(config)

    @classmethod
    def _check(cls, config: Any) -> None:
        if cls.types and config.model_type not in cls.types:
            raise SetupError(
                f"`{cls.__name__}` is a model of type {' or '.join(f'`{kind}`' for kind in cls.types)}; got "
                f"`{config.model_type}`. Use `AutoAdapterModel`."
            )


_TYPES = {
    "Albert": "albert",
    "Bart": "bart",
    "Beit": "beit",
    "Bert": "bert",
    "BertGeneration": "bert-generation",
    "CLIP": "clip",
    "Deberta": "deberta",
    "DebertaV2": "deberta-v2",
    "DistilBert": "distilbert",
    "Electra": "electra",
    "GPT2": "gpt2",
    "GPTJ": "gptj",
    "Llama": "llama",
    "MBart": "mbart",
    "MT5": "mt5",
    "Mistral": "mistral",
    "PLBart": "plbart",
    "Roberta": "roberta",
    "T5": "t5",
    "ViT": "vit",
    "Whisper": "whisper",
    "XLMRoberta": "xlm-roberta",
    "Xmod": "xmod",
}
MODELS = {
    f"{name}AdapterModel": type(f"{name}AdapterModel", (AutoAdapterModel,), {"types": (kind,), "__module__": __name__})
    for name, kind in _TYPES.items()
}
"""`AutoAdapterModel` for one model type."""


def load_model(model_name_or_path: str, model_class: Any, interface: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(...)` and `inarch.attach`."""
    if interface is not None:
        raise SetupError(
            f"inarch finds the places of adapters by itself; got an interface for {model_class.__name__}. Leave it out."
        )
    model = model_class.from_pretrained(model_name_or_path, *args, **kwargs)
    init(model)
    return model
