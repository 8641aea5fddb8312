"""The modules of flexible heads: from the states of a base model to scores and, with targets, a loss.

(B samples, T tokens, D width, C labels, V vocabulary, N words.) Targets that are -100 do not count.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from ..bank import OutputEmbeddings
from ..core.errors import SetupError
from ..methods import activation
from .kinds import (
    CausalLMHead,
    ClassificationHead,
    DependencyParsingHead,
    HeadConfig,
    ImageClassificationHead,
    LanguageModelHead,
    LayeredHead,
    MaskedLMHead,
    MultiLabelHead,
    MultipleChoiceHead,
    PooledHead,
    QuestionAnsweringHead,
    Seq2SeqLMHead,
    TaggingHead,
)
from .states import States

Targets = Mapping[str, Tensor | None]


class Head(nn.Module):
    """One flexible head."""

    targets: ClassVar[tuple[str, ...]] = ("labels",)
    """The names of what it learns from."""
    extra: ClassVar[tuple[str, ...]] = ()
    """The names of what else it needs of a batch."""
    output: ClassVar[tuple[str, str]] = ("", "")
    """The output classes of transformers, for a plain model and for one of encoder and decoder; empty for none."""

    def __init__(self, config: HeadConfig, width: int, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.width = width
        self.returns: Any = None
        """The class of its output, and which fields that has; none for `HeadOutput`."""
        self.fields: tuple[str, ...] = ()
        self.dropout = nn.Dropout(dropout if config.dropout_prob is None else config.dropout_prob)

    def scores(self, states: States, given: Targets) -> dict[str, Tensor]:
        """The scores by their names in the output."""
        raise NotImplementedError

    def loss(self, scores: Mapping[str, Tensor], states: States, given: Targets) -> Tensor | None:
        """The loss; none without targets."""
        raise NotImplementedError

    def forward(self, states: States, given: Targets) -> dict[str, Any]:
        """What the output holds of this head."""
        scores = self.scores(states, given)
        has_targets = all(given.get(name) is not None for name in self.targets)
        return {"loss": self.loss(scores, states, given) if has_targets else None, **scores}

    def is_fed(self, inputs: Mapping[str, Any]) -> bool:
        """Whether these inputs of the model have what it needs."""
        return all(inputs.get(name) is not None for name in self.extra)

    def start(self, std: float) -> None:
        """Initial weights: normal with that deviation, and biases of zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class _Layered(Head):
    """Layers of the model's width with an activation between them, and one to the scores; dropout before each."""

    config: LayeredHead

    def __init__(self, config: LayeredHead, width: int, dropout: float) -> None:
        super().__init__(config, width, dropout)
        inner = config.layers - 1
        self.dense = nn.ModuleList(nn.Linear(width, width, bias=config.bias) for _ in range(inner))
        self.out = nn.Linear(width, config.num_scores(), bias=config.bias)

    def read(self, states: Tensor) -> Tensor:
        """(..., D) to (..., scores)."""
        act = _activation(self.config.activation_function)
        for layer in self.dense:
            states = act(layer(self.dropout(states)))
        result: Tensor = self.out(self.dropout(states))
        return result


class Pooled(_Layered):
    """Scores of one vector for each sequence."""

    config: PooledHead

    def scores(self, states: States, given: Targets) -> dict[str, Tensor]:
        return {"logits": self.read(states.pool(self.config.pooling))}


class Classification(Pooled):
    """(B, C); cross-entropy, or the squared error of a single number."""

    output = ("SequenceClassifierOutput", "Seq2SeqSequenceClassifierOutput")

    def loss(self, scores: Mapping[str, Tensor], states: States, given: Targets) -> Tensor:
        logits, labels = scores["logits"], _target(given, "labels")
        if logits.shape[-1] == 1:
            return mse_loss(logits.squeeze(-1), labels.reshape(-1).to(logits.dtype))
        return cross_entropy(logits, labels.reshape(-1))


class MultiLabel(Classification):
    """(B, C); binary cross-entropy."""

    def loss(self, scores: Mapping[str, Tensor], states: States, given: Targets) -> Tensor:
        return binary_cross_entropy_with_logits(scores["logits"], _target(given, "labels").to(scores["logits"].dtype))


class ImageClassification(Classification):
    """(B, C)."""

    output = ("ImageClassifierOutput", "ImageClassifierOutput")
    config: ImageClassificationHead

    def loss(self, scores: Mapping[str, Tensor], states: States, given: Targets) -> Tensor:
        if self.config.multilabel:
            return MultiLabel.loss(self, scores, states, given)  # type: ignore[arg-type]  # it reads no more than this has
        return super().loss(scores, states, given)


class MultipleChoice(Pooled):
    """(B, choices) from (B · choices) sequences."""

    output = ("MultipleChoiceModelOutput", "MultipleChoiceModelOutput")
    config: MultipleChoiceHead

    def scores(self, states: States, given: Targets) -> dict[str, Tensor]:
        found = super().scores(states, given)["logits"]
        if len(found) % self.config.num_choices:
            raise SetupError(
                f"A multiple-choice head reads {self.config.num_choices} sequences for each sample; got {len(found)} "
                "sequences in all. Give inputs of shape (samples, choices, tokens)."
            )
        return {"logits": found.view(-1, self.config.num_choices)}

    def is_fed(self, inputs: Mapping[str, Any]) -> bool:
        return any(isinstance(value, Tensor) and value.dim() > 2 for value in inputs.values())

    def loss(self, scores: Mapping[str, Tensor], states: States, given: Targets) -> Tensor:
        return cross_entropy(scores["logits"], _target(given, "labels").reshape(-1))


class Tagging(_Layered):
    """(B, T, C); padding does not count."""

    output = ("TokenClassifierOutput", "TokenClassifierOutput")

    def scores(self, states: States, given: Targets) -> dict[str, Tensor]:
        return {"logits": self.read(states.tokens)}

    def loss(self, scores: Mapping[str, Tensor], states: States, given: Targets) -> Tensor:
        labels = _target(given, "labels")
        if states.mask is not None:
            labels = labels.masked_fill(~states.mask, -100)
        return cross_entropy(scores["logits"].flatten(0, 1), labels.flatten())


class QuestionAnswering(_Layered):
    """Two scores for each token (B, T): whether an answer starts or ends there. Places outside do not count."""

    targets = ("start_positions", "end_positions")
    output = ("QuestionAnsweringModelOutput", "Seq2SeqQuestionAnsweringModelOutput")

    def scores(self, states: States, given: Targets) -> dict[str, Tensor]:
        start, end = self.read(states.tokens).unbind(-1)
        return {"start_logits": start.contiguous(), "end_logits": end.contiguous()}

    def loss(self, scores: Mapping[str, Tensor], states: States, given: Targets) -> Tensor:
        count = states.tokens.shape[1]
        losses = [
            cross_entropy(scores[f"{side}_logits"], _inside(_target(given, f"{side}_positions"), count))
            for side in ("start", "end")
        ]
        return (losses[0] + losses[1]) / 2


def _inside(places: Tensor, count: int) -> Tensor:
    """Places of tokens, those outside as targets that do not count."""
    places = places.reshape(-1)
    return places.masked_fill((places < 0) | (places >= count), -100)


class DependencyParsing(Head):
    """Two biaffine maps of a word and its head, which is another word or the root.

    `word_starts` (B, N) has the place of the first token of each word and, last, that behind the last word; negative
    numbers are padding, there and in `labels_arcs` (B, N), the heads (0 the root), and `labels_rels` (B, N).
    A word is the mean of its tokens, the root the first token.
    """

    targets = ("labels_arcs", "labels_rels")
    extra = ("word_starts",)
    config: DependencyParsingHead

    def __init__(self, config: DependencyParsingHead, width: int, dropout: float) -> None:
        super().__init__(config, width, dropout)
        self.arcs = nn.Parameter(torch.zeros(1, width + 1, width))
        self.rels = nn.Parameter(torch.zeros(config.num_labels, width + 1, width + 1))

    def scores(self, states: States, given: Targets) -> dict[str, Tensor]:
        tokens = self.dropout(states.tokens)
        root = replace(states, tokens=tokens).pool("first")
        words = _words(tokens, _needed(given, "word_starts"))
        heads = torch.cat([root.unsqueeze(1), words], dim=1)
        own, theirs = _with_one(words), _with_one(heads)
        arcs = torch.einsum("bxi,oij,byj->boxy", own, self.arcs, heads).squeeze(1)
        rels = torch.einsum("bxi,oij,byj->bxyo", own, self.rels, theirs)
        return {"rel_preds": rels, "arc_preds": arcs}

    def loss(self, scores: Mapping[str, Tensor], states: States, given: Targets) -> Tensor:
        arcs, rels = _target(given, "labels_arcs"), _target(given, "labels_rels")
        counts = arcs >= 0
        of_words = scores["rel_preds"][counts]  # (words, N + 1, C)
        of_arcs = of_words[torch.arange(len(of_words), device=of_words.device), arcs[counts]]
        return cross_entropy(scores["arc_preds"][counts], arcs[counts]) + cross_entropy(of_arcs, rels[counts])


def _with_one(states: Tensor) -> Tensor:
    return torch.cat([states, torch.ones_like(states[..., :1])], dim=-1)


def _words(tokens: Tensor, starts: Tensor) -> Tensor:
    """(B, N, D): the mean of the tokens of each word, zero for words that there are not."""
    ends = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], -1)], dim=1)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    begins, stops = starts.unsqueeze(-1), ends.unsqueeze(-1)
    inside = ((begins >= 0) & (begins <= place) & (place < stops)).to(tokens.dtype)
    return inside @ tokens / inside.sum(dim=-1, keepdim=True).clamp_min(1.0)


class LanguageModel(Head):
    """(B, T, V): layers, each with activation and norm, and then the embeddings of the tokens.

    The embeddings are the model's, and stay part of it, or a matrix of the head's own where they are not tied.
    """

    config: LanguageModelHead

    def __init__(
        self, config: LanguageModelHead, width: int, dropout: float, *, embeddings: Tensor, eps: float, tied: bool
    ) -> None:
        super().__init__(config, width, dropout)
        vocabulary, size = embeddings.shape
        widths = [width] + [size] * (config.layers - 1)
        if widths[-1] != size:
            raise SetupError(
                f"The last layer of a head is as wide as the embeddings, {size}; got states of {widths[-1]}. "
                "Give it `layers=2`."
            )
        self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(size, eps=eps) for _ in self.dense if config.layer_norm)
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if config.bias else None
        self.output_embeddings = OutputEmbeddings()
        self.embeddings = None if tied else nn.Parameter(embeddings.detach().clone())

    def scores(self, states: States, given: Targets) -> dict[str, Tensor]:
        hidden, act = states.tokens, _activation(self.config.activation_function)
        for number, layer in enumerate(self.dense):
            hidden = act(layer(hidden))
            hidden = self.norms[number](hidden) if self.config.layer_norm else hidden
        if self.embeddings is None and states.scale != 1.0:
            hidden = hidden * states.scale
        embeddings = states.embeddings if self.embeddings is None else self.embeddings
        assert embeddings is not None, "a head with tied embeddings stands on a model that has some"
        hidden = states.in_whole_batch(self.output_embeddings, hidden)
        return {"logits": nn.functional.linear(hidden, embeddings, self.bias)}

    def loss(self, scores: Mapping[str, Tensor], states: States, given: Targets) -> Tensor:
        logits, labels = scores["logits"], _target(given, "labels")
        if self.config.shift_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class MaskedLM(LanguageModel):
    """Targets stand where the masks are."""

    output = ("MaskedLMOutput", "Seq2SeqLMOutput")


class CausalLM(LanguageModel):
    """Targets are the inputs themselves."""

    output = ("CausalLMOutputWithPast", "Seq2SeqLMOutput")


class Seq2SeqLM(LanguageModel):
    """Targets are what the decoder is to say."""

    output = ("Seq2SeqLMOutput", "Seq2SeqLMOutput")


HEADS: dict[type[HeadConfig], type[Head]] = {
    ClassificationHead: Classification,
    MultiLabelHead: MultiLabel,
    ImageClassificationHead: ImageClassification,
    MultipleChoiceHead: MultipleChoice,
    TaggingHead: Tagging,
    QuestionAnsweringHead: QuestionAnswering,
    DependencyParsingHead: DependencyParsing,
    MaskedLMHead: MaskedLM,
    CausalLMHead: CausalLM,
    Seq2SeqLMHead: Seq2SeqLM,
}


def _activation(name: str | None) -> Callable[[Tensor], Tensor]:
    return activation(name) if name is not None else nn.Identity()


def _target(given: Targets, name: str) -> Tensor:
    found = given.get(name)
    assert found is not None, "a loss is asked for where there are targets"
    return found


def _needed(given: Targets, name: str) -> Tensor:
    found = given.get(name)
    if found is None:
        raise SetupError(f"A dependency-parsing head takes `{name}`; got none. Pass it to the model.")
    return found
