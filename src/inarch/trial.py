"""Runs a model once with an adapter of longer sequences or prefixes: nothing else shows whether it takes them."""

from collections.abc import Callable, Iterator

from torch import nn

from .core.errors import InarchError, SiteError
from .sites import Inputs, likely_inputs, synthesise
from .witness import run


def check_runs(model: nn.Module, shapes: Inputs | None, config: str, switch: Callable[[bool], None]) -> None:
    """Raise `SiteError` where a model that runs without an adapter does not run with it.

    Arguments: `shapes` are those of inputs that the model takes, where a user has given some; `switch(True)` makes the
    adapter active, `switch(False)` takes it off. A model whose inputs nobody knows is not run.
    """
    for inputs in _inputs(model, shapes):
        switch(True)
        failure = _failure(model, inputs)
        if failure is None:
            return
        if isinstance(failure, InarchError):
            raise failure
        switch(False)
        if _failure(model, inputs) is None:
            raise SiteError(
                "An adapter that lengthens what layers or attentions see needs a model that takes others; got "
                f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''} from "
                f"{type(model).__name__} with `{config}`. Use another method for this model, or another place in it."
            ) from failure


def _inputs(model: nn.Module, shapes: Inputs | None) -> Iterator[Inputs]:
    if shapes is not None:
        yield shapes.to(next((parameter.device for parameter in model.parameters()), "cpu"))
    likely = likely_inputs(model)
    if likely is not None:
        yield likely
    made = synthesise(model)
    if made is not None:
        yield Inputs((), made)


def _failure(model: nn.Module, inputs: Inputs) -> Exception | None:
    try:
        run(model, inputs.args, inputs.kwargs)
    except Exception as error:  # noqa: BLE001  a forward may raise anything
        return error
    return None


def is_skeleton(model: nn.Module) -> bool:
    """Whether a model has no weights in memory."""
    return any(parameter.is_meta for parameter in model.parameters())
