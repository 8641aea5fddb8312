"""Weights that accelerate keeps elsewhere between the calls of the module that has them."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def with_weights(module: Any, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, which reads weights of a module without a call of it, for which accelerate brings them in."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return function(*args)
    hook.pre_forward(module)
    try:
        return function(*args)
    finally:
        hook.post_forward(module, None)
