"""What a model with active heads returns: an output class of transformers where there is one, and these two."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import SetupError

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
            raise AttributeError(f"An output of heads has {', '.join(self.keys())}; got `{name}`.")
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values alone."""
        return tuple(self.values())


class MultiHeadOutput(HeadOutput):
    """What several heads returned, each on its rows of the batch: a sequence of their outputs, and values by name.

    `loss` is the sum of the heads' losses; `logits` are joined in the order of the rows where all heads give as many
    scores, and a tuple otherwise.
    """

    def __init__(self, values: Mapping[str, Any] | Any = (), /, *, head_outputs: Sequence[Any] | None = None) -> None:
        super().__init__(values)
        self._of_heads = head_outputs

    @property
    def head_outputs(self) -> Sequence[Any]:
        """What each head returned."""
        if self._of_heads is None:  # accelerate makes a new one of the values, where it changes their precision
            raise SetupError(
                "What each head returned is with the output of the model itself; got a copy of its "
                f"{', '.join(self.keys())}. Read these, or call the model without the wrapper that copies, as that of "
                "mixed precision does."
            )
        return self._of_heads

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.head_outputs[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.head_outputs)

    def __len__(self) -> int:
        return len(self.head_outputs)


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
