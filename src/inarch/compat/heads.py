"""The names of the prediction heads: each makes what `model.add_prediction_head` adds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError
from ..heads import HeadConfig, read_head
from ..heads import MultiHeadOutput as MultiHeadOutput
from .refused import NAMES, not_here


@dataclass(frozen=True, slots=True)
class PredictionHead:
    """`inarch.heads.read_head(kind, ...)`: a head that is not yet in a model."""

    name: str
    config: HeadConfig


def settings_of(id2label: Mapping[int, str] | None, *, use_pooler: bool, **settings: Any) -> dict[str, Any]:
    """What a head takes there, as a head here takes it."""
    labels = {} if id2label is None else {"labels": labels_of(id2label)}
    pooling = {"pooling": "pooler"} if use_pooler else {}
    return {**settings, **labels, **pooling}


def labels_of(id2label: Mapping[Any, str]) -> list[str]:
    """Labels in their order, by numbers that may be written as text. Raises `ConfigError` where numbers are missing."""
    named = {int(number): label for number, label in id2label.items()}
    if sorted(named) != list(range(len(id2label))):
        raise ConfigError(
            f"`id2label` names the labels 0 to {len(id2label) - 1}; got {', '.join(map(str, sorted(named)))}. Count "
            "from 0, and leave none out."
        )
    return [named[number] for number in sorted(named)]


def _head(kind: str, model: Any, head_name: str, settings: dict[str, Any]) -> PredictionHead:  # noqa: ARG001  a model is given there
    given = settings_of(settings.pop("id2label", None), use_pooler=settings.pop("use_pooler", False), **settings)
    return PredictionHead(head_name, read_head(kind, **given))


def ClassificationHead(model: Any, head_name: str, **settings: Any) -> PredictionHead:
    """`"classification"`"""
    return _head("classification", model, head_name, settings)


def MultiLabelClassificationHead(model: Any, head_name: str, **settings: Any) -> PredictionHead:
    """`"multilabel_classification"`"""
    return _head("multilabel_classification", model, head_name, settings)


def ImageClassificationHead(model: Any, head_name: str, **settings: Any) -> PredictionHead:
    """`"image_classification"`"""
    return _head("image_classification", model, head_name, settings)


def MultipleChoiceHead(model: Any, head_name: str, **settings: Any) -> PredictionHead:
    """`"multiple_choice"`"""
    return _head("multiple_choice", model, head_name, settings)


def TaggingHead(model: Any, head_name: str, **settings: Any) -> PredictionHead:
    """`"tagging"`"""
    return _head("tagging", model, head_name, settings)


def QuestionAnsweringHead(model: Any, head_name: str, **settings: Any) -> PredictionHead:
    """`"question_answering"`"""
    return _head("question_answering", model, head_name, two_scores(settings))


def BiaffineParsingHead(model: Any, head_name: str, **settings: Any) -> PredictionHead:
    """`"dependency_parsing"`"""
    return _head("dependency_parsing", model, head_name, settings)


def BertStyleMaskedLMHead(model: Any, head_name: str, **settings: Any) -> PredictionHead:
    """`"masked_lm"`"""
    return _head("masked_lm", model, head_name, _words(settings))


def CausalLMHead(model: Any, head_name: str, **settings: Any) -> PredictionHead:
    """`"causal_lm"`"""
    plain = {"layers": 1, "activation_function": None, "layer_norm": False, "bias": False}
    return _head("causal_lm", model, head_name, plain | _words(settings))


def Seq2SeqLMHead(model: Any, head_name: str, **settings: Any) -> PredictionHead:
    """`"seq2seq_lm"`"""
    return _head("seq2seq_lm", model, head_name, _words(settings))


def fixed(settings: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Settings without those that have one value here. Raises `ConfigError` for another."""
    for key, value in values.items():
        if settings.get(key, value) != value:
            raise ConfigError(
                f"`{key}` of this head is that of the model, or its own; got {settings[key]!r}, where {value!r} is "
                "meant. Leave it out."
            )
    return {key: value for key, value in settings.items() if key not in values}


def two_scores(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a head that finds answers: it has two scores for each token."""
    return fixed(settings, num_labels=2)


def _words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a head of all tokens: their number and width are the model's."""
    return fixed(settings, vocab_size=None, embedding_size=None)


def __getattr__(name: str) -> Any:
    if name in NAMES:
        raise not_here(name, NAMES[name])
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
