"""What one small batch shows of an adapter.

How far it moves the output, which of its tensors a gradient reaches, how the signal grows, and what the backward pass
keeps.

The model is used as it is and left as it was: weights are restored bit for bit, no `.grad` is touched, and random
numbers are drawn from a state of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..core.site import Site, Sites
from .facts import Evidence, Memory

_MOVE = 1e-2
"""Standard deviation of the random change that stands for steps of training."""
_ADAM_MOMENTS = 2

Run = Callable[[], Any]


def measure(
    model: nn.Module,
    sites: Sites,
    parameters: Mapping[str, nn.Parameter],
    run: Run,
    base: Callable[[], Any],
) -> Evidence:
    """The evidence of one batch, in eval mode.

    **Arguments**: `parameters` are the adapter's, by their key in an adapter file, and its setup is active; `run` calls
    the model on the batch; `base` gives a context in which no adapter is active.
    """
    with _in_mode(model, training=False), torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(0)
        with torch.no_grad():
            with base():
                before, streams_before = _with_streams(model, sites, run)
            after, streams_after = _with_streams(model, sites, run)
        still = _gradients(parameters, run)
        dead = _dead(parameters, still, run)
    return Evidence(
        drift=_relative(after, before),
        gradients=still,
        dead=dead,
        growth={stack: streams_after[stack] / value for stack, value in streams_before.items() if value},
    )


def memory(model: nn.Module, run: Run, parameters: Sequence[nn.Parameter], *, samples: int) -> Memory:
    """What training these parameters takes: counted in one step, or estimated for a model on the meta device."""
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    cuda = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    if cuda:
        torch.cuda.reset_peak_memory_stats(cuda[0])
    with torch.random.fork_rng(devices=_cuda_devices(model)), _in_mode(model, training=True):
        activations = _saved_bytes(model, run, parameters)
    return Memory(
        activations=activations,
        optimizer=_estimated_optimizer(parameters) if is_meta else _measured_optimizer(parameters),
        samples=samples,
        is_measured=not is_meta,
        device_peak=torch.cuda.max_memory_allocated(cuda[0]) if cuda else None,
    )


class _FusedAttention(TorchFunctionMode):
    """Attention on the meta device as a fused kernel computes it: without keeping the scores of all pairs of tokens."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention and args and args[0].is_meta:
            try:
                return _fused(*args, **options)
            except (RuntimeError, TypeError, NotImplementedError):
                pass  # a shape or an option that the fused kernel does not have: it is computed step by step
        return func(*args, **options)


def _fused(  # noqa: PLR0917  torch's signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001  the operator's name
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


def _estimated_optimizer(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() * (1 + _ADAM_MOMENTS) for p in parameters)


def _measured_optimizer(parameters: Sequence[nn.Parameter]) -> int:
    """Bytes that AdamW and the gradients hold after a step, taken on copies."""
    if not parameters:
        return 0
    copies = [nn.Parameter(torch.zeros_like(p)) for p in parameters]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer = torch.optim.AdamW(copies)
    optimizer.step()
    state = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    held = [*state, *(copy.grad for copy in copies if copy.grad is not None)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _saved_bytes(model: nn.Module, run: Run, parameters: Sequence[nn.Parameter]) -> int:
    """Bytes that a forward pass keeps for the backward pass, the model's own weights and buffers not counted; each
    storage counts once."""
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    own_storages = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(tensor) not in own and storage._cdata not in own_storages:
            kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that its identity is not reused
        return tensor

    with (
        _only(model, parameters),
        _FusedAttention(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = run()
        total = sum(size for size, _ in kept.values())
    del output
    return total


def _gradients(parameters: Mapping[str, nn.Parameter], run: Run) -> dict[str, float]:
    """Root mean square of the gradient of a fixed random reading of the output, by tensor."""
    if not parameters:
        return {}  # of a branch that is taken out
    flags = {key: parameter.requires_grad for key, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss = _reading(run())
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    finally:
        for key, parameter in parameters.items():
            parameter.requires_grad_(flags[key])
    return {
        key: 0.0 if gradient is None else float(gradient.detach().double().square().mean().sqrt())
        for key, gradient in zip(parameters, found, strict=True)
    }


def _dead(parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, float], run: Run) -> tuple[str, ...]:
    """Tensors that training never moves: without a gradient, whatever those do that get one."""
    live = {key for key, value in gradients.items() if value}
    while live and len(live) < len(parameters):
        with _moved([parameters[key] for key in live]):
            reached = {key for key, value in _gradients(parameters, run).items() if value} - live
        if not reached:
            break
        live |= reached
    return tuple(key for key in parameters if key not in live)


def _reading(output: Any) -> Tensor:
    """A scalar of all floating tensors of an output, that no symmetry of a norm makes constant."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for tensor in floating(output):
        weights = torch.randn(tensor.shape, generator=generator).to(tensor)
        total = total.to(tensor.device) + (tensor * weights).float().mean() * tensor.numel() ** 0.5
    return total


def floating(value: Any) -> Iterator[Tensor]:
    """The floating tensors with a gradient or data in a model's output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floating(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from floating(item)


def difference(model: nn.Module, run: Run, first: Callable[[], Any], second: Callable[[], Any]) -> float:
    """How far the output of a model is from one to the other of two contexts, in eval mode: ||y' - y|| / ||y||."""
    with _in_mode(model, training=False), torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(model)):
        found = []
        for context in (first, second):
            torch.manual_seed(0)  # for a model that draws numbers in its forward
            with context():
                found.append(run())
    return _relative(found[1], found[0])


def _relative(after: Any, before: Any) -> float:
    pairs = zip(floating(after), floating(before), strict=True)
    alike = [(a, b) for a, b in pairs if a.shape == b.shape]  # with prompts, what an encoder gives is longer
    change = sum(float((a - b).double().square().sum()) for a, b in alike)
    size = sum(float(b.double().square().sum()) for _, b in alike)
    return float((change / size) ** 0.5) if size else 0.0


def _with_streams(model: nn.Module, sites: Sites, run: Run) -> tuple[Any, dict[str, float]]:
    """The output, and by stack the root mean square of what its last layer returns."""
    last = {site.stack: site for site in sites}
    found: dict[str, float] = {}
    handles: list[RemovableHandle] = []

    def record(stack: str, site: Site) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            for tensor in floating(output):
                if tensor.dim() > 1 and tensor.shape[site.feature_dim] == site.width:
                    found[stack] = float(tensor.double().square().mean().sqrt())
                    return

        return hook

    for stack, site in last.items():
        handles.append(model.get_submodule(site.layer_path).register_forward_hook(record(stack, site)))
    try:
        return run(), found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _moved(parameters: Any) -> Iterator[None]:
    """Weights with a small random change, for as long as the context lasts."""
    tensors = list(parameters)
    originals = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for tensor in tensors:
                tensor.add_(torch.randn(tensor.shape).to(tensor) * _MOVE)
        yield
    finally:
        with torch.no_grad():
            for tensor, original in zip(tensors, originals, strict=True):
                tensor.copy_(original)


@contextmanager
def _only(model: nn.Module, parameters: Any) -> Iterator[None]:
    """Gradients for these parameters alone."""
    flags = {id(p): p.requires_grad for p in model.parameters()}
    chosen = {id(p) for p in parameters}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        with torch.enable_grad():
            yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(flags[id(parameter)])


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in train or eval mode, and every module in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
