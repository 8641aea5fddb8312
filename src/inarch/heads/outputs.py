"""What a model with active heads returns: an output class of transformers where there is one, and these two."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CARRIED = (
    "past_key_values",
    "hidden_states",
    "attentions",
    "decoder_hidden_states",
    "decoder_attentions",
    "cross_attentions",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "encoder_attentions",
)
"""What an output has of the base."""
FIELDS = frozenset({"loss", "logits", "head_outputs", *CARRIED})
"""What may be asked of any output, and is None where it is not there."""


class HeadOutput(dict[str, Any]):
    """Values by name, by attribute and by number, as the outputs of transformers; what is None is left out."""

    def __init__(self, values: Mapping[str, Any] | Any = (), /, **more: Any) -> None:
        super().__init__({key: value for key, value in dict(values, **more).items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name not in self and name not in FIELDS:
            raise AttributeError(f"An output of heads has {', '.join(self)}; got `{name}`.")
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values alone."""
        return tuple(self.values())


class MultiHeadOutput(HeadOutput):
    """What several heads returned, each on its rows of the batch; a number gives the output of that head.

    `loss` is the sum of the heads' losses; `logits` are joined in the order of the rows where all heads give as many
    scores, and a tuple otherwise.
    """

    head_outputs: tuple[Any, ...]

    def __init__(self, values: Mapping[str, Any] | Any = (), /, *, head_outputs: tuple[Any, ...] = ()) -> None:
        super().__init__(values)
        object.__setattr__(self, "head_outputs", tuple(head_outputs))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.head_outputs[key]


def joined(outputs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | tuple[Tensor, ...]:
    """Scores of several heads, with the rows of each, as one tensor in the order of the rows where that can be."""
    scores = [score for score, _ in outputs]
    if any(rows is None for _, rows in outputs) or len({score.shape[1:] for score in scores}) > 1:
        return tuple(scores)
    total = sum(len(score) for score in scores)
    result = scores[0].new_zeros((total, *scores[0].shape[1:]))
    covered = torch.zeros(total, dtype=torch.bool)
    for score, rows in outputs:
        result[rows] = score.to(result.dtype)
        covered[rows] = True
    return result if bool(covered.all()) else tuple(scores)
