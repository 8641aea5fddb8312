"""Other token embeddings for a model: tables for the vocabularies of other tokenizers, in place while active.

A table lies in the model's tree, below its token embeddings, and is put before their weight for the length of each of
their forwards (see `weight.py`), so the base's own table, its state dict and its key stay as they are. Where the
output layer is tied to the token embeddings, it gets the table too.

    embedding.safetensors   the table (V, D), as `weight`;   embedding.pt   the same, as the library `adapters` has it
    tokenizer/              the tokenizer that was saved along

Tensors: V vocabulary, D width of the embeddings.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import state
from .attach import Removable, forget_compiled
from .bank import CHILD
from .convert.weights import read_tensor
from .core.errors import SetupError, StateError, nearest
from .tensors import TRAINABLE
from .weight import Shadows, WeightSlot

logger = logging.getLogger(__name__)

DEFAULT = "default"
SAFE, TORCH, TOKENIZER = "embedding.safetensors", "embedding.pt", "tokenizer"
FILES = state.Files(SAFE, TOKENIZER, (TORCH,), "a table of embeddings")
_STD = 0.02


class Table(nn.Module):
    """The embeddings of one vocabulary."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class Tables(nn.ModuleDict):
    """The child of the token embeddings: tables by name."""


@dataclass(slots=True)
class _Role:
    """A table in the place of a weight."""

    table: Table

    @property
    def modules(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"table": [self.table]}

    def apply(self, weight: Tensor) -> Tensor:
        return self.table.weight


@dataclass(slots=True)
class Embeddings:
    """The tables of one model, and the active one."""

    model: nn.Module
    active: str = DEFAULT
    handles: list[Removable] = field(default_factory=list)
    home: nn.Module | None = None
    """The token embeddings, once there are tables."""
    vocabulary: int | None = None
    """`config.vocab_size` of the base, while it is that of a table."""

    # What there is

    @property
    def tables(self) -> Mapping[str, Table]:
        """The tables, without the base's own."""
        found = None if self.home is None else self.home._modules.get(CHILD)
        return {key: one for key, one in found.items() if isinstance(one, Table)} if isinstance(found, Tables) else {}

    @property
    def names(self) -> tuple[str, ...]:
        """All that can be active."""
        return (DEFAULT, *self.tables)

    def module(self, name: str) -> nn.Module:
        """What holds a table (V, D) as its `weight`. Raises `SetupError` for an unknown name."""
        if name == DEFAULT:
            return self._home()
        self._require(name)
        return self.tables[name]

    def weight(self, name: str) -> Tensor:
        """A table, (V, D). Raises `SetupError` for an unknown name."""
        found = self.module(name)._parameters.get("weight")
        assert found is not None
        return found

    # Changes

    def add(self, name: str, tokenizer: Any, reference: str | None, reference_tokenizer: Any) -> None:
        """Make a table for a tokenizer: normal 0.02, and rows of `reference` where both tokenizers know a token."""
        self._check_new(name)
        if (reference is None) != (reference_tokenizer is None):
            raise SetupError(
                "Rows are copied from a table by its tokenizer; got "
                f"{'`reference`' if reference is not None else '`reference_tokenizer`'} alone for `{name}`. Give both, "
                "or neither."
            )
        own = self.weight(DEFAULT)
        source = None if reference is None else self.weight(reference)
        weight = torch.empty(len(tokenizer), own.shape[1], dtype=own.dtype, device=own.device).normal_(std=_STD)
        if source is not None:
            ours, theirs = tokenizer.get_vocab(), reference_tokenizer.get_vocab()
            pairs = [(ours[token], theirs[token]) for token in ours.keys() & theirs.keys()]
            pairs = [(to, of) for to, of in pairs if of < len(source) and to < len(weight)]
            if pairs:
                to, of = (torch.tensor(places, device=own.device) for places in zip(*sorted(pairs), strict=True))
                weight[to] = source.detach()[of].to(weight)
        self._put(name, weight)

    def activate(self, name: str) -> None:
        """Use a table from now on. What was active stays so where that cannot be done."""
        if name != DEFAULT:
            self._require(name)
            self._check_output(name)
            self._tell_output(name)
        self._release()
        self.active = name
        if name == DEFAULT:
            return
        table = self.tables[name]
        for module in self._readers():
            slot = WeightSlot("the token embeddings", {"weight": [_Role(table)]})
            self.handles += [
                module.register_forward_pre_hook(slot.enter, prepend=True),
                module.register_forward_hook(slot.leave, always_call=True),
                Shadows(module, ("weight",)),
            ]
        config: Any = getattr(self.model, "config", None)
        if self._is_tied() and hasattr(config, "vocab_size"):  # by which a loss takes logits apart
            self.vocabulary, config.vocab_size = config.vocab_size, len(table.weight)
        forget_compiled()

    def start(self, name: str) -> None:
        """Use a table that has just come, or forget it where that cannot be done."""
        try:
            self.activate(name)
        except BaseException:
            self.remove(name)
            raise

    def remove(self, name: str) -> None:
        """Forget a table; the base's own is active if it was."""
        self._require(name)
        if self.active == name:
            self.activate(DEFAULT)
        assert self.home is not None
        tables = self.home._modules[CHILD]
        assert isinstance(tables, Tables)
        del tables[name]
        if not tables:
            delattr(self.home, CHILD)
            self.home = None

    def clear(self) -> None:
        """Leave the model as it was."""
        for name in tuple(self.tables):
            self.remove(name)

    # Files

    def save(self, name: str, folder: Path, tokenizer: Any) -> None:
        """Write a table, and a tokenizer beside it, whole or not at all: what the folder held of both goes."""

        def beside(draft: Path) -> None:
            if tokenizer is not None:
                tokenizer.save_pretrained(draft / TOKENIZER)

        state.write(folder, {"weight": self.weight(name).detach()}, None, FILES, beside=beside)

    def load(self, name: str, folder: Path) -> Any:
        """Read a table, of ours or of the library `adapters`. Returns the tokenizer that lies beside it, or None."""
        self._check_new(name)
        weight, own = read_tensor(folder, SAFE, TORCH, "weight"), self.weight(DEFAULT)
        if weight.dim() != 2 or weight.shape[1] != own.shape[1]:
            raise StateError(
                f"Embeddings are as wide as those of the model, {own.shape[1]}; got a table of shape "
                f"{tuple(weight.shape)} at `{folder}`. Load them into a model of their width."
            )
        tokenizer = _tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else None
        self._put(name, weight.to(own))
        return tokenizer

    # Parts of the model

    def _home(self) -> nn.Module:
        get = getattr(self.model, "get_input_embeddings", None)
        try:
            found: nn.Module | None = get() if callable(get) else None
        except (NotImplementedError, AttributeError):
            found = None
        weight = None if found is None else found._parameters.get("weight")
        if found is None or weight is None or weight.dim() != 2 or weight.dtype not in TRAINABLE:
            raise SetupError(
                "Embeddings are exchanged where a model has a table of tokens in floating point "
                f"(`get_input_embeddings`); got none in {type(self.model).__name__}. Use a model of text."
            )
        return found

    def _readers(self) -> Iterator[nn.Module]:
        """Every module that reads the base's table: the token embeddings, shared ones, and a tied output layer."""
        own = self.weight(DEFAULT)
        yield from (module for module in self.model.modules() if module._parameters.get("weight") is own)

    def _is_tied(self) -> bool:
        return any(not isinstance(module, nn.Embedding) for module in self._readers())

    def _tell_output(self, name: str) -> None:
        """Warn of an output layer that is not tied to the token embeddings, and so has no part in a table."""
        get = getattr(self.model, "get_output_embeddings", None)
        found = get() if callable(get) else None
        if isinstance(found, nn.Module) and found._parameters.get("weight") is not self.weight(DEFAULT):
            path = next((path for path, module in self.model.named_modules() if module is found), "the output layer")
            logger.warning(
                "`%s` of %s, which is not tied to the token embeddings, goes on to score the base's tokens, not those "
                "of `%s`. Train a head for them, or use the hidden states.",
                path,
                type(self.model).__name__,
                name,
            )

    def _check_output(self, name: str) -> None:
        rows, own = len(self.tables[name].weight), len(self.weight(DEFAULT))
        if not self._is_tied() or rows == own:
            return
        for tensor in (*(module._parameters.get("bias") for module in self._readers()), *self.model._buffers.values()):
            if tensor is not None and tensor.dim() and tensor.shape[-1] == own:
                raise SetupError(
                    "An output layer that is tied to the token embeddings has no bias of its own, or one for each "
                    f"token; got {own} numbers for the {rows} tokens of `{name}` at {type(self.model).__name__}. "
                    "Use the model without its output layer, or a table with as many tokens."
                )

    def _put(self, name: str, weight: Tensor) -> None:
        home = self._home()
        if home._modules.get(CHILD) is None:
            home.add_module(CHILD, Tables())
        tables = home._modules[CHILD]
        assert isinstance(tables, Tables)
        tables[name] = Table(weight)
        self.home = home

    def _release(self) -> None:
        for handle in reversed(self.handles):
            handle.remove()
        self.handles.clear()
        if self.vocabulary is not None:
            config: Any = self.model.config
            config.vocab_size, self.vocabulary = self.vocabulary, None
        forget_compiled()

    def _require(self, name: str) -> None:
        if name not in self.tables:
            known = nearest(name, self.names)
            raise SetupError(f"Embeddings must be added before they are used; got `{name}`. {known}")

    def _check_new(self, name: str) -> None:
        if name in self.names or not isinstance(name, str) or not name or "." in name:
            raise SetupError(
                f"The embeddings of a model have different names, without `.`; got {name!r}. Choose another name."
            )


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder. Raises `StateError` where it cannot be read, or only by code that lies there."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  tokenizers fail in as many ways as their files can be damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StateError(
            f"The tokenizer beside embeddings must be one of transformers; got `{folder}`: {reason} Move it elsewhere, "
            "and load the table alone."
        ) from None
