"""`Seq2SeqAdapterTrainer`: evaluation by generating, as the trainer of transformers for sequences has it."""

from transformers import Seq2SeqTrainer

from .trainer import AdapterTrainer


class Seq2SeqAdapterTrainer(AdapterTrainer, Seq2SeqTrainer):
    """`AdapterTrainer` with `predict_with_generate` and what else `transformers.Seq2SeqTrainer` takes."""
