"""What a model has of adapters, and which of them run: the part of a handle that knows hooks and slots."""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .admission import check_composition, check_name, check_present, check_setup, check_streams
from .attach import Removable, arm, disarm, graft, store, stored, tensors_in, ungraft
from .bank import Modules
from .check import Report, impossible, outline
from .compose import Batch, Block, Setup, Watched, names
from .core.errors import ConfigError, SetupError, SiteError
from .core.site import Sites
from .embeddings import Embeddings
from .heads import TrainedHeads, decodes
from .merge import Merged
from .methods import AdapterConfig, ConfigLike, InputMethod, PrefixMethod, check_layers, method_of, read_config
from .plan import Plan, plan
from .scores import Scores, watched
from .sites import Inputs
from .summary import rows, summary
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
        """Put one adapter and its task head on another device, or into another type.

        Arguments: those of `nn.Module.to`; None leaves that as it is.
        """
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
        """Activate a setup, or none, for the length of a `with` block, as `activate` does; raises as it does.

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
        """What the trained fusion layers of the active setup add to the loss, one number; zero where there are none.

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

    # What comes in

    def _judge(self, name: str, config: AdapterConfig) -> Report:
        """The plan and the proofs of a new adapter.

        Raises for what could not run, alone or in the active setup it takes part in.
        """
        verdict = outline(self.sites, name, {name: config})
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

    def _refuse_merged(self, what: str) -> None:
        """Raise `SetupError` while an adapter is in the weights."""
        if self._merged.names:
            raise SetupError(
                f"{what}; got `{self._merged.names[0]}` in the weights of {type(self.model).__name__}. "
                "Call `unmerge()` first."
            )

    def _check_setup(self, setup: Setup) -> None:
        self._require_attached()
        if isinstance(setup, str | Block):
            for name in names(setup):
                self._check_unmerged(name)
        check_setup(setup, self.sites, self._configs, self._unsound)


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
