"""Writes a prediction head for the library `adapters`, version 1.3.0: a flexible one, or the model's own.

It numbers the steps of a head, those without weights among them: dropout, linear layer and activation for each layer of
a task head; linear layer, activation and norm for those of a language model, which end in the table of the embeddings.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.errors import StateError
from .flexible import embeddings_of
from .kinds import DependencyParsingHead, HeadConfig, LanguageModelHead, LayeredHead, PooledHead

_PARSING = {"arcs": "biaffine_arcs.weight", "rels": "biaffine_rels.weight"}


def write_foreign(
    name: str, config: HeadConfig, tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings of a flexible head there. `tensors` are by the names of its parameters here.

    Raises `StateError` for what the library does not have.
    """
    settings = _settings(name, config)
    places = _places(config)
    if isinstance(config, LanguageModelHead):
        table = embeddings_of(model)
        last = tensors.get("embeddings", table)
        if last is None:
            raise _refusal(name, "one without a table of embeddings")
        tensors = {**tensors, "embeddings": last.detach()}
        settings |= {"vocab_size": len(last)}
        if config.kind != "seq2seq_lm":  # which takes no other width there than the model's
            settings |= {"embedding_size": last.shape[1]}
    written = {}
    for key, tensor in tensors.items():
        if key not in places:
            raise _refusal(name, f"`{key}`, which has no place there,")
        written[f"heads.{name}.{places[key]}"] = tensor.detach()
    return written, settings


def model_class(model: nn.Module) -> str:
    """The class of the bare model of a model's type, such as `BertModel`."""
    from transformers import MODEL_MAPPING

    mapping: Mapping[Any, Any] = MODEL_MAPPING
    found = mapping[type(getattr(model, "config", None))]
    return str((found[0] if isinstance(found, tuple) else found).__name__)


def _settings(name: str, config: HeadConfig) -> dict[str, Any]:
    values = config.to_dict()
    labels = values.pop("labels", None)
    settings: dict[str, Any] = {"head_type": config.kind}
    settings["label2id"] = None if labels is None else {label: number for number, label in enumerate(labels)}
    if isinstance(config, PooledHead):
        if values.pop("pooling") not in ("auto", "pooler"):
            raise _refusal(name, f"`pooling='{config.pooling}'`")
        settings["use_pooler"] = config.pooling == "pooler"
    if isinstance(config, LanguageModelHead):
        values.pop("tied")
    if isinstance(config, DependencyParsingHead | LanguageModelHead) and values.pop("dropout_prob") is not None:
        raise _refusal(name, "`dropout_prob`")
    if isinstance(config, LayeredHead) and config.kind in ("multiple_choice", "tagging", "question_answering"):
        if not values.pop("bias"):
            raise _refusal(name, "`bias=False`")
        if config.kind == "question_answering":
            values["num_labels"] = 2
    return settings | values


def _places(config: HeadConfig) -> dict[str, str]:
    """Where the parameters of a head are there, by their names here."""
    if isinstance(config, DependencyParsingHead):
        return _PARSING
    if isinstance(config, LanguageModelHead):
        step = 1 + bool(config.activation_function) + config.layer_norm
        last = (config.layers - 1) * step
        places = {"embeddings": f"{last}.weight", "bias": f"{last}.bias"}
        for number in range(config.layers - 1):
            for leaf in ("weight", "bias"):
                places[f"dense.{number}.{leaf}"] = f"{number * step}.{leaf}"
                places[f"norms.{number}.{leaf}"] = f"{(number + 1) * step - 1}.{leaf}"
        return places
    assert isinstance(config, LayeredHead)
    step = 3 if config.activation_function else 2
    return {
        f"{place}.{leaf}": f"{1 + number * step}.{leaf}"
        for number, place in enumerate([*(f"dense.{n}" for n in range(config.layers - 1)), "out"])
        for leaf in ("weight", "bias")
    }


def _refusal(name: str, got: str) -> StateError:
    return StateError(
        f"A head is written for the library `adapters` where that has it; got {got} in `{name}`. Save the adapter with "
        "`head=False`, or as it is."
    )
