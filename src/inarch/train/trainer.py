"""`AdapterTrainer`: the trainer of transformers, for models with adapters.

It differs in what it refuses, in what a checkpoint holds and in how it comes about: adapters, their task heads,
optimiser and random state, never the frozen base; committed by renaming, so that a killed process leaves no half of
one.
"""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import state
from ..compose import names as names_in
from ..core.errors import InarchError, SetupError, StateError, join_problems
from ..data.extras import missing
from ..fingerprint import compare_bases
from ..handle import Adapters, attached
from ..heads import task_head
from ..methods import AbstractMethod
from ..tensors import read_tensors
from . import resume
from .monitor import Monitor
from .recipe import Trains

try:
    import accelerate  # noqa: F401  the trainer of transformers asks for it only when it is made
    from transformers import Trainer, TrainingArguments
except ImportError as error:
    raise InarchError(missing("accelerate", error)) from error

logger = logging.getLogger(__name__)

FULL = 2**16
"""With fewer bytes free a disk is full: torch does not say why it could not write."""


class AdapterTrainer(Trainer):
    """Trains the adapters of a model, and the task head with them.

    Takes what `transformers.Trainer` takes. `trains` says what is meant to be trained: the `adapter`, a `head` alone,
    or the `full` model; a model in another state is refused with the call that mends it.

    Raises `SetupError` for a model that has no adapters, nothing to train, or a base that is not frozen.

        adapters = inarch.attach(model)
        adapters.add("cifar", "seq_bn")
        adapters.train("cifar")
        inarch.AdapterTrainer(model, args, train_dataset=..., eval_dataset=...).train()
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        trains: Trains = "adapter",
        **options: Any,
    ) -> None:
        self.trains = trains
        self._staging: Path | None = None
        if model is not None:
            check_trainable(model, trains)
        if args is not None and args.n_gpu > 1:
            # `nn.DataParallel` copies the model for each batch, and hooks of a copy would run in the original.
            logger.warning("One GPU of %d is used. Start with `accelerate launch` to use all.", args.n_gpu)
            args._n_gpu = 1  # noqa: SLF001  as the trainer itself does for models spread over devices
        super().__init__(model, args, *positional, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SetupError(
                "AdapterTrainer runs on one process, or on several with a whole model each; got FSDP or DeepSpeed in "
                "the arguments. Turn it off, or use `transformers.Trainer`."
            )
        handle = attached(self._network)
        if handle is not None and handle.flexible_heads and self.args.label_names is None:
            self.label_names = list(handle.targets)  # the parent reads those of the model's class
        # The trainer divides by the number of accumulated parts; with older versions of it accelerate does so again.
        self.accelerator.gradient_accumulation_steps = 1

    @property
    def _network(self) -> nn.Module:
        """The model itself, without what several processes wrap around it."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Train. `resume_from_checkpoint`: a checkpoint, or True for the newest whole one of the output folder."""
        if self.model_init is None:
            check_trainable(self._network, self.trains)
        place = self._place()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = resume.latest(place)
            if resume_from_checkpoint is None:
                raise StateError(
                    f"To resume there must be a checkpoint; got no whole one in `{place}`. Train without resuming."
                )
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume.require(resume_from_checkpoint))
        if self.args.should_save:
            resume.clean(place)
        with _statistics_kept(self._network, self.trains), _inputs_with_gradients(self._network, self.args):
            return super().train(resume_from_checkpoint or None, *args, **options)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters with weight decay: matrices, and no scale, bias or norm."""
        norms = {
            id(parameter)
            for module in model.modules()
            if "norm" in type(module).__name__.lower()
            for parameter in module.parameters(recurse=False)
        }
        # The penalty of fusion layers draws to the identity what decay would draw to zero.
        norms |= {
            id(parameter)
            for module in model.modules()
            if isinstance(module, AbstractMethod) and module.penalty() is not None
            for parameter in module.parameters()
        }
        return [
            name for name, parameter in model.named_parameters() if parameter.dim() > 1 and id(parameter) not in norms
        ]

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        """The parent's loss and, in training, the penalty of fusion layers."""
        found = super().compute_loss(model, inputs, *args, **options)
        handle = attached(self._network)
        penalty = handle.penalty() if handle is not None and model.training else None
        if penalty is None or not penalty.requires_grad:
            return found
        # The parent divides a loss by the steps of accumulation unless it counts items through all of them.
        counts = self.model_accepts_loss_kwargs and options.get("num_items_in_batch") is not None
        penalty = penalty / (self.current_gradient_accumulation_steps if counts else 1)
        return (found[0] + penalty, *found[1:]) if isinstance(found, tuple) else found + penalty

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the parent's estimate counts all parameters anew in each step, and knows nothing of frozen ones."""
        return 0

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """The parent's step, whose loss monitors are told."""
        loss = super().training_step(*args, **options)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Monitor):
                callback.see(loss)
        return loss

    # Checkpoints

    def _place(self) -> Path:
        """Where checkpoints are."""
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The parent's checkpoint, written in a folder that nobody reads and then put in its place at once."""
        place = Path(self._get_output_dir(trial))
        folder = place / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(model, trial, place, folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a failed write as a RuntimeError
            told = str(error)
            is_ours = isinstance(error, StateError)
            reason = told[0].lower() + told[1:] if is_ours else f"got `{_reason(error, place)}` at `{folder}`."
            if self.args.should_save:
                shutil.rmtree(resume.draft_of(folder), ignore_errors=True)  # it may be what fills the disk
            raise StateError(
                f"A checkpoint must be writable as a whole; {reason} The checkpoints before it are as they were. "
                "Free some space, or mend the place, and resume."
            ) from error

    def _write_checkpoint(self, model: nn.Module, trial: Any, place: Path, folder: Path) -> None:
        if self.args.should_save:
            resume.begin(folder)
        self.accelerator.wait_for_everyone()
        self._staging = resume.draft_of(folder)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self._point_to_best(place)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(resume.draft_of(folder) / folder.name / resume.STATE))
            resume.commit(folder)
            best = self.state.best_model_checkpoint
            resume.rotate(place, self.args.save_total_limit, Path(best) if best else None)
        self.accelerator.wait_for_everyone()

    def _point_to_best(self, place: Path) -> None:
        """Record the best checkpoint by its final place, wherever the run was when it was written."""
        best = self.state.best_global_step
        if best is not None:
            folder = place / f"checkpoint-{best}"
            is_there = best == self.state.global_step or folder.is_dir()
            self.state.best_model_checkpoint = str(folder) if is_there else None

    def _init_training_state(self, *args: Any, **options: Any) -> Any:
        result = super()._init_training_state(*args, **options)
        if self.state.global_step:
            self._point_to_best(self._place())
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the trained adapters with their heads, and whatever else is trained; the base is left out."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self._place())
        folder.mkdir(parents=True, exist_ok=True)
        handle = attached(self._network)
        for name in _trained(handle):
            assert handle is not None
            handle.save(name, folder / resume.ADAPTERS / name)
        others = self._others(handle)
        if others:
            plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in others.items()}
            save_file(plain, folder / resume.TRAINABLE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Put what a checkpoint holds into the parameters that are there; the optimiser keeps its hold of them."""
        folder = Path(resume_from_checkpoint)
        handle = attached(self._network)
        for name in _trained(handle):
            assert handle is not None
            stored = state.read(folder / resume.ADAPTERS / name)
            difference = compare_bases(
                stored.record, handle.sites, self._network, stacks=stored.stacks(), heads=handle.heads
            )
            if difference and self.trains != "full":  # then the base moved too, and comes with the checkpoint
                raise StateError(
                    f"{difference[0].upper()}{difference[1:]}, at `{stored.folder}`. Load the base it was trained on."
                )
            _copy(stored.tensors, {**handle.tensors(name), **handle.head(name)}, str(stored.folder))
        others = self._others(handle)
        if others:
            _copy(read_tensors(folder / resume.TRAINABLE), others, str(folder / resume.TRAINABLE))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            logger.info("Loading the best checkpoint, `%s`.", self.state.best_model_checkpoint)
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _others(self, handle: Adapters | None) -> dict[str, Tensor]:
        """What is trained outside adapters and the heads stored with them."""
        stored = {id(p) for name in _trained(handle) for p in _parameters(handle, name).values()}
        found: dict[str, Tensor] = {
            name: parameter
            for name, parameter in self._network.named_parameters()
            if parameter.requires_grad and id(parameter) not in stored
        }
        if self.trains == "full":
            names = {name for name, _ in self._network.named_parameters()}
            found |= {name: tensor for name, tensor in self._network.state_dict().items() if name not in names}
        return found


def check_trainable(model: nn.Module, trains: Trains = "adapter") -> None:
    """Raise `SetupError` if what is trainable in a model is not what is meant to be trained."""
    handle = attached(model)
    name = type(model).__name__
    names = handle.names if handle is not None else ()
    if trains == "adapter" and not names:
        raise SetupError(
            f"AdapterTrainer trains a model with adapters; got {name} without any. Call "
            "`adapters = inarch.attach(model)`, `adapters.add(...)` and `adapters.train(...)` first."
        )
    trained = _trained(handle)
    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    problems = []
    if not trainable or (trains == "adapter" and not trained):
        what = f"the adapters {', '.join(f'`{n}`' for n in names)}" if names else "the model"
        problems.append(f"Something must be trainable; got {name} with {what} frozen. {_advice(names)}")
    idle = [n for n in trained if handle is not None and (handle.setup is None or n not in _active(handle))]
    if idle:
        problems.append(f"What is trained must be active; got `{idle[0]}`, which no forward uses. {_advice(names)}")
    own = {id(p) for n in names for p in _parameters(handle, n).values()}
    own |= {
        id(p)
        for path in (handle.heads if handle is not None else task_head(model))
        for p in model.get_submodule(path).parameters()
    }
    base = [key for key, parameter in trainable.items() if id(parameter) not in own]
    if base and trains != "full":
        problems.append(
            f"The base model must be frozen; got {len(base)} trainable parameters of {name}, first `{base[0]}`. "
            f'{_advice(names)} To train all of it, pass `trains="full"`.'
        )
    if problems:
        raise SetupError(join_problems(problems))


def _advice(names: tuple[str, ...]) -> str:
    return f"Call `adapters.train({names[0]!r})`." if names else "Set `requires_grad` of the parameters to train alone."


def _active(handle: Adapters) -> tuple[str, ...]:
    return names_in(handle.setup) if handle.setup is not None else ()


def _trained(handle: Adapters | None) -> list[str]:
    """The adapters with a trainable parameter."""
    if handle is None:
        return []
    return [name for name in handle.names if any(p.requires_grad for p in handle[name].values())]


def _parameters(handle: Adapters | None, name: str) -> dict[str, Tensor]:
    return {**handle[name], **handle.head(name)} if handle is not None else {}


def _copy(found: dict[str, Tensor], wanted: dict[str, Any], place: str) -> None:
    state.check_tensors(found, wanted, place)
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(found[key])


def _reason(error: Exception, place: Path) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if shutil.disk_usage(place).free < FULL:
        return os.strerror(errno.ENOSPC)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _statistics_kept(model: nn.Module, trains: Trains) -> Iterator[None]:
    """Keep the running statistics of batch norms as they are, unless the whole model is trained.

    They are part of the base, which no adapter file holds: a base that moves with the training is lost afterwards.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    hooks = [norm.register_forward_pre_hook(_as_in_evaluation) for norm in norms if trains != "full"]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _as_in_evaluation(module: nn.Module, _: Any) -> None:
    module.training = False


@contextlib.contextmanager
def _inputs_with_gradients(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Let embeddings require gradients under reentrant checkpointing, which gives none to layers without such input."""
    enable = getattr(model, "enable_input_require_grads", None)
    if not is_reentrant(args) or enable is None:
        yield
        return
    enable()
    try:
        yield
    finally:
        model.disable_input_require_grads()  # type: ignore[operator]


def is_reentrant(args: TrainingArguments) -> bool:
    """Whether the arguments ask for checkpointing of the older kind. Its options were renamed in transformers 5."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    is_on = getattr(args, new, None) or getattr(args, old, None)
    options = getattr(args, f"{new}_kwargs", None) or getattr(args, f"{old}_kwargs", None) or {}
    return bool(is_on) and bool(options.get("use_reentrant", False))
