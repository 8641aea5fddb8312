"""Prompt tuning: learned vectors in front of the embedded tokens of a text.

Lester et al. 2021 (arXiv 2104.08691), section 2.

    Y = model([P; X]),  X the embedded tokens, P learned

They go in where the model's own embedding ends (`embedding`), so that tokens keep their positions, as the library
`adapters` has it for BERT and its kin; or among the embedded token ids (`words`), so that all get positions and norms
like tokens, as PEFT has it. `auto` takes the first where an embedding is a module that gives positions, else the
second. Masks, positions and caches know of them; outputs, losses and pooled tokens are those of the user's tokens, at
their places, so a result is as long as what was given. (The library `adapters` gives longer ones; with PEFT a
classifier of BERT pools a prompt.) In an encoder and decoder they stand before the encoder's tokens, behind any
padding, and the decoder attends to them, so `encoder_last_hidden_state` is the one result that is longer.

Initial vectors are uniform in ±0.5, as in the paper and in the library `adapters`, or embeddings of a text's tokens.

Tensors: B batch, L tokens, P prompt vectors, D width of the embedding.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.config import Config, config_class, option
from ..core.errors import ConfigError
from ..core.site import Entry, Sites
from .method import Placement, in_dtype, seed_option
from .ports_input import InputMethod, Point, text_entry

_SCALE = 0.5


@config_class
class PromptConfig(Config):
    """Vectors in front of the tokens of a text."""

    prompt_length: int = option(10, "Number of vectors.", at_least=1, at_most=2**16)
    insert: Literal["auto", "words", "embedding"] = option(
        "auto",
        "Where: among the embedded token ids (`words`), or behind the model's embedding (`embedding`), which gives "
        "tokens their positions; `auto` takes the latter where one module does both.",
    )
    prompt_init: Literal["random_uniform", "from_tokens"] = option(
        "random_uniform", "Initial vectors: uniform in ±0.5, or the embeddings of `prompt_init_ids`."
    )
    prompt_init_ids: tuple[int, ...] = option(
        (), "Token ids of a text, such as `tokenizer(text)['input_ids']`, repeated or cut to the number of vectors."
    )
    init_weights_seed: int | None = seed_option()

    def problems(self) -> list[str]:
        found = []
        if (self.prompt_init == "from_tokens") != bool(self.prompt_init_ids):
            found.append(
                "`PromptConfig.prompt_init_ids` are there for `prompt_init=from_tokens`, and only then; got "
                f"{list(self.prompt_init_ids)} with `prompt_init={self.prompt_init}`. Give both or none."
            )
        return found


class Prompt(InputMethod):
    """The vectors of one model."""

    name = "prompt"
    config_class = PromptConfig
    presets: ClassVar[dict[str, Config]] = {"prompt_tuning": PromptConfig()}

    @classmethod
    def formula(cls, config: PromptConfig, placement: Placement) -> str:  # noqa: ARG003  one place for all
        return f"[P; x], {config.prompt_length} learned tokens"

    @classmethod
    def placements(cls, config: PromptConfig, sites: Sites) -> list[Placement]:
        site, entry = text_entry(cls.name, sites)
        point = cls.point(config, entry)
        if point == "embedding" and entry.embedding is None:
            raise ConfigError(
                "Vectors behind the embedding need a module at which it ends; got none in "
                f"{sites.model_class}, whose `{entry.caller or 'model'}` adds it up itself. Set `insert=words`."
            )
        if point == "words" and not entry.takes_embeddings:
            raise ConfigError(
                f"Vectors among the embedded token ids need a module that takes these; got {sites.model_class}, whose "
                f"`{entry.caller or 'model'}` takes no `inputs_embeds`. Set `insert=embedding`."
            )
        return [Placement(site=site, port="input", entry=entry)]

    @classmethod
    def point(cls, config: PromptConfig, entry: Entry | None) -> Point:
        if config.insert != "auto":
            return config.insert
        return "embedding" if entry is not None and entry.gives_positions else "words"

    @classmethod
    def length(cls, config: PromptConfig) -> int:
        return config.prompt_length

    def __init__(self, config: PromptConfig, placement: Placement, layer: int, generator: Any = None) -> None:
        super().__init__()
        entry = placement.entry
        width = placement.site.width if entry is None else self._width(config, entry)
        self.vectors = nn.Parameter(torch.empty(config.prompt_length, width))
        self._ids = config.prompt_init_ids
        nn.init.uniform_(self.vectors, -_SCALE, _SCALE, generator=generator)

    @classmethod
    def _width(cls, config: PromptConfig, entry: Entry) -> int:
        return entry.words_width if cls.point(config, entry) == "words" else entry.width

    def start_at(self, words: nn.Module) -> None:
        """Take the embeddings of the configured tokens for initial vectors."""
        if not self._ids or self.vectors.is_meta:
            return
        table = next(words.parameters())
        if max(self._ids) >= len(table) or min(self._ids) < 0 or table.shape[1] != self.vectors.shape[1]:
            raise ConfigError(
                "Vectors that start at tokens start at rows of the table of words; got ids from "
                f"{min(self._ids)} to {max(self._ids)} for a table of {tuple(table.shape)} and vectors of width "
                f"{self.vectors.shape[1]} at `PromptConfig.prompt_init_ids`. Give ids of this model's tokenizer."
            )
        count = len(self.vectors)
        ids = (self._ids * (count // len(self._ids) + 1))[:count]
        with torch.no_grad():
            # Accelerate moves tokens to where it brings the table in.
            device = self.vectors.device if table.is_meta else table.device
            self.vectors.copy_(words(torch.tensor(ids, device=device)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, P + L, D)."""
        front = in_dtype(self.vectors, tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat((front, tokens), dim=1)
