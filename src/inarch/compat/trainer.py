"""The trainers, with the arguments that they have there."""

from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..train.seq2seq import Seq2SeqAdapterTrainer as OurSeq2SeqTrainer
from ..train.trainer import AdapterTrainer as OurTrainer
from .composition import AdapterCompositionBlock as AdapterCompositionBlock
from .composition import Fuse as Fuse
from .refused import NAMES, not_here


def _taken(options: dict[str, Any], tokenizer: Any, adapter_names: Any) -> dict[str, Any]:
    if adapter_names is not None:
        raise not_here(f"the argument `adapter_names={adapter_names!r}`", "What is trained is saved; leave it out.")
    return options if tokenizer is None else {**options, "processing_class": tokenizer}


class AdapterTrainer(OurTrainer):
    """`inarch.AdapterTrainer`"""

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        tokenizer: Any = None,
        adapter_names: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(model, args, *positional, **_taken(options, tokenizer, adapter_names))


class Seq2SeqAdapterTrainer(OurSeq2SeqTrainer):
    """`inarch.train.seq2seq.Seq2SeqAdapterTrainer`"""

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        tokenizer: Any = None,
        adapter_names: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(model, args, *positional, **_taken(options, tokenizer, adapter_names))


def __getattr__(name: str) -> Any:
    if name in NAMES:
        raise not_here(name, NAMES[name])
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
