"""The handle on a model with adapters: adds, trains, activates, saves and removes them.

All state of a handle is part of the model's object tree, so a deep copy or a pickle of the model has a handle of its
own, found by `inarch.attach(copy)`. Forward passes may run in several threads at once; what changes the model (`add`,
`train`, `activate`, `load`, ...) takes a lock, and holds for every thread: do not switch adapters while another thread
runs a forward of the same model.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from . import loading, pretrained, state
from .admission import check_no_fusion, check_word, refusal
from .attach import build, discard, stored, ungraft
from .bank import SiteSlot
from .check import Data, Report, Stored, Training, examine, impossible, model_facts, report
from .combine import Combination, average, combined_config, recipe
from .compose import Fuse, Setup, fusions, last, leaves, names
from .core.errors import ConfigError, SetupError, SiteError, StateError
from .core.site import Sites
from .filed import Filed
from .grafted import ATTRIBUTE, LOCK
from .heads import task_head
from .merge import check_mergeable, merge
from .methods import AdapterConfig, ConfigLike, fused_places, method_of, placements, read_config, read_settings
from .methods.prefix import Prefix, PrefixConfig
from .plan import check_setup as check_blocks
from .plan import plan
from .sharing import share, unshare
from .sites import Inputs, given_inputs, probe, synthesise
from .tensors import copy_into
from .trainable import check_trainable
from .witness import tell_left_alone, verify_attached

Unsound = Literal["refuse", "allow"]


def attach(
    model: nn.Module, *, layout: Mapping[str, Any] | Sites | str | None = None, example_inputs: Any = None
) -> "Adapters":
    """Find the residual sites of a model and make it ready for adapters. The model computes what it did.

    Attach the model that you save: a larger one around it has the adapters in its `state_dict`, so `save_pretrained` of
    that one writes them among its own tensors, and `from_pretrained` tells of them as unexpected.

    Arguments: `model` is any PyTorch Transformer; `layout` gives its sites instead of finding them, as data or as a
    JSON file (see `Sites.to_dict`); `example_inputs`, what the model is called with, is needed where none can be made
    up.

    Returns the model's handle, the same one each time. Raises `SiteError` if a residual branch cannot be found, reached
    or trusted; the model is then as it was.
    """
    model = unwrap(model)
    with LOCK:
        handle = model.__dict__.get(ATTRIBUTE)
        if isinstance(handle, Adapters):
            if layout is not None:
                raise SiteError(
                    f"A layout is given when a model is attached first; got one for {type(model).__name__}, which is "
                    "attached already. Call `detach()` first, or leave the layout out."
                )
            return handle
        if any(isinstance(module, SiteSlot) for module in model.modules()):
            raise SiteError(
                "A model has one handle, at the module it was attached to; got a part of an attached model, or a model "
                f"around one: {type(model).__name__}. Use the handle of the whole model, or `detach()` it first; "
                "copy a part of it after that."
            )
        sites = probe(model, layout=layout, example_inputs=example_inputs)
        if layout is None:
            tell_left_alone(sites)
        if not any(parameter.is_meta for parameter in model.parameters()):
            verify_attached(model, sites, example_inputs)
        shapes = None if example_inputs is None else given_inputs(example_inputs).to("meta")
        return Adapters(model, sites, shapes)


def _batch(model: nn.Module, example_inputs: Any) -> Inputs | None:
    """The inputs that are given, or such as can be made up; None where they cannot."""
    if example_inputs is not None:
        return given_inputs(example_inputs)
    made = synthesise(model)
    return Inputs((), made) if made else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data-parallel wrappers."""
    if not isinstance(model, nn.Module):
        raise SiteError(
            f"A model is a PyTorch module, `torch.nn.Module`; got {type(model).__name__}. Load the model, and pass it."
        )
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def check(
    model: nn.Module,
    config: ConfigLike | None = None,
    *,
    layout: Any = None,
    example_inputs: Any = None,
    training: Training | None = None,
    data: Data | None = None,
    measure: bool = True,
) -> Report:
    """Prove what adapters make of a model's function, measure it on one small batch, and name all that will go wrong.

    The model is left untouched; nothing needs to be attached. Arguments: `config` is a configuration to judge, or the
    folder or Hub repository of an adapter of ours, of the library `adapters` or of PEFT, which is read as `load` reads
    it; without either, the active setup of the model is judged. `example_inputs` is the batch; without it, one is made
    up where that can be done. `training` and `data` say what is known of the training to come. `measure=False` runs
    nothing but the probe.

    Raises `SiteError`, `ConfigError`, `SetupError` or `StateError` for what could not even be attached, read, added or
    activated.
    """
    model = unwrap(model)
    with LOCK:
        handle = attached(model)
        if handle is None and config is None:
            raise SetupError(
                f"There must be something to check; got no configuration and no adapters on {type(model).__name__}. "
                "Pass a configuration, as in `inarch.check(model, 'seq_bn')`."
            )
        if handle is not None:
            return handle.check(config, example_inputs=example_inputs, training=training, data=data, measure=measure)
        assert config is not None
        if not measure and not loading.is_source(config):
            sites = probe(model, layout=layout, example_inputs=example_inputs)
            parsed, wrong = read_settings(config)
            if (verdict := impossible(sites, parsed, wrong)) is not None:
                return verdict
            known = model_facts(model, {}, (), task_head(model, sites), attached=False)
            verdict = report(sites, "adapter", {"adapter": parsed}, model=known, training=training, data=data)
            for module in verdict.plan.modules:  # what cannot be made is refused here, as `add` does
                module.sketch()
            return verdict
        handle = attach(model, layout=layout, example_inputs=example_inputs)
        try:
            return handle.check(config, example_inputs=example_inputs, training=training, data=data, measure=measure)
        finally:
            handle.detach()


class Adapters(Filed):
    """The adapters of one model. Made by `inarch.attach`.

    Each method raises `SetupError` for the name of an adapter that there is not, and on a handle that was detached.
    """

    def __init__(self, model: nn.Module, sites: Sites, shapes: Inputs | None = None) -> None:
        super().__init__(model, sites, shapes)
        self._pretrained = pretrained.Door(self, self._trainer.as_base)
        setattr(model, ATTRIBUTE, self)

    # Proof and measurement

    def check(
        self,
        config: ConfigLike | None = None,
        *,
        example_inputs: Any = None,
        training: Training | None = None,
        data: Data | None = None,
        measure: bool = True,
    ) -> Report:
        """What `inarch.check` does, for a configuration or, without one, for the active setup or the only adapter.

        Raises as it does.
        """
        with LOCK:
            inputs = _batch(self.model, example_inputs) if measure else None
            if config is not None and loading.is_source(config):
                assert isinstance(config, str | os.PathLike)
                return self._check_stored(config, inputs, training, data)
            if config is not None:
                parsed, wrong = read_settings(config)
                if (verdict := impossible(self.sites, parsed, wrong)) is not None:
                    return verdict
                with self._on_trial(parsed) as name:
                    return examine(self, name, self._configs, inputs, on_trial=True, training=training, data=data)
            if self._setup is None and len(self._configs) != 1:
                raise SetupError(
                    f"There must be one thing to check; got no active setup and {len(self._configs)} adapters. "
                    "Activate a setup first, or pass a configuration to `inarch.check`."
                )
            setup = self._setup or self.names[0]
            return examine(self, setup, self._configs, inputs, on_trial=False, training=training, data=data)

    def _check_stored(
        self, source: str | os.PathLike[str], inputs: Inputs | None, training: Training | None, data: Data | None
    ) -> Report:
        """The report on a stored adapter, with its weights and without its task head."""
        with loading.opened(source) as folder:
            return self._check_folder(folder, inputs, training, data)

    def _check_folder(
        self, folder: Path, inputs: Inputs | None, training: Training | None, data: Data | None
    ) -> Report:
        def find(*, head: bool) -> loading.Found:
            return loading.find(folder, self.model, self.sites, heads=self.heads, head=head, other_base="tell")

        problem, found = "", find(head=False)
        try:
            whole = find(head=True)
            paths = tuple(f"head.{path}." for path in whole.head)
            heads = {key: tensor for key, tensor in whole.tensors.items() if key.startswith(paths)}
            state.check_tensors(heads, self._heads.tensors(whole.head), str(folder))
        except StateError as error:
            problem = str(error)
        own = str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or "")
        known = Stored(difference=found.difference, base=found.base, model=own, head=problem, idle=found.idle)
        with ExitStack() as trial:
            try:
                name = trial.enter_context(self._on_trial(found.config))
                state.check_tensors(found.tensors, self.tensors(name), str(folder))
            except (ConfigError, StateError):
                if not found.difference:
                    raise
                words = f"{found.difference[0].upper()}{found.difference[1:]}"
                raise StateError(f"{words}, at `{folder}`. Check it on the base that it was trained on.") from None
            for key, tensor in self.tensors(name).items():
                copy_into(tensor, found.tensors[key])
            return examine(
                self, name, self._configs, inputs,
                on_trial=True, training=training, data=data, stored=known, out_of_range=found.out_of_range,
            )  # fmt: skip

    @contextmanager
    def _on_trial(self, config: AdapterConfig) -> Iterator[str]:
        """Have an adapter, sound or not, for the length of a `with` block; afterwards all is as it was."""
        candidates = ("adapter", *(f"adapter {number}" for number in range(2, len(self._configs) + 3)))
        name = next(candidate for candidate in candidates if candidate not in self)
        active = self._setup
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.add(name, config, unsound="allow")
        try:
            yield name
        finally:
            self._arm(active)
            self.remove(name)

    # Adding and removing

    def add(
        self, name: str, config: ConfigLike = "seq_bn", *, overwrite: bool = False, unsound: Unsound = "refuse"
    ) -> None:
        """Give the model a new adapter with initial weights. It is not active and nothing is frozen yet.

        Arguments: `config` is anything `read_config` reads; `unsound="allow"` accepts a configuration that
        provably does not keep the pre-trained function.

        Raises `SetupError` for a bad or taken name or fusion layers, `ConfigError` for a configuration that is wrong,
        matches nothing, or is unsound; nothing is added then.
        """
        with LOCK:
            self._check_new(name, overwrite)
            check_word("unsound", unsound, get_args(Unsound))
            parsed = read_config(config)
            check_no_fusion(parsed)
            self._make(name, parsed, unsound)

    def _make(self, name: str, parsed: AdapterConfig, unsound: Unsound) -> None:
        """Build what `add` and `add_fusion` have checked the name of."""
        verdict = self._judge(name, parsed)
        if not verdict.sound and unsound != "allow":
            raise ConfigError(refusal(report(self.sites, name, {name: parsed})))
        built = build(self.model, self.sites, parsed)
        self._try(name, parsed, built)
        self._store(name, parsed, built, sound=verdict.sound)

    def add_fusion(self, block: Fuse, config: ConfigLike = "dynamic_fusion", *, overwrite: bool = False) -> str:
        """Give a `Fuse` its fusion layers, at the sites of its adapters. Returns their name, `block.name`.

        They are an adapter of their own: saved, loaded and removed by that name, and active as part of the `Fuse`.

        Arguments: `config` is `dynamic_fusion`, `static_fusion` or one of their kind (AdapterFusion, Pfeiffer et al.
        2021, arXiv 2005.00247).

        Raises `SetupError` for anything but a `Fuse` of bottlenecks that are at the same sites.
        """
        with LOCK:
            if not isinstance(block, Fuse):
                raise SetupError(f"Fusion layers are those of a `Fuse`; got {block!r}. Write `Fuse('a', 'b')`.")
            for name in leaves(block):
                self._require(name)
            parts = read_config(config).parts
            branches = [part for part in self._configs[last(block)].parts if hasattr(method_of(part), "branch")]
            reached = [place.site for part in branches for place in placements(part, self.sites)]
            if len(parts) != 1 or not hasattr(parts[0], "regularization") or not reached:
                raise SetupError(
                    "Fusion layers have a configuration such as `dynamic_fusion`, and combine bottlenecks; got "
                    f"{read_config(config)} for `{last(block)}` ({self._configs[last(block)]}). Give them one."
                )
            whole = AdapterConfig((parts[0].replace(**fused_places(reached, self.sites)),))
            planned = plan(self.sites, {**{name: self._configs[name] for name in leaves(block)}, block.name: whole})
            check_blocks(block, planned.modules)
            self._check_new(block.name, overwrite)
            self._make(block.name, whole, "refuse")
            return block.name

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises `SetupError` if it is active."""
        with LOCK:
            self._require(name)
            if self._setup is not None and name in names(self._setup):
                raise SetupError(
                    f"An active adapter cannot be removed; got `{name}`, part of {self._setup!r}. "
                    "Call `deactivate()` or activate another setup first."
                )
            self._check_unmerged(name)
            discard(self.model, self.sites, name)
            del self._configs[name]
            self._trainer.tell_adapters()
            self._heads.forget(name)
            self._unsound.discard(name)

    # Combining and merging

    def average(
        self,
        name: str,
        of: Sequence[str] | Mapping[str, float],
        weights: Sequence[float] | None = None,
        *,
        combine: Combination = "linear",
        normalize_weights: bool = True,
        rank: int | None = None,
        density: float | None = None,
        seed: int = 0,
        overwrite: bool = False,
    ) -> float:
        """Add an adapter that is the weighted average of others. It is not active, and has no task head.

        Arguments: `of` names the adapters, with their weights where it is a mapping; weights are divided by their sum
        unless `normalize_weights=False`. `combine` is `linear`, the sum of each parameter, for every method; or for
        LoRA `negate_b`, `cat`, `svd`, `ties` or `dare`, for (IA)³ `ties` or `dare` (see `docs/composition.md`).
        `rank` is that of the result of `svd`, `ties` and `dare`, by default the largest; `density`, the share of an
        update that `ties` and `dare` keep; `seed`, that of `dare`.

        Returns how far the update of a projection is from the one that was meant, relative to its size, where it is
        farthest: zero but for rounding where the way is exact. Raises `SetupError` for adapters that cannot be
        combined so.
        """
        with LOCK:
            asked = recipe(
                of,
                weights,
                combine,
                normalize_weights=normalize_weights,
                rank=rank,
                density=density,
                seed=seed,
            )
            for other in asked.names:
                self._require(other)
            self._check_new(name, overwrite)
            config = combined_config(asked, [self._configs[other] for other in asked.names])
            built, farthest = average(self.model, self.sites, asked, config)
            self._store(name, config, built, sound=not self._unsound & set(asked.names))
            return farthest

    def share(self, adapters: Sequence[str]) -> None:
        """Let adapters of several tasks have the shared parameters of the first, trained by all of them (MTL-LoRA).

        Each is saved whole; adapters that were loaded share again after a call of this. (Yang et al. 2024, arXiv
        2410.09437.)

        Raises `SetupError` for adapters of other methods, or of several configurations.
        """
        with LOCK:
            for name in adapters:
                self._require(name)
            share(self.model, self.sites, adapters, self._configs)

    def unshare(self, adapters: Sequence[str]) -> None:
        """Give adapters parameters of their own again, of the same values."""
        with LOCK:
            for name in adapters:
                self._require(name)
            unshare(self.model, self.sites, adapters)

    def eject_prefix(self, name: str) -> None:
        """Keep of an adapter's prefixes what they are, not the MLP that makes them: it computes the same, and is small.

        Raises `SetupError` for an adapter without prefixes.
        """
        with LOCK:
            self._require(name)
            adapter = stored(self.model, self.sites, name)
            found = {place: one for place, part in adapter.items() if isinstance(one := part.find(Prefix.name), Prefix)}
            if not found:
                raise SetupError(
                    f"Prefixes are ejected from an adapter that has some; got `{name}` ({self._configs[name]}). Name "
                    "one with `prefix_tuning`."
                )
            for place, made in {place: module.ejected() for place, module in found.items()}.items():
                adapter[place].put(Prefix.name, made)
            parts = self._configs[name].parts
            flat = (part.replace(flat=True) if isinstance(part, PrefixConfig) else part for part in parts)
            self._configs[name] = AdapterConfig(tuple(flat))
            self._arm(self._setup)

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that are in the weights of the base."""
        return tuple(self._merged.names)

    def merge(self, name: str, *, example_inputs: Any = None, tolerance: float | None = None) -> float:
        """Write an adapter into the weights of the base, so that it costs nothing in a forward; `unmerge` undoes it.

        What is overwritten is kept in the memory of the CPU. The output on one batch is compared with that of the
        active adapter; no adapter is active afterwards.

        Arguments: `example_inputs` is the batch; without it, one is made up where that can be done. `tolerance` is the
        largest difference, relative to the output; by default what rounding to the model's type can explain, and
        half of what the adapter itself changes.

        Returns the difference. Raises `SetupError` for an adapter that is no change of weights, for weights that
        cannot be overwritten, and for outputs that differ by more; the model is then as it was.
        """
        with LOCK:
            self._require(name)
            if name in self._merged.names:
                raise SetupError(f"An adapter is merged once; got `{name}`, which is in the weights. Call `unmerge()`.")
            check_mergeable(name, self._configs[name], self.sites)
            active = self._setup

            inputs = _batch(self.model, example_inputs)

            @contextmanager
            def alone() -> Iterator[None]:
                with self.trying(name, inputs or Inputs((), {})), self.bare():
                    yield

            try:
                found = merge(
                    self.model,
                    self.sites,
                    name,
                    self._configs[name],
                    self._merged,
                    inputs=inputs,
                    active=lambda: self.trying(name, inputs or Inputs((), {})),
                    alone=alone,
                    tolerance=tolerance,
                )
            except BaseException:
                self._arm(active)
                raise
            self._arm(None)
            return found

    def unmerge(self) -> None:
        """Take every merged adapter out of the weights, bit for bit.

        Raises `SetupError` where the model has other weights by now, such as quantised ones.
        """
        with LOCK:
            self._merged.restore(self.model)
            self._merged.names.clear()

    def detach(self, *, keep_merged: bool = False) -> nn.Module:
        """Remove everything inarch added and return the model; a trained task head keeps its weights.

        Arguments: `keep_merged=True` leaves merged adapters in the weights, for a model to be saved with them.

        The handle is of no further use. Detaching twice does nothing.
        """
        with LOCK:
            model: nn.Module = self.model
            if model.__dict__.get(ATTRIBUTE) is not self:
                return model
            self._arm(None)
            self._embeddings.clear()
            if not keep_merged:
                self.unmerge()
            self._pretrained.close()
            self._trainer.close()
            self._heads.leave()
            ungraft(self.model)
            for key, parameter in self.model.named_parameters():
                parameter.requires_grad_(self._trainable.get(key, parameter.requires_grad))
            model.__dict__.pop(ATTRIBUTE, None)
            return model

    # Training

    def train(
        self,
        setup: Setup,
        *,
        head: bool | Sequence[str] = True,
        fused: bool = False,
        embeddings: bool = False,
    ) -> None:
        """Make a setup the one thing that is trained: freeze the rest, unfreeze it and the task head, activate it.

        Of a setup with a `Fuse` the fusion layers alone are trained, and its adapters stay as they are.

        Arguments: `head` says whether the model's task head is trained along, or names the modules that make it up;
        `fused=True` trains the adapters of a setup with a `Fuse` along, `embeddings=True` the active token embeddings.

        Raises `SetupError` as `activate` does, for weights that are quantised or offloaded, for a head that the model
        does not have, and while an adapter is merged; nothing is changed then.
        """
        with LOCK:
            self._refuse_merged("An adapter is trained on the base that it will be saved for")
            self._check_setup(setup)
            heads = self._heads.find(head, setup)
            layers = tuple(block.name for block in fusions(setup))
            trained = layers if layers and not fused else names(setup)
            own = {key: parameter for name in trained for key, parameter in self[name].items()}
            check_trainable(self.model, own, self._heads.parameters(heads))
            self._switch(setup)
            self._heads.follow(setup)
            self._heads.keep(trained, heads)
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            for name in trained:
                for parameter in self[name].values():
                    parameter.requires_grad_(True)
                self._heads.assign(name, self._heads.share(name, heads))
            for parameter in self._heads.parameters(heads).values():
                parameter.requires_grad_(True)
            if embeddings:
                self._embeddings.weight(self._embeddings.active).requires_grad_(True)


def attached(model: nn.Module) -> "Adapters | None":
    """The handle of a model, if it has one."""
    found = unwrap(model).__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Adapters) else None
