"""What a setup has to know of the batch of a running forward, and what it makes of the model's inputs.

A hook on the model sees each call: it checks the size of the batch, copies the inputs for `Parallel`, and takes the
`task_ids` of `MultiTask`. Since the inputs are copied before anything of the model runs, all that the model derives
from them (masks, positions, caches, the other side of an encoder and decoder) is right by itself.

While such a setup is active the hook's object also stands in `generate`, which calls the model many times on one batch.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.errors import SetupError
from .blocks import BatchSplit, MultiTask, Parallel, Setup, walk

TASKS = "task_ids"

_MAIN = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids")
_SHARED = frozenset({"cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask", "logits_to_keep"})
"""Arguments of transformers models whose tensors have no batch dimension."""
_PACKING = ("image_sizes", "pixel_attention_mask", "grid_thw")
"""Ends of the names of arguments that say how many rows of a tower each sample has."""
_EARLIER = ("past_key_values", "encoder_outputs")
"""Arguments that an earlier forward gave, which may hold the copies or not."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of the batch that the model runs on."""

    size: int | None = None
    """Its samples, copies included; None where that is not known."""
    has_grown: bool = False
    """Whether every sample may have grown into several rows, as beams."""
    is_packed: bool = False
    """Whether samples may have different numbers of rows in a part of the model."""
    has_copies: bool = False
    tasks: Tensor | None = None
    """(B,), the number of each sample's child."""


class Batch:
    """The batch of one model under one setup. Forwards in several threads each have their own."""

    def __init__(self, setup: Setup, rows: int | None, dim: int = 0) -> None:
        """`rows`: the samples that the blocks of the setup ask for, if they do; `dim`: where the model has them."""
        blocks = list(walk(setup))
        self._setup = setup
        self._rows = rows
        self._dim = dim
        self._copies = max((len(b.children) for b in blocks if isinstance(b, Parallel)), default=1)
        self._tasks = [b for b in blocks if isinstance(b, MultiTask)]
        self._tells_apart = any(isinstance(b, MultiTask | BatchSplit) for b in blocks)
        self._now: dict[int, Seen] = {}
        self._outer: dict[int, Seen] = {}
        self._latest, self._is_read, self._differs = Seen(), True, False
        self._model: nn.Module | None = None
        self.own_generate: Any = None
        """A `generate` that was put on the model before, in the place of its class's."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running forward."""
        return self.__dict__ | {"_now": {}, "_outer": {}, "_latest": Seen()}

    # What cuts ask

    def size(self) -> int | None:
        """The samples of the running forward; None where that is not known."""
        seen = self._seen()
        return None if seen is None else seen.size

    def has_grown(self) -> bool:
        """Whether every sample may be several rows."""
        seen = self._seen()
        return seen is not None and seen.has_grown

    def is_packed(self) -> bool:
        """Whether samples may have different numbers of rows in a part of the model."""
        seen = self._seen()
        return seen is not None and seen.is_packed

    def require_copies(self, key: str) -> None:
        """Raise `SetupError` if the running forward has no copy of the batch for each child of a `Parallel`."""
        seen = self._seen()
        if seen is None or not seen.has_copies:
            raise self._not_seen("A `Parallel` copies the batch where the model is called", key)

    def require_tasks(self, key: str) -> Tensor:
        """The task of every sample. Raises `SetupError` where none is known."""
        seen = self._seen()
        if seen is None or seen.tasks is None:
            raise self._not_seen("A `MultiTask` takes `task_ids` where the model is called", key)
        return seen.tasks

    def _not_seen(self, rule: str, key: str) -> SetupError:
        return SetupError(
            f"{rule}; got a call of a part of {type(self._model).__name__} at `{key}`. Call the model itself, or "
            "prepare the inputs and call the part under `inarch.attach(model).prepared(...)`."
        )

    def _seen(self) -> Seen | None:
        thread = _thread()
        seen = self._now.get(thread) or self._outer.get(thread)
        if seen is None and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # noqa: SLF001
            # A backward pass that runs layers again, maybe in a thread of its own.
            self._is_read = True
            if self._differs:
                raise SetupError(
                    "Layers that run again in the backward pass take the tasks of the last forward; got two forwards "
                    f"of other tasks before it, at {type(self._model).__name__}. Call `backward` after each forward, "
                    "and run what has none under `torch.no_grad()`; or turn checkpointing off."
                )
            return self._latest
        return seen

    def _remember(self, seen: Seen) -> None:
        """Keep what a backward pass may ask for."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        last, tasks = self._latest.tasks, seen.tasks
        is_other = last is not None and tasks is not None and not torch.equal(last.cpu(), tasks.cpu())
        self._differs = not self._is_read and (self._differs or is_other)
        self._latest, self._is_read = seen, False

    # The hooks on the model

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Register the hooks, and stand in `generate`. Returns what removes the hooks."""
        self._model = model
        if callable(getattr(model, "generate", None)):
            self.own_generate = model.__dict__.get("generate")
            model.__dict__["generate"] = self.generate
        return [
            model.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook on the model: its inputs as the setup wants them."""
        thread = _thread()
        outer = self._outer.get(thread)
        if outer is not None:
            self._now[thread] = outer
            return args, {name: value for name, value in kwargs.items() if name != TASKS or not self._tasks}
        earlier = [name for name in _EARLIER if _holds_something(kwargs.get(name))]
        if self._copies > 1 and earlier:
            raise SetupError(
                f"A `Parallel` copies what a model is called with; got `{earlier[0]}`, of an earlier call. Call the "
                "model under `inarch.attach(model).prepared(...)`, with inputs that hold a copy for each child."
            )
        args, kwargs, self._now[thread] = self._prepare(module, args, kwargs)
        self._remember(self._now[thread])
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook on the model, also called after an exception: the forward is over."""
        self._now.pop(_thread(), None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, on a batch that is prepared once."""
        model: Any = self._model
        own = self.own_generate or partial(type(model).generate, model)
        if _thread() in self._outer:
            return own(*args, **kwargs)
        args, kwargs, seen = self._prepare(model, args, kwargs)
        with self.prepared(replace(seen, has_grown=True)):
            return own(*args, **kwargs)

    @contextmanager
    def prepared(self, seen: Seen) -> Iterator[None]:
        """A block in which the model, or a part of it, is called with inputs that are as the setup wants them."""
        thread = _thread()
        before = self._outer.get(thread)
        self._outer[thread] = seen
        self._remember(seen)
        try:
            yield
        finally:
            if before is None:
                self._outer.pop(thread, None)
            else:
                self._outer[thread] = before

    def by_hand(self, task_ids: Any) -> Seen:
        """What `prepared` is told of inputs that a user has prepared."""
        tasks = self._read_tasks(task_ids, None) if self._tasks else None
        return Seen(None, has_grown=True, has_copies=self._copies > 1, tasks=tasks)

    def _prepare(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Seen]:
        size = batch_size(model, args, kwargs, self._dim)
        if self._rows is not None and size is not None and size != self._rows:
            raise SetupError(
                f"The sizes of a `BatchSplit` make up the batch, {self._rows} samples; got a batch of {size} at "
                f"{type(model).__name__} for {self._setup}. Give a batch of that size, or activate a setup with others."
            )
        tasks, kwargs = None, dict(kwargs)
        if self._tasks:
            tasks = self._read_tasks(kwargs.pop(TASKS, None), size)
        is_known = hasattr(model, "main_input_name")  # a model of transformers: what its arguments are is known
        is_packed = self._tells_apart and any(
            name.endswith(_PACKING) for name, value in kwargs.items() if value is not None
        )
        if self._tells_apart and is_known:
            self._check_rows(model, kwargs, size)
        if self._copies == 1:
            return args, kwargs, Seen(size, is_packed=is_packed, tasks=tasks)
        if self._dim:
            raise SetupError(
                f"A `Parallel` copies inputs along their first dimension; got {type(model).__name__}, which has "
                "samples in the second. Prepare the inputs, and call the model under "
                "`inarch.attach(model).prepared(...)`."
            )
        if kwargs.get("return_loss"):
            raise SetupError(
                "A loss that compares samples with each other is none of one adapter where a `Parallel` copies the "
                f"batch; got `return_loss=True` at {type(model).__name__}. Activate one adapter to train it."
            )
        copier = _Copier(self._copies, size, is_known=is_known)
        args = tuple(copier("", value) for value in args)
        tasks = None if tasks is None else tasks.repeat(self._copies)
        size = None if size is None else size * self._copies
        return (
            args,
            {name: copier(name, value) for name, value in kwargs.items()},
            Seen(size, is_packed=is_packed, has_copies=True, tasks=tasks),
        )

    def _check_rows(self, model: nn.Module, kwargs: Mapping[str, Any], size: int | None) -> None:
        """Raise `SetupError` for an input whose rows are not those of the samples."""
        for name, value in kwargs.items():
            if not isinstance(value, Tensor) or value.dim() < 2 or name in _SHARED:
                continue
            is_by_axis = name == "position_ids" and value.dim() == 3
            if not is_by_axis and value.shape[0] not in (1, size):
                raise SetupError(
                    "A `BatchSplit` or a `MultiTask` takes the k-th row of every input for the k-th sample; got "
                    f"`{name}` of shape {tuple(value.shape)} for {size} samples at {type(model).__name__}. Run the "
                    "samples of each adapter by themselves."
                )

    def _read_tasks(self, given: Any, size: int | None) -> Tensor:
        block = self._tasks[0]
        count = len(block.children)
        place = f"`{TASKS}` for {block}"
        if given is None:
            raise SetupError(
                f"A `MultiTask` needs the task of every sample; got no {place}. Pass `{TASKS}`, a tensor of "
                f"numbers from 0 to {count - 1}, to the model."
            )
        if isinstance(given, str) or (isinstance(given, Sequence) and any(isinstance(task, str) for task in given)):
            named = [given] if isinstance(given, str) else list(given)
            unknown = [task for task in named if task not in block.children]
            if unknown:
                raise SetupError(
                    f"Tasks are named by the children of a `MultiTask`; got {unknown[0]!r} in {place}. Give their "
                    f"names, or numbers from 0 to {count - 1}."
                )
            given = [block.children.index(task) for task in named]
        tasks = torch.as_tensor(given)
        if tasks.dim() != 1 or (size is not None and len(tasks) != size) or tasks.is_floating_point():
            raise SetupError(
                f"`{TASKS}` are one whole number for each sample; got shape {tuple(tasks.shape)} of {tasks.dtype} for "
                f"a batch of {size} and {block}. Give a tensor of shape (B,)."
            )
        if not torch.compiler.is_compiling() and len(tasks) and not 0 <= int(tasks.min()) <= int(tasks.max()) < count:
            raise SetupError(
                f"`{TASKS}` number the children of a `MultiTask` from 0; got {int(tasks.min())} to {int(tasks.max())} "
                f"for {block}. Give numbers from 0 to {count - 1}."
            )
        return tasks


class Watched:
    """A batch under the hooks of a model."""

    def __init__(self, batch: Batch, model: nn.Module) -> None:
        self.batch = batch
        self._model = model
        self._handles = batch.watch(model)

    def remove(self) -> None:
        """Remove the hooks, and give the model its own `generate` back."""
        for handle in self._handles:
            handle.remove()
        self._model.__dict__.pop("generate", None)
        if self.batch.own_generate is not None:
            self._model.__dict__["generate"] = self.batch.own_generate


@dataclass(frozen=True, slots=True)
class _Copier:
    """Copies the inputs of a model: all rows, then all rows again."""

    copies: int
    size: int | None
    """Samples of the batch."""
    is_known: bool
    """Whether the model is one of transformers, whose arguments are batches unless they are known to be none."""

    def __call__(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(name, value)
        if isinstance(value, Mapping):
            changed = {key: self(name, item) for key, item in value.items()}
            return changed if type(value) is dict else type(value)(changed)  # type: ignore[call-arg]
        if type(value) in (list, tuple):
            return type(value)(self(name, item) for item in value)
        if type(value).__name__ == "BlockMask":
            raise SetupError(
                f"A `Parallel` copies inputs that are tensors; got a `BlockMask` for `{name}`. Pass a mask of shape "
                "(B, L)."
            )
        return value

    def _tensor(self, name: str, value: Tensor) -> Tensor:
        if value.dim() == 0 or name in _SHARED:
            return value
        if name == "position_ids" and value.dim() == 3:  # (axes, B, L)
            return value if value.shape[1] != self.size else value.repeat(1, self.copies, 1)
        is_batch = value.shape[0] == self.size
        if self.is_known and value.dim() > 1:
            is_batch = value.shape[0] != 1 or self.size == 1 or name.startswith(("pixel_values", "input_"))
        elif is_batch and value.dim() == 2 and value.shape[1] == self.size and not self.is_known:
            raise SetupError(
                "A `Parallel` copies what belongs to samples; got a square of shape "
                f"{tuple(value.shape)} for {f'`{name}`' if name else 'an argument'}, which may be a mask of tokens. "
                "Prepare the inputs, and call the model under `inarch.attach(model).prepared(...)`."
            )
        return value.repeat(self.copies, *([1] * (value.dim() - 1))) if is_batch else value


def batch_size(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dim: int = 0) -> int | None:
    """The samples of what a model is called with, as its main input has them, or its first tensor."""
    names = (getattr(model, "main_input_name", ""), *_MAIN) if hasattr(model, "main_input_name") else ()
    found = [*args[:1], *(kwargs.get(name) for name in names), *args[1:], *kwargs.values()]
    return next((value.shape[dim] for value in found if isinstance(value, Tensor) and value.dim() > dim), None)


def _holds_something(value: Any) -> bool:
    length: Callable[[], int] | None = getattr(value, "get_seq_length", None)
    return bool(length()) if length is not None else value is not None


def _thread() -> int:
    """The calling thread; a compiled graph has none inside it."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
