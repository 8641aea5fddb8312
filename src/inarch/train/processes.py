"""The processes of one training: one, or those that `accelerate launch` or `torchrun` started."""

from collections.abc import Callable
from typing import Any, TypeVar

from ..core.errors import ConfigError, InarchError
from ..data.extras import missing
from .recipe import Recipe

try:
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
except ImportError as error:
    raise InarchError(missing("accelerate", error)) from error

T = TypeVar("T")


class Processes:
    """Those that train together. Raises `ConfigError` if the batch cannot be divided among them."""

    def __init__(self, recipe: Recipe) -> None:
        self.state = PartialState(cpu=recipe.device == "cpu")
        self.number = int(self.state.num_processes)
        # One that fails at once would take the meeting place down before the others have arrived.
        self.state.wait_for_everyone()
        parts = self.number * recipe.accumulation
        if recipe.batch_size % parts:
            raise ConfigError(
                f"`Recipe.batch_size` must be divided evenly; got {recipe.batch_size} for {self.number} processes with "
                f"{recipe.accumulation} parts each. Give a multiple of {parts}."
            )

    @property
    def index(self) -> int:
        """Which of them this is, from 0."""
        return int(self.state.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return bool(self.state.is_main_process)

    def agree(self, action: Callable[[], T]) -> T:
        """What `action` returns in the main process, or the error it raises there, in all of them."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except InarchError as error:
                outcome[1] = error
        if self.number > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]
