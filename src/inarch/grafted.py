"""What a model has of adapters, and which of them run: the part of a handle that knows hooks and slots."""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import head_files, state
from .admission import check_composition, check_name, check_present, check_setup, check_streams
from .attach import Removable, arm, disarm, graft, store, stored, tensors_in, ungraft
from .bank import Modules
from .check import Report, impossible, report
from .combine import recipe
from .compose import Batch, Block, Setup, Watched, names
from .core.errors import ConfigError, SetupError, SiteError
from .core.site import Sites
from .embeddings import Embeddings
from .heads import HeadConfig, TrainedHeads, decodes, path_of, read_head
from .heads.layers import Head
from .loading import Found, built
from .merge import Merged
from .methods import AdapterConfig, ConfigLike, InputMethod, PrefixMethod, check_layers, method_of, read_config
from .plan import Plan, plan
from .scores import Scores, watched
from .sites import Inputs
from .summary import rows, summary
from .tensors import copy_into
from .trainable import penalty
from .trainer_door import TrainerDoor
from .trial import check_runs, is_skeleton

logger = logging.getLogger(__name__)

ATTRIBUTE = "_inarch_handle"
LOCK = threading.RLock()


class Grafted:
    """The adapters in one model. A change of what runs is made as a whole, or what ran goes on."""

    def __init__(self, model: nn.Module, sites: Sites, shapes: Inputs | None) -> None:
        """`shapes` are those of inputs that a user has given."""
        self._trainable = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        self.model = model
        self.sites = sites
        self._shapes = shapes
        self._configs: dict[str, AdapterConfig] = {}
        self._unsound: set[str] = set()
        self._heads = TrainedHeads(model, sites, causal=_is_causal(model, sites))
        self._setup: Setup | None = None
        self._skipped: tuple[int, ...] = ()
        self._embeddings = Embeddings(model)
        self._handles: list[Removable] = []
        self._merged = Merged()
        graft(model, sites)
        try:
            self._trainer = TrainerDoor(self)
        except BaseException:
            ungraft(model)
            raise

    # What there is

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they came."""
        return tuple(self._configs)

    @property
    def setup(self) -> Setup | None:
        """What is active: a name, a composition, or None."""
        return self._setup

    def config(self, name: str) -> AdapterConfig:
        """The configuration of one adapter."""
        self._require(name)
        return self._configs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._configs

    def __getitem__(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by their key in an adapter file."""
        self._require(name)
        return {
            f"{site}.{key}": parameter
            for site, modules in stored(self.model, self.sites, name).items()
            for key, parameter in modules.named_parameters()
        }

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All that an adapter file holds of one adapter: its parameters, and what it keeps frozen, such as the random
        matrices of VeRA."""
        self._require(name)
        return tensors_in(stored(self.model, self.sites, name))

    def head(self, name: str) -> dict[str, Tensor]:
        """The task head that was trained with an adapter, parameters and buffers by their key in an adapter file."""
        self._require(name)
        return self._heads.tensors(self._heads[name])

    def modules(self, name: str) -> dict[int, dict[str, nn.Module]]:
        """The modules of one adapter by layer, numbered as for `skip_layers`, and by the role of their site."""
        self._require(name)
        places = {path: number for number, path in enumerate(dict.fromkeys(site.layer_path for site in self.sites))}
        found: dict[int, dict[str, nn.Module]] = {}
        by_key = stored(self.model, self.sites, name)
        for site in self.sites:
            if site.key in by_key:
                found.setdefault(places[site.layer_path], {})[site.role] = by_key[site.key]
        return found

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layers of the model, through all its stacks, numbered as for `skip_layers`."""
        return tuple(map(self.model.get_submodule, dict.fromkeys(site.layer_path for site in self.sites)))

    @property
    def fusions(self) -> tuple[str, ...]:
        """The names of those adapters that are the layers of a `Fuse`."""
        return tuple(name for name, config in self._configs.items() if hasattr(config.parts[0], "regularization"))

    def supports(self, config: ConfigLike) -> bool:
        """Whether the model has a place for a configuration, and can make it. (`check` says why not.)"""
        parsed = read_config(config)
        if impossible(self.sites, parsed) is not None:
            return False
        try:
            for module in self._judge("adapter", parsed).plan.modules:
                module.sketch()
        except (ConfigError, SiteError):
            return False
        return True

    def move(
        self, name: str, *, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Put one adapter and its task head on another device, or into another type."""
        with LOCK:
            self._require(name)
            heads = (self.model.get_submodule(path) for path in self._heads[name])
            for module in (*stored(self.model, self.sites, name).values(), *heads):
                module.to(device=device, dtype=dtype)
            self._arm(self._setup)

    @property
    def heads(self) -> tuple[str, ...]:
        """The modules of the model that belong to a task and not to the base."""
        return self._heads.known()

    def plan(self, setup: Setup | None = None) -> Plan:
        """Every module of the adapters in a setup (all adapters by default), with the formulas of the sites."""
        chosen = self.names if setup is None else names(setup)
        return plan(self.sites, {name: self.config(name) for name in chosen}, setup)

    def summary(self) -> str:
        """A table of the adapters: configuration, parameters, share of the base, state."""
        return summary(self)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of that table as data: counts as numbers, shares of the base, flags (None where in part)."""
        return rows(self)

    def __str__(self) -> str:
        return self.summary()

    # What runs

    @property
    def skipped(self) -> tuple[int, ...]:
        """The layers in which the active setup does not run."""
        return () if self._setup is None else self._skipped

    def activate(self, setup: Setup, *, skip_layers: Iterable[int] = ()) -> None:
        """Run a setup in every forward from now on. Changes no `requires_grad`.

        Arguments: `skip_layers` numbers layers, from 0 through all stacks, that run as if they had no adapter
        (AdapterDrop, Rücklé et al. 2021, arXiv 2010.11918).

        Raises `SetupError` for an unknown name, a composition that cannot run, or one that provably does not keep the
        pre-trained function although each of its adapters does, and `SiteError` for what this model cannot run; what
        was active stays so then.
        """
        with LOCK:
            self._check_setup(setup)
            self._switch(setup, skip_layers)
            self._heads.follow(setup)

    def deactivate(self) -> None:
        """Run the base model as it is."""
        with LOCK:
            self._arm(None)
            self._heads.active = ()

    @contextmanager
    def using(self, setup: Setup | None, *, skip_layers: Iterable[int] = ()) -> Iterator[None]:
        """Activate a setup, or none, for the length of a `with` block, as `activate` does.

        Under checkpointing, layers run again in the backward pass, as they are then: call `backward` in the block.
        Where transformers does the checkpointing, another setup there is refused by name; torch's own `checkpoint`
        around layers of yours runs what is active.
        """
        before, skipped, heads = self._setup, self._skipped, self._heads.active
        if setup is None:
            self.deactivate()
        else:
            self.activate(setup, skip_layers=skip_layers)
        try:
            yield
        finally:
            with LOCK:
                if self.model.__dict__.get(ATTRIBUTE) is self:
                    self._skipped = skipped
                    self._arm(before if before is None or all(name in self for name in names(before)) else None)
                    self._heads.active = tuple(head for head in heads if head in self._heads.flexible())

    @contextmanager
    def trying(self, setup: Setup, inputs: Inputs) -> Iterator[None]:
        """A block as `using`, for inputs that may have been made up: without heads that need more than there is."""
        with self.using(setup):
            self._heads.keep_fed(inputs.kwargs)
            yield

    @contextmanager
    def bare(self) -> Iterator[None]:
        """A block in which no adapter runs, and the heads that ran before."""
        with self._rearmed():
            yield

    @contextmanager
    def prepared(self, task_ids: Any = None) -> Iterator[None]:
        """A block for inputs that you have prepared yourself for the active setup, where inarch cannot.

        A `Parallel` copies what the model is called with. Parts of a model (`get_image_features`, an encoder alone) and
        later calls with a cache are called in this block, with inputs that hold the rows of the first child, then those
        of the second, and so on. `task_ids` are those of a `MultiTask`.
        """
        batch = self._watched_batch()
        if batch is None:
            yield
            return
        with batch.prepared(batch.by_hand(task_ids)):
            yield

    def penalty(self) -> Tensor:
        """What the trained fusion layers of the active setup add to the loss; zero where there are none.

        `AdapterTrainer` adds it by itself.
        """
        chosen = () if self._setup is None else names(self._setup)
        return penalty([modules for name in chosen for modules in stored(self.model, self.sites, name).values()])

    @contextmanager
    def scores(self) -> Iterator[Scores]:
        """A block in which forwards leave what gates and fusion layers of the active setup decide.

        `with adapters.scores() as scores: model(**batch)`; then `scores.gates["a"]` has one number for each sample by
        module, and `scores.fusion["a+b"]` the weights (B, L, N) of the fused adapters. What runs on a part of the batch
        has scores of its part.
        """
        chosen = () if self._setup is None else names(self._setup)
        with watched({name: stored(self.model, self.sites, name) for name in chosen}) as found:
            yield found

    def _watched_batch(self) -> Batch | None:
        """What sees the batch of each forward, where the active setup cuts it."""
        return next((handle.batch for handle in self._handles if isinstance(handle, Watched)), None)

    def _switch(self, setup: Setup, skip_layers: Iterable[int] = ()) -> None:
        """Change the hooks to those of a setup; if that fails, what was active stays so."""
        before, skipped = self._setup, self._skipped
        chosen = tuple(dict.fromkeys(skip_layers))
        check_layers("skip_layers", chosen, self.sites)
        try:
            self._skipped = tuple(sorted(chosen))
            self._arm(setup)
        except BaseException:
            self._skipped = skipped
            self._arm(before)
            raise

    def _arm(self, setup: Setup | None) -> None:
        """Change the hooks to those of a setup; if that fails, none is active."""
        disarm(self.model, self._handles)
        self._setup = None
        self._heads.watch(None, None)
        if setup is None:
            return
        try:
            arm(self.model, self.sites, setup, self._configs, self._handles, skip_layers=self._skipped)
        except BaseException:
            disarm(self.model, self._handles)
            raise
        self._setup = setup
        self._heads.watch(setup, self._watched_batch())

    @contextmanager
    def _rearmed(self) -> Iterator[None]:
        """Have nothing active for the length of a `with` block."""
        setup = self._setup
        self._arm(None)
        try:
            yield
        finally:
            self._arm(setup)

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

    def save_head(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write a flexible head alone. (`save` writes that of an adapter with it.) Raises `StateError` as `save`."""
        self._require_attached()
        config = self._heads.config(name)
        start = f"head.{path_of(name)}."
        tensors = {key.removeprefix(start): tensor for key, tensor in self._heads.tensors([path_of(name)]).items()}
        head_files.write(folder, name, config, tensors)

    def load_head(self, folder: str | os.PathLike[str], *, name: str | None = None, overwrite: bool = False) -> str:
        """Read a flexible head that `save_head` wrote, here or in the library `adapters`. It is not active.

        Arguments: `name` replaces the stored name. Returns the head's name. Raises `StateError` for what does not fit.
        """
        with LOCK:
            self._require_attached()
            chosen, built = self._ready_head(folder, name, overwrite=overwrite)
            self._put_head(chosen, built)
            return chosen

    def _ready_head(self, folder: str | os.PathLike[str], name: str | None, *, overwrite: bool) -> tuple[str, Head]:
        """The name and the module of the head in a folder. Raises for what does not fit; nothing is changed."""
        found, config, tensors = head_files.read(folder, self.model)
        chosen = name or found
        check_name(chosen, "A head")
        self._check_new_head(chosen, overwrite=overwrite)
        built = self._heads.build(config)
        wanted = built.state_dict(keep_vars=True)
        state.check_tensors(tensors, wanted, str(folder))
        for key, tensor in wanted.items():
            copy_into(tensor, tensors[key])
        return chosen, built.requires_grad_(requires_grad=False)

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

    def save_embeddings(self, name: str, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
        """Write token embeddings, and a tokenizer beside them, into a folder, whole or not at all.

        Raises `StateError` if the folder holds something else or cannot be written.
        """
        self._require_attached()
        self._embeddings.save(name, Path(folder).expanduser(), tokenizer)

    def load_embeddings(self, folder: str | os.PathLike[str], *, name: str) -> Any:
        """Read and activate what `save_embeddings` wrote, here or in the library `adapters`.

        Returns the tokenizer that was saved along, or None. Raises `StateError` for what does not fit.
        """
        with LOCK:
            self._require_attached()
            tokenizer = self._embeddings.load(name, Path(folder).expanduser())
            self._embeddings.start(name)
            return tokenizer

    # What comes in

    def _judge(self, name: str, config: AdapterConfig) -> Report:
        """The report on a new adapter. Raises for what could not run, alone or in the active setup it takes part in."""
        verdict = report(self.sites, name, {name: config})
        check_streams(verdict)
        if isinstance(self._setup, Block) and name in names(self._setup) and verdict.sound:
            check_composition(self._setup, self.sites, self._configs | {name: config}, self._unsound - {name})
        return verdict

    def _try(self, name: str, config: AdapterConfig, built: dict[str, Modules]) -> None:
        """Run the model once with an adapter of longer sequences or prefixes, which no site can tell whether it takes.

        Raises `SiteError` where it does not; the model is as it was in any case.
        """
        is_tried = any(issubclass(method_of(part), InputMethod | PrefixMethod) for part in config.parts)
        if not is_tried or is_skeleton(self.model):
            return
        before, config_before, active = stored(self.model, self.sites, name), self._configs.get(name), self._setup
        heads = self._heads.active
        disarm(self.model, self._handles)
        try:
            self._heads.active = ()  # they may need more of a batch than can be made up
            store(self.model, self.sites, name, built)
            self._configs[name] = config
            check_runs(self.model, self._shapes, str(config), lambda on: self._arm(name if on else None))
        finally:
            disarm(self.model, self._handles)
            store(self.model, self.sites, name, before)
            if config_before is None:
                del self._configs[name]
            else:
                self._configs[name] = config_before
            self._heads.active = heads
            self._arm(active)

    def _store(self, name: str, config: AdapterConfig, built: dict[str, Modules], *, sound: bool) -> None:
        """Put built modules in the model, leaving what is active as it was. What cannot run leaves everything so."""
        before, config_before, setup = stored(self.model, self.sites, name), self._configs.get(name), self._setup
        store(self.model, self.sites, name, built)
        self._configs[name] = config
        if setup is not None and name in names(setup):
            try:
                self._arm(setup)
            except BaseException:
                store(self.model, self.sites, name, before)
                assert config_before is not None, "an active adapter has a configuration"
                self._configs[name] = config_before
                self._arm(setup)
                raise
        if any(method_of(part).sees_whole_sequences(part) for part in config.parts) and _is_causal(
            self.model, self.sites
        ):
            logger.warning(
                "The gate of `%s` is a mean over all tokens, so on %s a token sees later ones, and generation with a "
                "cache gives something else than without. The library `adapters` does the same; new adapters of a "
                "causal model are better off with `use_gating=False`.",
                name,
                type(self.model).__name__,
            )
        self._trainer.tell_adapters()
        self._heads.forget(name)
        self._unsound.discard(name)
        if not sound:
            self._unsound.add(name)

    def _ready(self, found: Found, name: str, *, overwrite: bool) -> "_Ready":
        """What was found in a folder, as modules for this model. Raises for what does not fit; nothing is changed."""
        self._check_new(name, overwrite)
        fresh = {head: self._heads.build(config) for head, config in found.flexible.items()}
        given = {head: name if head == found.name else head for head in fresh}
        for head in given.values():
            self._check_new_head(head, overwrite=overwrite)
        wanted = {**self._heads.tensors(found.head), **self._heads.tensors_of(fresh)}
        sound = self._judge(name, found.config).sound
        modules = built(found, self.model, self.sites, wanted)
        self._try(name, found.config, modules)
        heads = {given[head]: module for head, module in fresh.items()}
        return _Ready(name=name, found=found, sound=sound, modules=modules, heads=heads, values=wanted)

    def _take(self, ready: "_Ready") -> None:
        """Put what is ready into the model, and the values of its task head into the model's."""
        name, found = ready.name, ready.found
        if not ready.sound:
            logger.warning(
                "The adapter `%s` does not keep the pre-trained function; see `inarch.attach(model).check()`.", name
            )
        self._store(name, found.config, ready.modules, sound=ready.sound)
        self._heads.keep([name], found.head)
        for key, tensor in ready.values.items():
            copy_into(tensor, found.tensors[key])
        if ready.heads:
            with self._rearmed():
                for own, module in ready.heads.items():
                    self._heads.put(own, module.requires_grad_(requires_grad=False))
        self._heads.assign(name, (*found.head, *map(path_of, ready.heads)))

    # Checks

    def _require(self, name: str) -> None:
        self._require_attached()
        check_present(name, self._configs)

    def _require_attached(self) -> None:
        if self.model.__dict__.get(ATTRIBUTE) is not self:
            raise SetupError(
                f"A handle works on the model it was attached to; got one of {type(self.model).__name__} that was "
                "detached. Call `inarch.attach(model)` for a new one."
            )

    def _check_new(self, name: str, overwrite: bool) -> None:
        self._require_attached()
        check_name(name)
        if name in self._configs and not overwrite:
            raise SetupError(
                f"The adapters of a model have different names; got `{name}` again. Choose another name, `remove` the "
                "old one, or pass `overwrite=True`."
            )
        self._check_unmerged(name)

    def _check_unmerged(self, name: str) -> None:
        if name in self._merged.names:
            raise SetupError(
                f"A merged adapter stays as it is; got `{name}`, which is in the weights. Call `unmerge()` first."
            )

    def _check_setup(self, setup: Setup) -> None:
        self._require_attached()
        if isinstance(setup, str | Block):
            for name in names(setup):
                self._check_unmerged(name)
        check_setup(setup, self.sites, self._configs, self._unsound)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ready:
    """An adapter from a folder, made for a model and not yet in it."""

    name: str
    found: Found
    sound: bool
    modules: dict[str, Modules]
    heads: dict[str, Head]
    """Flexible heads that come with it, by the name that they will have."""
    values: dict[str, Tensor]
    """The tensors of its heads, by their key among those that were found."""


def _is_causal(model: nn.Module, sites: Sites) -> bool:
    """Whether the model generates, or its configuration or some attention of a layer says that it looks back only."""
    layers = (model.get_submodule(site.layer_path) for site in sites)
    generates, config = getattr(model, "can_generate", None), getattr(model, "config", None)
    return (
        getattr(config, "is_decoder", False) is True
        or decodes(model)
        or (callable(generates) and bool(generates()))
        or any(module.__dict__.get("is_causal") is True for layer in layers for module in layer.modules())
    )
