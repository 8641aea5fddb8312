"""Documents in a made language: no text of anybody's, the same on every machine.

Content words belong to a theme and a part of speech, and stand in sentences of a few fixed forms. A document has a
title; a title stands for three themes, and most content words of the document are from them. Who has learned which
words share a theme can tell the titles of few documents apart, and who has not must see every word. Pre-training uses
40 titles; the ten of `labelled_documents`, which a text classifier is to learn, are others.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# Words

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FUNCTION_WORDS = ("the", "a", "of", "in", "and", "that", ".")
NUM_THEMES = 16
PARTS = {"N": 80, "V": 40, "A": 40}  # words of a theme, by part of speech: nouns, verbs, adjectives
SYLLABLES = tuple(first + second for first in "bdfgklmnprstvwyz" for second in "aeiou")


def content_word(index: int) -> str:
    """Two syllables; 6,400 words until they repeat, neighbours unlike each other."""
    first, second = divmod(index * 4_999 % len(SYLLABLES) ** 2, len(SYLLABLES))
    return SYLLABLES[first] + SYLLABLES[second]


NUM_CONTENT_WORDS = NUM_THEMES * sum(PARTS.values())
WORDS = (*SPECIAL, *FUNCTION_WORDS, *(content_word(index) for index in range(NUM_CONTENT_WORDS)))
FIRST_CONTENT_WORD = len(SPECIAL) + len(FUNCTION_WORDS)
CLS, SEP, MASK = (WORDS.index(word) for word in ("[CLS]", "[SEP]", "[MASK]"))

# ----------------------------------------------------------------------------------------------------------------------
# Documents

SENTENCES = ("the A N V the A N .", "a N of the N V N .", "N and N V in the N .", "the N that V a N V .")
NUM_SENTENCES = 3  # of a document
LENGTH = 1 + NUM_SENTENCES * 8 + 1  # words of a document with [CLS] and [SEP]; all have as many
STRAY = 0.3  # share of the content words that are of any theme

TITLES = tuple(itertools.combinations(range(NUM_THEMES), 3))
_ORDER = torch.randperm(len(TITLES), generator=torch.Generator().manual_seed(0)).tolist()
TRAINING_TITLES = tuple(TITLES[index] for index in _ORDER[:40])
NEW_TITLES = tuple(TITLES[index] for index in _ORDER[40:50])

_OFFSETS = dict(zip(PARTS, itertools.accumulate(PARTS.values(), initial=0), strict=False))
# By form and place: the word there, or the first word and the number of words of the part of speech.
_FIXED = torch.tensor([[WORDS.index(w) if w in FUNCTION_WORDS else -1 for w in s.split()] for s in SENTENCES])
_OFFSET = torch.tensor([[_OFFSETS.get(word, 0) for word in sentence.split()] for sentence in SENTENCES])
_SIZE = torch.tensor([[PARTS.get(word, 1) for word in sentence.split()] for sentence in SENTENCES])


def write(titles: Tensor, generator: torch.Generator) -> Tensor:
    """A document (LENGTH words, as indices into `WORDS`) for each row of themes: (n, 3) to (n, LENGTH)."""
    n = len(titles)
    forms = torch.randint(len(SENTENCES), (n, NUM_SENTENCES), generator=generator)
    fixed, offset, size = (table[forms].flatten(1) for table in (_FIXED, _OFFSET, _SIZE))
    own = titles.gather(1, torch.randint(titles.shape[1], fixed.shape, generator=generator))
    stray = torch.randint(NUM_THEMES, fixed.shape, generator=generator)
    theme = torch.where(torch.rand(fixed.shape, generator=generator) < STRAY, stray, own)
    rank = (torch.rand(fixed.shape, generator=generator) * size).long()
    content = FIRST_CONTENT_WORD + theme * sum(PARTS.values()) + offset + rank
    words = torch.where(fixed < 0, content, fixed)
    return F.pad(F.pad(words, (1, 0), value=CLS), (0, 1), value=SEP)


def labelled_documents(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Documents of the ten new titles: (number, LENGTH) and the title's index of each, as even as can be."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % len(NEW_TITLES)
    labels = labels[torch.randperm(number, generator=generator)]
    return write(torch.tensor(NEW_TITLES)[labels], generator), labels


# ----------------------------------------------------------------------------------------------------------------------
# The task

NUM_HELD_OUT = 2_000


class MaskedWords:
    """Filling in words that are hidden, and naming the title, as BERT learned from masked words and pairs of texts."""

    num_classes = len(TRAINING_TITLES)

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.titles = torch.tensor(TRAINING_TITLES)
        self.held_out, self.held_out_labels = self._documents(
            NUM_HELD_OUT, torch.Generator().manual_seed(seed + 1_000_000)
        )

    def _documents(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(len(self.titles), (number,), generator=generator)
        return write(self.titles[labels], generator), labels

    def loss(self, model: nn.Module, size: int, progress: float) -> tuple[Tensor, Tensor]:
        """The sum of both losses, and the accuracy of the titles, on fresh documents."""
        words, labels = self._documents(size, self.generator)
        chosen = (torch.rand(words.shape, generator=self.generator) < 0.15) & (words != CLS) & (words != SEP)
        # As in BERT: four of five chosen words are hidden, one of ten is another word, one of ten is left.
        fate = torch.rand(words.shape, generator=self.generator)
        other = torch.randint(len(SPECIAL), len(WORDS), words.shape, generator=self.generator)
        shown = torch.where(chosen & (fate < 0.8), MASK, torch.where(chosen & (fate >= 0.9), other, words))
        read = model.bert(input_ids=shown)
        # Of the words, those that are to be told only: the vocabulary is wide.
        masked = F.cross_entropy(model.cls.predictions(read.last_hidden_state[chosen]), words[chosen])
        logits = model.cls.seq_relationship(read.pooler_output)
        return masked + F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()

    def held_out_accuracy(self, model: nn.Module) -> float:
        """Share of documents, never trained on, whose title is named."""
        logits = [model(input_ids=some).seq_relationship_logits for some in self.held_out.split(256)]
        return (torch.cat(logits).argmax(-1) == self.held_out_labels).float().mean().item()
