"""A recipe in the words of the transformers trainer, and the trainer that follows it on images."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ..core.errors import ConfigError
from ..data.examples import ImageData
from ..data.transforms import Augmentation, ImageDataset, collate
from .callbacks import Divergence, Epochs, Patience
from .folder import RunFolder
from .metrics import BEST, loss_function, metrics_function, only_logits
from .order import Order, SlicedBatches, WithBlanks, num_batches
from .processes import Processes
from .recipe import Recipe, Trains
from .trainer import AdapterTrainer

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class ImageTrainer(AdapterTrainer):
    """Trains on images in an order that does not depend on the number of processes."""

    def get_train_dataloader(self) -> Any:
        """The slices of this process of all batches."""
        args = self.args
        whole = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        assert isinstance(self.train_dataset, ImageDataset)
        slices = SlicedBatches(
            Order(len(self.train_dataset), args.seed),
            whole,
            processes=args.world_size,
            process=args.process_index,
            accumulation=args.gradient_accumulation_steps,
        )
        loader = DataLoader(
            WithBlanks(self.train_dataset),
            batch_sampler=slices,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=_leave_interrupts_to_the_parent,
        )
        # One process as far as accelerate knows: the slices are cut already.
        return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)


def _leave_interrupts_to_the_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_trainer(
    network: nn.Module,
    processor: Any,
    images: ImageData,
    recipe: Recipe,
    *,
    trains: Trains,
    folder: RunFolder,
    processes: Processes,
    callbacks: list[TrainerCallback],
    is_resumed: bool,
) -> ImageTrainer:
    """The trainer of a run. Raises `ConfigError` for what the trainer cannot do."""
    augmentation = Augmentation(crop=recipe.crop, flip=recipe.flip).suited(images) if recipe.augment else None
    train = ImageDataset(images.train, processor, augmentation=augmentation, seed=recipe.seed)
    held = ImageDataset(images.validation, processor) if len(images.validation) else None
    metric = BEST[images.task] if held is not None else None
    own: list[TrainerCallback] = [Epochs(train.set_epoch, recipe.save_steps), Divergence()]
    if recipe.patience is not None and metric is not None:
        own.append(Patience(metric, recipe.patience))
    args = arguments(
        recipe,
        trains=trains,
        folder=folder,
        processes=processes,
        num_steps=num_batches(train, recipe.batch_size),
        metric=metric,
        is_resumed=is_resumed,
    )
    with _report_place(folder):
        trainer = ImageTrainer(
            network,
            args,
            trains=trains,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=held,
            compute_loss_func=loss_function(images.task, recipe.label_smoothing),
            compute_metrics=metrics_function(images.task),
            preprocess_logits_for_metrics=only_logits,
            callbacks=[*own, *callbacks],
        )
    for printer in [one for one in trainer.callback_handler.callbacks if type(one).__name__ == "PrinterCallback"]:
        trainer.remove_callback(printer)
    # The same weights in all processes, but each its own dropout.
    torch.manual_seed(recipe.seed + processes.index)
    return trainer


def arguments(
    recipe: Recipe,
    *,
    trains: Trains,
    folder: RunFolder,
    processes: Processes,
    num_steps: int,
    metric: str | None,
    is_resumed: bool,
) -> TrainingArguments:
    """The trainer's arguments; `num_steps` are those of an epoch."""
    total = recipe.max_steps or num_steps * recipe.epochs
    part = recipe.batch_size // (processes.number * recipe.accumulation)
    precision = resolve_precision(recipe, processes.state.device)
    validates: dict[str, Any] = {"eval_strategy": "no"}
    if metric is not None:
        validates = {
            "eval_strategy": "epoch",
            "eval_on_start": not is_resumed,
            "load_best_model_at_end": True,
            "metric_for_best_model": metric,
            "greater_is_better": True,
        }
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        per_device_train_batch_size=part,
        per_device_eval_batch_size=recipe.eval_batch_size or max(1, recipe.batch_size // processes.number),
        gradient_accumulation_steps=recipe.accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.rate(trains),
        weight_decay=recipe.weight_decay,
        lr_scheduler_type=SCHEDULES[recipe.schedule],
        warmup_steps=round(recipe.warmup * total),
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=processes.state.device.type == "cpu",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # a loss that is no number shall be seen, and not cost a look at each step
        save_strategy="epoch",
        save_total_limit=recipe.keep_checkpoints,
        report_to=reports(recipe),
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=recipe.workers,
        dataloader_persistent_workers=recipe.workers > 0,
        dataloader_pin_memory=processes.state.device.type == "cuda",
        ddp_find_unused_parameters=False,
        **_checkpointing(recipe),
        **validates,
    )


def _checkpointing(recipe: Recipe) -> dict[str, Any]:
    if recipe.checkpointing == "off":
        return {}
    fields = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": recipe.checkpointing == "reentrant"}}


def reports(recipe: Recipe) -> list[str]:
    """The integrations to report to. Raises `ConfigError` for one that is unknown or not installed."""
    names = [] if recipe.report_to == "none" else recipe.report_to.replace(" ", "").split(",")
    try:
        for callback in get_reporting_integration_callbacks(names):  # type: ignore[no-untyped-call]
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        reason = str(error).rstrip(".")
        raise ConfigError(
            f"`Recipe.report_to` names integrations that are installed; got `{recipe.report_to}`: {reason}. "
            "Give `none` or `tensorboard`."
        ) from None
    return names


def resolve_precision(recipe: Recipe, device: torch.device) -> str:
    """What to compute in. Raises `ConfigError` for what the device cannot do."""
    is_gpu = device.type == "cuda"
    if recipe.precision == "auto":
        return "fp32" if not is_gpu else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if recipe.precision == "fp16" and not is_gpu:
        raise ConfigError(
            f"`Recipe.precision` must be one the device can train in; got `fp16` on `{device.type}`. "
            "Give `auto`, `fp32` or `bf16`."
        )
    return recipe.precision


@contextlib.contextmanager
def _report_place(folder: RunFolder) -> Iterator[None]:
    """Let TensorBoard's callback, made meanwhile, write to the folder of the run."""
    name = "TENSORBOARD_LOGGING_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(folder.logs)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
