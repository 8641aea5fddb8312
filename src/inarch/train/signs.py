"""What a monitor measures of a model in training: norms of gradients, updates and weights, and the drift of the stream.

Everything stays on the device until it is asked for: a step costs a few fused operations, and only where it is
sampled.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..handle import Adapters, attached, unwrap
from ..heads import task_head

logger = logging.getLogger(__name__)

HEAD = "head"
MOST_NUMBERS = 2**23
"""Trainable numbers that are watched: those of more are watched at evenly spaced places."""
NUM_SAMPLES = 2
"""Samples of the first batch on which the drift of the stream is measured."""
_NOT_INPUTS = ("labels", "num_items_in_batch", "return_loss")


class Parameters:
    """The trainable tensors of a model by place: a site, the head, or the module that holds them."""

    def __init__(self, model: nn.Module) -> None:
        model = unwrap(model)
        groups = _groups(model, attached(model))
        self.places = {place: tensors for place, tensors in groups.items() if place == HEAD or place in _spread(groups)}
        self.tensors = [tensor for tensors in self.places.values() for tensor in tensors]
        self._copies: list[Tensor] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The number of tensors by place."""
        return {place: len(tensors) for place, tensors in self.places.items()}

    def has_gradients(self) -> bool:
        """Whether a backward pass has been made since the gradients were cleared."""
        return any(tensor.grad is not None for tensor in self.tensors)

    def gradients(self) -> Tensor:
        """The norm of the gradient of each tensor, as one tensor."""
        found = [_local(t.grad if t.grad is not None else torch.zeros((), device=t.device)) for t in self.tensors]
        return _norms(found)

    def keep(self) -> None:
        """Remember the weights, for the update that comes."""
        self._copies = [_local(tensor.detach()).clone() for tensor in self.tensors]

    def updates(self) -> Tensor | None:
        """The norms of what changed since the weights were kept, then those of the weights kept, as one tensor."""
        if self._copies is None:
            return None
        now = [_local(tensor.detach()) for tensor in self.tensors]
        changes = [new.float() - old.float() for new, old in zip(now, self._copies, strict=True)]
        found = torch.cat((_norms(changes), _norms(self._copies)))
        self._copies = None
        return found

    def by_place(self, norms: Sequence[float]) -> dict[str, float]:
        """The norm at each place, from those of its tensors."""
        found, at = {}, 0
        for place, number in self.sizes.items():
            found[place] = sum(norm * norm for norm in norms[at : at + number]) ** 0.5
            at += number
        return found


def _groups(model: nn.Module, handle: Adapters | None) -> dict[str, list[nn.Parameter]]:
    """The trainable tensors by place, head last."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()

    def put(place: str, parameter: nn.Parameter) -> None:
        if parameter.requires_grad and parameter.numel() and id(parameter) not in seen:
            seen.add(id(parameter))
            found.setdefault(place, []).append(parameter)

    for name in handle.names if handle is not None else ():
        for key, parameter in handle[name].items():  # type: ignore[index]
            put(".".join(key.split(".")[:3]), parameter)
    head: list[nn.Parameter] = []
    for path in handle.heads if handle is not None else task_head(model):
        head += [p for p in model.get_submodule(path).parameters() if p.requires_grad and id(p) not in seen]
    seen |= {id(parameter) for parameter in head}
    for key, parameter in model.named_parameters():
        put(key.rpartition(".")[0] or key, parameter)
    return {**found, HEAD: head} if head else found


def _spread(groups: Mapping[str, Sequence[Tensor]]) -> set[str]:
    """Places, evenly spaced, whose tensors together are no more than `MOST_NUMBERS`."""
    sizes = {place: sum(t.numel() for t in tensors) for place, tensors in groups.items() if place != HEAD}
    stride = max(1, -(-sum(sizes.values()) // MOST_NUMBERS))
    return set(list(sizes)[::stride])


def _norms(tensors: list[Tensor]) -> Tensor:
    """2-norms in 32 bits, computed on each device at once, and brought together on the first one."""
    home = tensors[0].device
    norms: list[Any] = [None] * len(tensors)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        own = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        found = torch._foreach_norm([tensors[i] for i in own], 2, torch.float32)  # noqa: SLF001  as `clip_grad_norm_` does
        for index, norm in zip(own, found, strict=True):
            norms[index] = norm
    return torch.stack([norm.to(home, non_blocking=True) for norm in norms])


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here; any other tensor as it is."""
    local = getattr(tensor, "to_local", None)
    return local() if local is not None else tensor


class Stream:
    """How far adapters have moved the stream that leaves the last layer of each stack, on the first samples seen."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self.handle = attached(self.model)
        self.stacks = list(dict.fromkeys(site.stack for site in self.handle.sites)) if self.handle is not None else []
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._before: dict[str, Tensor] | None = None
        self._capture: Any = None
        if self.handle is not None and self.handle.setup is not None and self.model is model:
            self._capture = self.model.register_forward_pre_hook(self._take, with_kwargs=True)

    def close(self) -> None:
        """Take the hook away."""
        if self._capture is not None:
            self._capture.remove()
            self._capture = None

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            kept = {key: value for key, value in kwargs.items() if key not in _NOT_INPUTS}
            size = next((t.shape[0] for t in (*args, *kept.values()) if isinstance(t, Tensor) and t.dim()), None)
            if size is not None:
                self._inputs = (
                    tuple(_first(value, size) for value in args),
                    {key: _first(value, size) for key, value in kept.items()},
                )
            self.close()

    def drift(self) -> Tensor | None:
        """By stack, the change of the stream relative to the base model's; None where it cannot be measured."""
        if self._inputs is None or self.handle is None:
            return None
        try:
            if self._before is None:
                with self.handle.using(None):
                    self._before = self._streams()
            now = self._streams()
        except Exception as error:  # noqa: BLE001  a model may refuse a part of a batch in any way
            logger.warning("The drift of the stream is not measured: %s does not run on %d samples of a batch (%s).",
                           type(self.model).__name__, NUM_SAMPLES, error)  # fmt: skip
            self._inputs = None
            return None
        before = self._before
        if not all(stack in before and now[stack].shape == before[stack].shape for stack in now):
            return None
        home = next(iter(now.values())).device
        found = [((now[s] - before[s]).norm() / before[s].norm()).to(home) for s in now]
        return torch.stack([*found, *([torch.full((), torch.nan, device=home)] * (len(self.stacks) - len(found)))])

    def _streams(self) -> dict[str, Tensor]:
        assert self.handle is not None
        assert self._inputs is not None
        last = {site.stack: site for site in self.handle.sites}
        found: dict[str, Tensor] = {}
        hooks = [
            self.model.get_submodule(site.layer_path).register_forward_hook(_recorder(found, stack, site.width))
            for stack, site in last.items()
        ]
        devices = {p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"}
        try:
            with _evaluating(self.model), torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
                self.model(*self._inputs[0], **self._inputs[1])
        finally:
            for hook in hooks:
                hook.remove()
        return {stack: found[stack] for stack in last if stack in found}


def _recorder(found: dict[str, Tensor], stack: str, width: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple | list) else (output,)
        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[-1:] == (width,):
                found[stack] = tensor.detach().float()
                return

    return hook


def _first(value: Any, size: int) -> Any:
    """The first samples of a tensor that has one for each of the batch; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
        return value[:NUM_SAMPLES].detach().clone()
    return value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
