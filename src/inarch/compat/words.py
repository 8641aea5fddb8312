"""What errors of inarch name, in the words that are typed here: the one place where they are translated."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import InarchError

_OURS = "`inarch.attach(model)."
WORDS: dict[str, str] = {
    "`remove` the old one": "`delete_adapter` the old one",
    "`remove_head` the old one": "`delete_head` the old one",
    "`overwrite=True`": "`overwrite_ok=True`",
    "`add_fusion(": "`add_adapter_fusion(",
    "with `add_fusion`": "with `add_adapter_fusion`",
    "Call `deactivate()`": "Call `set_active_adapters(None)`",
    "Call `unmerge()`": "Call `reset_adapter()`",
    "`detach(": f"{_OURS}detach(",
    "`adapters.active_head`": "`model.active_head`",
    "`share([...])`": "`share_parameters([...])`",
    "`save` wrote": "`save_adapter` wrote",
    "`save` writes": "`save_adapter` writes",
    "`load` reads": "`load_adapter` reads",
    "`save_setup` writes": "`save_adapter_setup` writes",
    "to `save_setup`": "to `save_adapter_setup`",
    "`head=False`": "`with_head=False`",
    "Load with `head=False`": f"Call {_OURS}load_setup(folder, head=False)`",
    "pass `head=False` to `train`": f"call {_OURS}train(name, head=False)`",
    'pass `other_base="allow"`': f'call {_OURS}load(folder, other_base="allow")`',
    'pass `unsound="allow"` to `add`': f'call {_OURS}add(name, config, unsound="allow")`',
    "pass a `tolerance`": f"call {_OURS}merge(name, tolerance=...)`",
    "`combine` is one of": "`combine_strategy` is one of",
    "`negate_b`": "`lora_linear_only_negate_b`",
    "`svd`": "`lora_delta_w_svd`",
    "`rank` cuts off": "`svd_rank` cuts off",
    "`adapters = inarch.attach(model)`, `adapters.add(...)` and": "`model.add_adapter(...)` and",
    "`adapters.train(": "`model.train_adapter(",
}
"""By what an error says, what it says here."""
_ANY = re.compile("|".join(map(re.escape, sorted(WORDS, key=len, reverse=True))))


def told(message: str) -> str:
    """A message of inarch in the words of this door."""
    return _ANY.sub(lambda found: WORDS[found[0]], message)


@contextmanager
def own_words() -> Iterator[None]:
    """A block whose errors name what is typed here."""
    try:
        yield
    except InarchError as error:
        error.args = (told(str(error)),)
        raise
