"""Writes what is in a model into files, and reads it from them: adapters, setups, heads, token embeddings.

What is read is made ready beside the model, and put into it when all of it fits.
"""

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from . import head_files, loading, publish, saving, setups, state
from .admission import check_name, check_setup, check_word
from .bank import Modules
from .compose import Setup
from .core.errors import ConfigError, StateError
from .grafted import LOCK
from .headed import Headed
from .heads import path_of
from .heads.layers import Head
from .loading import Found, OtherBase, built
from .saving import Format
from .tensors import copy_into

logger = logging.getLogger(__name__)


class Filed(Headed):
    """A model with adapters, and the files of all that it has."""

    # Adapters

    def save(
        self,
        name: str,
        folder: str | os.PathLike[str],
        *,
        processor: Any = None,
        head: bool = True,
        format: Format = "inarch",  # noqa: A002  the word that users look for
    ) -> None:
        """Write one adapter, with the task head trained with it, as an adapter folder.

        An adapter that is in the folder already is replaced, in one step where the system can: there is always a whole
        one. A folder with anything else in it is left alone.

        Where processes hold parts of the weights (`fully_shard`), every process calls this, and the first one writes.

        Arguments: `processor` is the image processor whose settings are kept beside it (anything with a `to_dict`);
        `format` is that of another library: `peft` writes LoRA so that PEFT computes the same, `adapterhub` a
        bottleneck or LoRA for the library `adapters`, to be read with `use_safetensors=True`.

        Raises `StateError` if the folder holds something else or cannot be written, or for what the other library does
        not have.
        """
        self._require(name)
        self._refuse_merged("An adapter is saved beside the base it was trained on")
        adapter = saving.Adapter(
            name=name,
            config=self._configs[name],
            tensors=self.tensors(name),
            head=self._heads[name] if head else (),
            head_tensors=self._heads.of(name) if head else {},
            flexible=self._heads.configs(name) if head else {},
        )
        saving.write(folder, adapter, self.model, self.sites, self.heads, processor=processor, format_=format)

    def load(
        self,
        source: str | os.PathLike[str],
        *,
        name: str | None = None,
        overwrite: bool = False,
        head: bool = True,
        other_base: OtherBase = "refuse",
        revision: str | None = None,
    ) -> str:
        """Read an adapter folder, or a Hub repository with one, into the model. It is not active and not trainable.

        A zip or tar archive of a folder is read too, here or at an address (`https://...`).
        Folders of the library `adapters` are read too, and those of PEFT, where whole modules that were trained are the
        task head. A flexible head that lies beside the adapter is added, and becomes active with it.

        Arguments: `name` replaces the stored name; `head=False` leaves the model's task head alone;
        `other_base="allow"` takes an adapter made on a base with other weights; `revision` is the branch, tag or commit
        of a repository.

        Returns the adapter's name. Raises `StateError` for anything that does not fit; the model is then unchanged.
        """
        self._require_attached()
        self._refuse_merged("An adapter is loaded into the base it was trained on")
        check_word("other_base", other_base, get_args(OtherBase))
        if name is not None:
            self._check_new(name, overwrite)
        # Outside the lock, because a download may take minutes.
        with loading.opened(source, revision) as folder:
            found = loading.find(folder, self.model, self.sites, heads=self.heads, head=head, other_base=other_base)
        with LOCK:
            ready = self._ready(found, name or found.name, overwrite=overwrite)
            self._take(ready)
            return ready.name

    def push(
        self,
        name: str,
        repository: str,
        *,
        head: bool = True,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        message: str | None = None,
        description: str | None = None,
        datasets: Sequence[str] = (),
        pull_request: bool = False,
    ) -> str:
        """Save an adapter into a repository of the Hub, `owner/name`, which is made if need be, with a model card.

        Arguments: `message` and `description` are those of the commit; `datasets` are named on the card, by their ids
        on the Hub; `pull_request=True` proposes the commit instead of making it.

        Returns the commit, which `load(repository, revision=...)` takes. Raises `StateError` where it cannot be
        written.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "adapter"
            self.save(name, folder, head=head)
            text = publish.card(state.read_record(folder), str(self._configs[name]), repository, datasets)
            (folder / "README.md").write_text(text, encoding="utf-8")
            told = message or f"Add the adapter {name}"
            return publish.upload(
                folder,
                repository,
                message=told,
                description=description,
                private=private,
                token=token,
                revision=revision,
                pull_request=pull_request,
            )

    def _ready(self, found: Found, name: str, *, overwrite: bool) -> "_Ready":
        """What was found in a folder, as modules for this model. Raises for what does not fit; nothing is changed."""
        self._check_new(name, overwrite)
        fresh = {head: self._heads.build(config) for head, config in found.flexible.items()}
        given = {head: name if head == found.name else head for head in fresh}
        for head in given.values():
            self._check_new_head(head, overwrite=overwrite)
        wanted = {**self._heads.tensors(found.head), **self._heads.tensors_of(fresh)}
        try:
            sound = self._judge(name, found.config).sound
        except ConfigError as error:
            raise StateError(
                f"An adapter is loaded into a model that has its places; got `{found.folder}` for "
                f"{type(self.model).__name__}: {error}"
            ) from None
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

    # Setups

    def save_setup(self, folder: str | os.PathLike[str], setup: Setup | None = None) -> None:
        """Write the active setup, or another one, with all its adapters and fusion layers, into a folder.

        It holds `setup.json` and, below `adapters/`, what `save` writes for each of them.

        Raises `SetupError` for no setup, or one that cannot run, and `StateError` where one of its adapters cannot be
        written; the folder is as it was then.
        """
        chosen = self._setup if setup is None else setup
        if chosen is not None:
            self._check_setup(chosen)
        setups.save(self, folder, chosen)

    def load_setup(self, folder: str | os.PathLike[str], *, overwrite: bool = False, head: bool = True) -> Setup:
        """Read what `save_setup` wrote: its adapters, and the setup, which is returned and not activated.

        Raises `StateError` for a folder that cannot be read, or an adapter in it that is missing, damaged or of another
        base; the model is then unchanged.
        """
        with LOCK:
            setup, folders = setups.find(folder)
            heads = setups.lone_heads(folder, folders) if head else {}
            lone = [self._ready_head(place, name, overwrite=overwrite) for name, place in heads.items()]
            ready = []
            for name, place in folders.items():
                found = loading.find(place, self.model, self.sites, heads=self.heads, head=head, other_base="refuse")
                ready.append(self._ready(found, name, overwrite=overwrite))
            configs = self._configs | {one.name: one.found.config for one in ready}
            unsound = self._unsound - {one.name for one in ready} | {one.name for one in ready if not one.sound}
            check_setup(setup, self.sites, configs, unsound)
            for one in ready:
                self._take(one)
            for name, built in lone:
                self._put_head(name, built)
        return setup

    # Heads and token embeddings

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
