"""What stands around the layers of a model with adapters: flexible heads behind them, token embeddings before them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .admission import check_name
from .combine import recipe
from .compose import Setup
from .core.errors import SetupError
from .grafted import LOCK, Grafted
from .heads import HeadConfig, read_head
from .heads.layers import Head


class Headed(Grafted):
    """A model with adapters, its flexible heads and its token embeddings."""

    # Flexible heads

    @property
    def flexible_heads(self) -> dict[str, HeadConfig]:
        """The heads that `add_head` added, by name."""
        return {name: self._heads.config(name) for name in self._heads.flexible()}

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of what the active flexible heads learn from, as the model takes it."""
        return self._heads.targets()

    @property
    def active_head(self) -> str | tuple[str, ...] | None:
        """The flexible head that the model runs, or several; None where it gives what its class gives.

        Activating a setup activates the heads of its adapters. Where the setup cuts the batch (`Parallel`,
        `BatchSplit`, `MultiTask`), each of several heads gets the rows of its adapter; otherwise all get all rows.
        """
        active = self._heads.active
        return active[0] if len(active) == 1 else active or None

    @active_head.setter
    def active_head(self, names: str | Sequence[str] | None) -> None:
        with LOCK:
            self._require_attached()
            self._heads.active = (names,) if isinstance(names, str) else tuple(names or ())

    def add_head(
        self, name: str, head: str | Mapping[str, Any] | HeadConfig, *, overwrite: bool = False, **settings: Any
    ) -> None:
        """Give the model a flexible head, and make it the active one. It belongs to the adapter it is trained with.

        The model then takes the head's targets (`labels`, or `start_positions` and `end_positions`, ...) and returns
        its loss and scores. The head of an adapter of the same name becomes active with it.

        Arguments: `head` is a kind, such as `classification` (see `inarch.heads.KINDS`), with its settings:
        `add_head("sst", "classification", num_labels=3)`.

        Raises `SetupError` for a bad or taken name, and `ConfigError` for a head that cannot be.
        """
        with LOCK:
            self._require_attached()
            check_name(name, "A head")
            self._check_new_head(name, overwrite=overwrite)
            self._put_head(name, self._heads.build(read_head(head, **settings)))
            self._heads.active = (name,)

    def remove_head(self, name: str) -> None:
        """Take a flexible head from the model. Raises `SetupError` for one that it does not have."""
        with LOCK:
            self._require_attached()
            with self._rearmed():
                self._heads.drop(name)

    def average_heads(
        self,
        name: str,
        of: Sequence[str] | Mapping[str, float],
        weights: Sequence[float] | None = None,
        *,
        normalize_weights: bool = True,
        overwrite: bool = False,
    ) -> None:
        """Add a flexible head that is the weighted average of others, which are built alike. It is not active.

        Arguments: those of `average`. Raises `SetupError` for heads that there are not, or that differ.
        """
        with LOCK:
            self._require_attached()
            asked = recipe(of, weights, "linear", normalize_weights=normalize_weights, rank=None, density=None, seed=0)
            check_name(name, "A head")
            self._check_new_head(name, overwrite=overwrite)
            self._put_head(name, self._heads.averaged(asked.names, asked.weights))

    @property
    def lone_heads(self) -> tuple[str, ...]:
        """The flexible heads that belong to no adapter, which `save` therefore writes with none."""
        return self._heads.lone(self.names)

    def name_labels(self, head: str, labels: Sequence[str]) -> None:
        """Name the labels of a flexible head, in their order. Raises `ConfigError` for another number of them."""
        with LOCK:
            self._require_attached()
            self._heads.rename_labels(head, labels)

    def heads_of(self, setup: Setup, *, stay: bool = True) -> tuple[str, ...]:
        """The flexible heads that become active with a setup: those of the adapters that have the last word in it.

        Where these have none, the active heads stay so and are named; `stay=False` names none then.
        """
        self._check_setup(setup)
        return self._heads.of_setup(setup, stay=stay)

    def _put_head(self, name: str, built: Head) -> None:
        with self._rearmed():  # what stands in `generate` and sees output embeddings has to see these
            self._heads.put(name, built)

    def _check_new_head(self, name: str, *, overwrite: bool) -> None:
        if name in self._heads.flexible() and not overwrite:
            raise SetupError(
                f"The heads of a model have different names; got `{name}` again. Choose another name, `remove_head` "
                "the old one, or pass `overwrite=True`."
            )

    # Token embeddings

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The names of the token embeddings that the model has; `default` is the base's own table."""
        return self._embeddings.names

    @property
    def active_embeddings(self) -> str:
        """The token embeddings that run."""
        return self._embeddings.active

    def embedding(self, name: str) -> nn.Module:
        """The module that has a table (V, D) as its `weight`. Raises `SetupError` for an unknown name."""
        return self._embeddings.module(name)

    def add_embeddings(
        self, name: str, tokenizer: Any, *, reference: str | None = None, reference_tokenizer: Any = None
    ) -> None:
        """Give the model token embeddings for another tokenizer, and activate them. The base keeps its own.

        An output layer that is not tied to them goes on to score the base's tokens, which is warned of.

        Arguments: rows of tokens that `tokenizer` and `reference_tokenizer` both know are those of the table
        `reference`, such as `default`; all others are drawn anew.

        Raises `SetupError` for a name that is taken, or a model that has no table of tokens.
        """
        with LOCK:
            self._require_attached()
            self._embeddings.add(name, tokenizer, reference, reference_tokenizer)
            self._embeddings.start(name)

    def activate_embeddings(self, name: str) -> None:
        """Run token embeddings from now on; `default` for the base's own. Raises `SetupError` for an unknown name."""
        with LOCK:
            self._require_attached()
            self._embeddings.activate(name)

    def remove_embeddings(self, name: str) -> None:
        """Forget token embeddings; where they are active, the base's own are then. Raises `SetupError` as above."""
        with LOCK:
            self._require_attached()
            self._embeddings.remove(name)
