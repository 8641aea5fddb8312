"""The configurations of flexible heads, one for each kind of task; their names and defaults are those of `adapters`.

A head is asked for by its kind, `"classification"`, with settings, `"classification[num_labels=3]"`, or as one of the
configurations here.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ..core.config import Config, config_class, option
from ..core.errors import ConfigError, nearest
from ..core.grammar import parse

Pooling = Literal["auto", "first", "last", "eos", "mean", "pooler"]


@config_class
class HeadConfig(Config):
    """What every head has."""

    kind: ClassVar[str] = ""

    dropout_prob: float | None = option(
        None, "Dropout before each layer; none takes that of the model's configuration.", at_least=0.0, less_than=1.0
    )


@config_class
class LayeredHead(HeadConfig):
    """Linear layers of the model's width with an activation between them, and one to the scores."""

    layers: int = option(1, "Linear layers, the last one included.", at_least=1)
    activation_function: str | None = option("tanh", "Activation after each layer but the last, by name; or none.")
    bias: bool = option(True, "Whether the layers have a bias.")
    labels: tuple[str, ...] | None = option(None, "The names of the labels, in their order.")

    def num_scores(self) -> int:
        """How many scores the last layer gives."""
        raise NotImplementedError

    def problems(self) -> list[str]:
        if self.labels is None or len(self.labels) == self.num_labels_named():
            return []
        problem = (
            f"`labels` of a head names each label once; got {len(self.labels)} names for {self.num_labels_named()} "
            "labels. Give as many names as labels."
        )
        return [problem]

    def num_labels_named(self) -> int:
        """How many labels there are to be named."""
        return self.num_scores()


@config_class
class PooledHead(LayeredHead):
    """A head on one vector of each sequence or image."""

    pooling: Pooling = option(
        "auto",
        "Which vector: that of the `first` or `last` token, of the last `eos` token, the `mean`, what the model's own "
        "`pooler` gives, or what fits the model.",
    )


@config_class
class ClassificationHead(PooledHead):
    """One label for a sequence; a number, where there is one label."""

    kind: ClassVar[str] = "classification"

    layers: int = option(2, "Linear layers, the last one included.", at_least=1)
    num_labels: int = option(2, "The labels; 1 makes it a regression.", at_least=1)

    def num_scores(self) -> int:
        return self.num_labels


@config_class
class MultiLabelHead(ClassificationHead):
    """Any number of labels for a sequence; targets are zeros and ones (B, labels)."""

    kind: ClassVar[str] = "multilabel_classification"


@config_class
class ImageClassificationHead(PooledHead):
    """One label for an image, or several; a number, where there is one label."""

    kind: ClassVar[str] = "image_classification"

    num_labels: int = option(2, "The labels; 1 makes it a regression.", at_least=1)
    multilabel: bool = option(
        False, "Whether an image may have several labels; targets are zeros and ones (B, labels)."
    )

    def num_scores(self) -> int:
        return self.num_labels


@config_class
class MultipleChoiceHead(PooledHead):
    """The best of several sequences; inputs have a dimension of choices after that of samples."""

    kind: ClassVar[str] = "multiple_choice"

    layers: int = option(2, "Linear layers, the last one included.", at_least=1)
    num_choices: int = option(2, "The sequences of each sample.", at_least=1)

    def num_scores(self) -> int:
        return 1

    def num_labels_named(self) -> int:
        return self.num_choices


@config_class
class TaggingHead(LayeredHead):
    """A label for each token."""

    kind: ClassVar[str] = "tagging"

    num_labels: int = option(2, "The labels.", at_least=1)

    def num_scores(self) -> int:
        return self.num_labels


@config_class
class QuestionAnsweringHead(LayeredHead):
    """The first and the last token of an answer."""

    kind: ClassVar[str] = "question_answering"

    def num_scores(self) -> int:
        return 2


@config_class
class DependencyParsingHead(HeadConfig):
    """The head and the relation of each word (Glavaš and Vulić, arXiv 2008.06788)."""

    kind: ClassVar[str] = "dependency_parsing"

    num_labels: int = option(2, "The relations.", at_least=1)
    labels: tuple[str, ...] | None = option(None, "The names of the relations, in their order.")


@config_class
class LanguageModelHead(HeadConfig):
    """Scores of all tokens: linear layers with activation and norm, and then the embeddings of the tokens."""

    layers: int = option(1, "Linear layers, the embeddings included.", at_least=1)
    activation_function: str | None = option("gelu", "Activation after each layer but the last, by name; or none.")
    layer_norm: bool = option(True, "A norm after each layer but the last.")
    bias: bool = option(True, "A bias for each token.")
    shift_labels: bool = option(False, "Whether a position is to give the label of the next one.")
    tied: bool | None = option(
        None,
        "Whether the last layer is the model's input embeddings, frozen; none asks the model's configuration.",
    )


@config_class
class MaskedLMHead(LanguageModelHead):
    """The tokens behind masks, as BERT has it."""

    kind: ClassVar[str] = "masked_lm"

    layers: int = option(2, "Linear layers, the embeddings included.", at_least=1)


@config_class
class CausalLMHead(LanguageModelHead):
    """The next token."""

    kind: ClassVar[str] = "causal_lm"

    layers: int = option(2, "Linear layers, the embeddings included.", at_least=1)
    shift_labels: bool = option(True, "Whether a position is to give the label of the next one.")


@config_class
class Seq2SeqLMHead(LanguageModelHead):
    """The next token of a decoder beside an encoder; labels become its inputs, shifted by one."""

    kind: ClassVar[str] = "seq2seq_lm"

    activation_function: str | None = option(None, "Activation after each layer but the last, by name; or none.")
    layer_norm: bool = option(False, "A norm after each layer but the last.")
    bias: bool = option(False, "A bias for each token.")


KINDS: dict[str, type[HeadConfig]] = {
    config.kind: config
    for config in (
        ClassificationHead,
        MultiLabelHead,
        ImageClassificationHead,
        MultipleChoiceHead,
        TaggingHead,
        QuestionAnsweringHead,
        DependencyParsingHead,
        MaskedLMHead,
        CausalLMHead,
        Seq2SeqLMHead,
    )
}


def read_head(wish: str | Mapping[str, Any] | HeadConfig, /, **settings: Any) -> HeadConfig:
    """The configuration of a head, from a kind, a kind with settings, the data of one, or one.

    Raises `ConfigError` for a kind or a setting that there is not.
    """
    if isinstance(wish, HeadConfig):
        return wish.replace(**settings)
    if isinstance(wish, str):
        phrases = parse(wish)
        if len(phrases) != 1:
            raise ConfigError(f"A head is of one kind; got {len(phrases)} in `{wish}`. Add the heads one by one.")
        kind, values = phrases[0].name, dict(phrases[0].values)
    else:
        values = dict(wish)
        kind = str(values.pop("kind", ""))
    if kind not in KINDS:
        raise ConfigError(f"A head is known by its kind; got `{kind}`. {nearest(kind, KINDS)}")
    return KINDS[kind].from_dict({**values, **settings})


def head_data(config: HeadConfig) -> dict[str, Any]:
    """A configuration as JSON data, which `read_head` reads."""
    return {"kind": config.kind, **config.to_dict()}
