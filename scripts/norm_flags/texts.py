"""A classifier of texts trained through Python, with the recipe that `inarch train` follows on images."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbones.language import NEW_TITLES, labelled_documents
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, TrainingArguments, set_seed

import inarch
from inarch.train.image_trainer import SCHEDULES
from inarch.train.quiet import quiet
from inarch.train.recipe import Recipe

NUM_TRAINING, NUM_HELD_OUT = 1_397, 400  # as many as there are digits
NUM_ALL = 1_797
TRAINING_SEED, HELD_OUT_SEED, SEED_OF_ALL = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Texts(Dataset[dict[str, Tensor]]):
    """Documents of equal length with the index of their title."""

    words: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def load_text_model(place: str) -> nn.Module:
    """The text backbone with a new head for the ten new titles."""
    with quiet():
        return AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=len(NEW_TITLES), dtype=torch.float32
        )


def split(fold: tuple[int, int] | None) -> tuple[Texts, Texts]:
    """Documents to train on, and those held out: 400 of their own, or this part of as many as there are digits."""
    if fold is None:
        return (
            Texts(*labelled_documents(NUM_TRAINING, TRAINING_SEED)),
            Texts(*labelled_documents(NUM_HELD_OUT, HELD_OUT_SEED)),
        )
    words, labels = labelled_documents(NUM_ALL, SEED_OF_ALL)
    index, number = fold
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    is_held_out[labels.argsort(stable=True)[index::number]] = True  # every label evenly, in the order written
    return Texts(words[~is_held_out], labels[~is_held_out]), Texts(words[is_held_out], labels[is_held_out])


def train_texts(place: str, adapter: str | None, recipe: Recipe, train: Texts, held_out: Texts) -> list[dict[str, Any]]:
    """Train on labelled documents; what was logged, in order: losses by epoch, `eval_accuracy` before and after each.

    `adapter` None trains the head alone.
    """
    set_seed(recipe.seed)
    model = load_text_model(place)
    if adapter is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier."))
    else:
        adapters = inarch.attach(model)
        adapters.add("titles", adapter, unsound="allow")
        adapters.train("titles")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=str(Path(folder)),
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=100,
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.rate("adapter"),
            weight_decay=recipe.weight_decay,
            lr_scheduler_type=SCHEDULES[recipe.schedule],
            warmup_steps=round(recipe.warmup * recipe.epochs * -(-len(train) // recipe.batch_size)),
            max_grad_norm=recipe.max_grad_norm,
            seed=recipe.seed,
            use_cpu=True,
            logging_strategy="epoch",
            eval_strategy="epoch",
            eval_on_start=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = inarch.AdapterTrainer(
            model,
            args,
            trains="head" if adapter is None else "adapter",
            train_dataset=train,
            eval_dataset=held_out,
            compute_metrics=_accuracy,
        )
        for printer in [one for one in trainer.callback_handler.callbacks if "Printer" in type(one).__name__]:
            trainer.remove_callback(printer)
        trainer.train()
        return list(trainer.state.log_history)


def _accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}
