"""The input port: a method that changes the sequence of embedded tokens before the layers see it.

Tensors: B batch, L tokens, P tokens that are put in front of them, D width.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.site import Entry, Site, Sites
from .method import AbstractMethod, Placement

Point = Literal["words", "embedding", "layer"]
"""Where a sequence is changed: the embedded token ids, before anything is added to them; what the model's embedding
makes of them; or what enters a layer."""


class InputMethod(AbstractMethod):
    """A method that plugs into the input port."""

    is_invertible: ClassVar[bool] = False
    """Whether `inverse` undoes `forward`; it is applied before the output embeddings then."""

    @classmethod
    @abstractmethod
    def point(cls, config: Any, entry: Entry | None) -> Point:
        """Where the method acts."""

    @classmethod
    def length(cls, config: Any) -> int:  # noqa: ARG003  overriding methods read it
        """P, the tokens that it puts in front of a sequence."""
        return 0

    def start_at(self, words: nn.Module) -> None:
        """Take what initial weights need of the module that embeds token ids."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """The new sequence (B, P + L, D) of a sequence (B, L, D)."""

    def inverse(self, tokens: Tensor) -> Tensor:
        """The sequence of which `forward` makes this one."""
        raise TypeError(f"`{self.name}` has no inverse")

    @classmethod
    def obstacle_to_block(cls, config: Any, placement: Placement, block: str) -> str:
        if block == "Split":
            return "What changes the sequence is one for all tokens of a sample"
        if block == "Average" and cls.is_invertible:
            return "A mean of invertible maps has no inverse"
        return super().obstacle_to_block(config, placement, block)


def text_entry(name: str, sites: Sites) -> tuple[Site, Entry]:
    """The first site of the first stack that reads text, and its entry. Raises `ConfigError` where there is none."""
    first = next((site for site in sites if site.stack.startswith("text")), None)
    entry = None if first is None else sites.entries.get(first.stack)
    if first is None or entry is None or entry.caller is None or entry.words is None:
        raise ConfigError(
            f"`{name}` acts on embedded tokens of text; got {sites.model_class}, in which no stack of layers gets "
            "token ids and embeds them by one table. "
            f"Use a model of text{', or `vpt_deep` for images' if name == 'prompt' else ''}."
        )
    if any(site.stack == first.stack and site.kind == "cross_attention" for site in sites):
        raise ConfigError(
            f"`{name}` acts on the text that a model reads; got {sites.model_class}, whose only text is what its "
            f"decoder writes (`{first.stack}`). Use another method."
        )
    return first, entry
