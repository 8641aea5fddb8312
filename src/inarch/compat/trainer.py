"""The trainers, with the arguments that they have there."""

from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..train.seq2seq import Seq2SeqAdapterTrainer as OurSeq2SeqTrainer
from ..train.trainer import AdapterTrainer as OurTrainer
from .composition import AdapterCompositionBlock as AdapterCompositionBlock
from .composition import Fuse as Fuse
from .refused import NAMES, not_here
from .words import own_words


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
        if adapter_names is not None:
            raise not_here(f"the argument `adapter_names={adapter_names!r}`", "What is trained is saved; leave it out.")
        given = {} if tokenizer is None else {"processing_class": tokenizer}
        with own_words():
            super().__init__(model, args, *positional, **options, **given)

    def train(self, *args: Any, **options: Any) -> Any:
        """What is refused before the first step names what is typed here."""
        with own_words():
            return super().train(*args, **options)


class Seq2SeqAdapterTrainer(AdapterTrainer, OurSeq2SeqTrainer):
    """`inarch.train.seq2seq.Seq2SeqAdapterTrainer`"""


def __getattr__(name: str) -> Any:
    if name in NAMES:
        raise not_here(name, NAMES[name])
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
