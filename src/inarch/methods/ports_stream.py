"""The port of the stream after a layer: what a method is given there, and where it may stand.

Tensors: B batch, L tokens, D width. A stream is (B, L, D), or (L, B, D) where the model has samples second.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.site import Site, Sites
from .method import AbstractMethod, Placement

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Span:
    """Where the tokens of a call stand, the same in every sample: sequences without padding."""

    start: int
    """How many tokens of the sequence came in earlier calls."""
    count: int
    """The tokens of this call."""
    prompt: int
    """The tokens of the prompt: what was given, and not generated."""


Tokens = Span | Tensor
"""Where the tokens of a call stand: a `Span`, or whole numbers (B, L, 2), or (L, B, 2), that say of every token how
many tokens of its sequence come before it, and how many of its prompt after it; -1 for padding, and behind the prompt.
"""


class StreamMethod(AbstractMethod):
    """A method that rewrites the stream after a layer. Its module lives at the last site of the layer."""

    minds_end: bool = False
    """Whether it matters where a prompt ends."""

    @abstractmethod
    def forward(self, stream: Tensor, tokens: Tokens) -> Tensor:
        """The new stream (B, L, D) from the layer's."""


def stream_placements(sites: Sites) -> list[Placement]:
    """A placement for the stream after every layer. Raises `ConfigError` where a layer gives none that can be told."""
    last: dict[tuple[str, int], Site] = {(site.stack, site.layer): site for site in sites}
    homes: dict[str, set[tuple[str, int]]] = {}
    for site in sites:
        homes.setdefault(site.layer_path, set()).add((site.stack, site.layer))
    for site in sites:
        if site.feature_dim != -1:
            problem = "feature maps (B, D, H, W)"
        elif len(homes[site.layer_path]) > 1:
            problem = "one module that runs several layers"
        elif site.output.path == "" and site.output.side == "out" and site.layer_class != "Sequential":
            problem = "a layer whose branch is added outside of it"
        elif site.layer_class in ("ModuleList", "ModuleDict"):
            problem = f"a `{site.layer_class}`, which is never called"
        else:
            continue
        raise ConfigError(
            "An adapter of the stream needs layers that give a sequence (B, L, D) each; got "
            f"{problem} at `{site.key}` (`{site.layer_path}`) of {sites.model_class}. Use another method there."
        )
    return [Placement(site=site, port="stream") for site in last.values()]


def rewritten(stream: Tensor, tokens: Tokens, first: tuple[int, Change], final: tuple[int, Change], dim: int) -> Tensor:
    """The stream with a change of the first tokens of every sample, and one of the last tokens of its prompt.

    Arguments: `first` and `final` say how many tokens, and the change. A token of both has the final one. `dim` is the
    dimension of the stream that counts tokens.
    """
    if isinstance(tokens, Span):
        return _by_pieces(stream, tokens, first, final, dim)
    before, after = tokens.unbind(-1)
    is_final = (after >= 0) & (after < final[0])
    is_first = (before >= 0) & (before < first[0]) & ~is_final
    for (count, change), chosen in ((first, is_first), (final, is_final)):
        if count:
            stream = torch.where(chosen.unsqueeze(-1), change(stream), stream)
    return stream


def _by_pieces(stream: Tensor, span: Span, first: tuple[int, Change], final: tuple[int, Change], dim: int) -> Tensor:
    def here(place: int) -> int:
        return min(max(place - span.start, 0), span.count)

    end, stop = here(first[0]), here(span.prompt)
    start = here(span.prompt - final[0])
    pieces = ((0, min(end, start), first[1]), (start, stop, final[1]), (stop, max(end, stop), first[1]))
    found, done = [], 0
    for begin, finish, change in pieces:
        if begin == finish:
            continue
        if done < begin:
            found.append(stream.narrow(dim, done, begin - done))
        found.append(change(stream.narrow(dim, begin, finish - begin)))
        done = finish
    if not found:
        return stream
    if done < span.count:
        found.append(stream.narrow(dim, done, span.count - done))
    return found[0] if len(found) == 1 else torch.cat(found, dim)
