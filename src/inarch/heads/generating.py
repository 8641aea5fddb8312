"""Lets a model generate whose class does not: a base model with a language-modelling head of ours."""

import functools
from typing import Any

from torch import nn


def generation_config(model: Any) -> Any:
    """What `generate` goes by, for a model whose class has none."""
    from transformers import GenerationConfig

    return GenerationConfig.from_model_config(model.config)


def generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What transformers' `generate` makes of the model's forward."""
    return _generating()(model).generate(*args, **kwargs)


@functools.cache
def _generating() -> Any:
    from transformers import GenerationMixin

    class Generating(GenerationMixin):
        """Stands for a model before the code that generates, which asks for the methods of this class."""

        def __init__(self, model: Any) -> None:
            self._model = model
            self.generation_config = model.generation_config

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["_model"], name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._model(*args, **kwargs)

    return Generating
