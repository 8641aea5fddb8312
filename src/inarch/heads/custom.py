"""Kinds of heads of your own, beside those of `kinds.py`.

@config_class
class RankingHead(HeadConfig):
    # A score for each sequence.

    kind: ClassVar[str] = "ranking"

class Ranking(Head):
    def __init__(self, config, width, dropout):
        super().__init__(config, width, dropout)
        self.out = nn.Linear(width, 1)

    def scores(self, states, given):
        return {"logits": self.out(self.dropout(states.pool("auto")))}

    def loss(self, scores, states, given):
        return margin_ranking(scores["logits"], given["labels"])

register(RankingHead, Ranking)
"""

from ..core.errors import ConfigError
from .kinds import KINDS, HeadConfig
from .layers import HEADS, Head


def register(config: type[HeadConfig], module: type[Head]) -> None:
    """Make a kind of head known, to `add_head` and to what loads adapters. Raises `ConfigError` for a taken name."""
    if not config.kind or KINDS.get(config.kind, config) is not config:
        raise ConfigError(
            f"A head is known by a kind of its own; got {config.kind!r} for {config.__name__}. Set its `kind` to "
            "another word."
        )
    KINDS[config.kind] = config
    HEADS[config] = module
