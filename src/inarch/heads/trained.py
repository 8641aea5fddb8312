"""Keeps what the adapters of one model have to do with its task heads."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compose import Batch, Setup, ends
from ..core.errors import SetupError, nearest
from ..core.site import Sites
from ..tensors import copy_into
from .flexible import FlexibleHeads, build_head, heads_in, name_at, path_of, put, uninstall
from .kinds import HeadConfig
from .layers import Head
from .task_head import task_head

logger = logging.getLogger(__name__)


class TrainedHeads:
    """Which modules of the model each adapter was trained with, and their values where others have trained them since.

    Tensors, parameters and buffers, are named as in an adapter file.
    """

    def __init__(self, model: nn.Module, sites: Sites, *, causal: bool) -> None:
        """`causal` says whether a token of the model sees those before it alone."""
        self._model = model
        self._sites = sites
        self._is_causal = causal
        self._paths: dict[str, tuple[str, ...]] = {}
        self._kept: dict[str, dict[str, Tensor]] = {}
        """Copies, by adapter, of heads that another adapter has trained since."""

    def __getitem__(self, name: str) -> tuple[str, ...]:
        """The paths of the modules that belong to an adapter: those trained with it, or its flexible namesake."""
        return self._paths.get(name) or ((path_of(name),) if name in self.flexible() else ())

    def known(self) -> tuple[str, ...]:
        """The paths of all modules that belong to a task and not to the base."""
        trained = [path for paths in self._paths.values() for path in paths]
        return tuple(dict.fromkeys((*task_head(self._model, self._sites), *map(path_of, self.flexible()), *trained)))

    # Flexible heads

    def flexible(self) -> tuple[str, ...]:
        """The names of the flexible heads."""
        heads = heads_in(self._model)
        return () if heads is None else tuple(heads)

    def config(self, name: str) -> HeadConfig:
        """The configuration of a flexible head. Raises `SetupError` for one that there is not."""
        return self._require(name).head(name).config

    def lone(self, adapters: Iterable[str]) -> tuple[str, ...]:
        """The flexible heads that belong to none of these adapters."""
        owned = {path for adapter in adapters for path in self[adapter]}
        return tuple(name for name in self.flexible() if path_of(name) not in owned)

    def configs(self, name: str) -> dict[str, HeadConfig]:
        """By path, the configurations of the flexible heads that an adapter was trained with."""
        return {path: self.config(name_at(path)) for path in self[name] if name_at(path)}

    @staticmethod
    def tensors_of(heads: Mapping[str, Head]) -> dict[str, Tensor]:
        """The tensors of flexible heads that are not in a model, as `tensors` names them."""
        return {
            f"head.{path_of(name)}.{key}": tensor
            for name, head in heads.items()
            for key, tensor in head.state_dict(keep_vars=True).items()
        }

    def build(self, config: HeadConfig) -> Head:
        """A flexible head with initial weights, not yet in the model. Raises `ConfigError` for one without a place."""
        return build_head(self._model, self._sites, config)

    def put(self, name: str, head: Head) -> None:
        """Give the model a flexible head, in the place of any of that name."""
        put(self._model, name, head, causal=self._is_causal)

    def drop(self, name: str) -> None:
        """Take a flexible head from the model. Raises `SetupError` for one that there is not."""
        heads = self._require(name)
        del heads[name]
        heads.active = tuple(other for other in heads.active if other != name)
        self._kept = {owner: kept for owner, kept in self._kept.items() if path_of(name) not in self[owner]}
        left = {owner: tuple(p for p in paths if p != path_of(name)) for owner, paths in self._paths.items()}
        self._paths = {owner: paths for owner, paths in left.items() if paths}
        if not heads:
            uninstall(self._model)

    def rename_labels(self, name: str, labels: Sequence[str]) -> None:
        """Name the labels of a flexible head. Raises `ConfigError` for another number of them."""
        head = self._require(name).head(name)
        head.config = head.config.replace(labels=tuple(labels))

    def averaged(self, names: Sequence[str], weights: Sequence[float]) -> Head:
        """A new head, the weighted sum of others. Raises `SetupError` for heads that differ in their configuration."""
        heads = [self._require(name).head(name) for name in names]
        first = names[0]
        for name in names[1:]:
            if self.config(name) != self.config(first):
                raise SetupError(
                    f"Heads are averaged where they are built alike; got `{first}` ({self.config(first)}) and `{name}` "
                    f"({self.config(name)}). Leave one of them out."
                )
        result, values = copy.deepcopy(heads[0]), [head.state_dict() for head in heads]
        with torch.no_grad():
            for key, tensor in result.state_dict(keep_vars=True).items():
                tensor.copy_(sum(share * value[key] for share, value in zip(weights, values, strict=True)))
        return result.requires_grad_(requires_grad=False)

    def leave(self) -> None:
        """Take all flexible heads from the model."""
        uninstall(self._model)

    def targets(self) -> tuple[str, ...]:
        """What the active flexible heads learn from, by name."""
        heads = heads_in(self._model)
        found = [] if heads is None else heads.chosen(None).values()
        return tuple(dict.fromkeys(name for head in found for name in head.targets))

    @property
    def active(self) -> tuple[str, ...]:
        """The flexible heads that a forward runs."""
        heads = heads_in(self._model)
        return () if heads is None else heads.active

    @active.setter
    def active(self, names: Sequence[str]) -> None:
        for name in names:
            self._require(name)
        heads = heads_in(self._model)
        if heads is not None:
            heads.active = tuple(names)

    def keep_fed(self, inputs: Mapping[str, Any]) -> None:
        """Leave active what runs on these inputs: all heads, or none where one of them needs more than there is."""
        heads = heads_in(self._model)
        if heads is not None and not all(head.is_fed(inputs) for head in heads.chosen(None).values()):
            heads.active = ()

    def _require(self, name: str) -> FlexibleHeads:
        heads = heads_in(self._model)
        if heads is None or name not in heads:
            raise SetupError(f"A head must be added before it is used; got {name!r}. {nearest(name, self.flexible())}")
        return heads

    def watch(self, setup: Setup | None, batch: Batch | None) -> None:
        """Tell the flexible heads what is active in the model."""
        heads = heads_in(self._model)
        if heads is not None:
            heads.setup, heads.batch = setup, batch

    def of_setup(self, setup: Setup, *, stay: bool = True) -> tuple[str, ...]:
        """The flexible heads of the adapters of a setup; where its adapters have none the active ones, which stay.

        Where they cut a batch, there is a head for each part of it, unless all parts have the same.
        """
        found = [self._flexible_of(name) for name in ends(setup)]
        if not all(found) and not stay:
            return ()
        if not any(found):
            return self.active
        if not all(found):
            lacking = next(name for name, head in zip(ends(setup), found, strict=True) if not head)
            logger.warning("`%s` has no head, so the active heads stay as they are, for %s.", lacking, setup)
            return self.active
        return tuple(found[:1] if len(set(found)) == 1 else found)

    def _flexible_of(self, name: str) -> str:
        """The flexible head of an adapter: the one it was trained with, or that of its name; empty for none."""
        trained = [head for path in self[name] if (head := name_at(path))]
        return trained[0] if trained else name if name in self.flexible() else ""

    def follow(self, setup: Setup) -> None:
        """Activate the heads of the adapters of a setup."""
        self.active = self.of_setup(setup)
        if len(set(ends(setup))) == 1:
            self._bring_back(ends(setup)[0])

    def _bring_back(self, name: str) -> None:
        """Give modules that others have trained since the values that they had with an adapter."""
        kept = self._kept.get(name)
        if kept:
            self.keep([name], self[name])  # forgets what is kept of this one
            for key, tensor in self.tensors(self[name]).items():
                copy_into(tensor, kept[key])

    def share(self, name: str, paths: tuple[str, ...]) -> tuple[str, ...]:
        """What of the heads that are trained belongs to one adapter: its own flexible head among several, or all."""
        own = path_of(self._flexible_of(name))
        return (own,) if own in paths else paths

    # Any head

    def find(self, head: bool | Sequence[str], setup: Setup) -> tuple[str, ...]:
        """The paths that are meant: none, those of the heads of a setup or of the model, or these.

        Raises `SetupError` for what the model does not have.
        """
        if head is False:
            return ()
        if head is True:
            flexible = dict.fromkeys(self.of_setup(setup))
            if flexible:
                return tuple(map(path_of, flexible))
            found = task_head(self._model, self._sites)
            # A model of transformers without a task in its name has no head; of any other model nothing is known.
            if not found and ("Classification" in type(self._model).__name__ or not hasattr(self._model, "base_model")):
                logger.warning(
                    "No task head is known in %s, so none is trained; name its modules: "
                    "`inarch.attach(model).train(..., head=[...])`.",
                    type(self._model).__name__,
                )
            return found
        paths = (head,) if isinstance(head, str) else tuple(head)
        modules = dict(self._model.named_modules())
        names = {name: path_of(name) for name in self.flexible()}
        paths = tuple(names.get(path, path) for path in paths)
        for path in paths:
            if path not in modules:
                raise SetupError(
                    f"`head` names modules of the model; got `{path}` for {type(self._model).__name__}. "
                    f"{nearest(path, [p for p, _ in self._model.named_children()])}"
                )
        return paths

    def tensors(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of modules as they are now."""
        return {
            f"head.{path}.{key}": tensor
            for path in paths
            for key, tensor in self._model.get_submodule(path).state_dict(keep_vars=True).items()
        }

    def parameters(self, paths: Iterable[str]) -> dict[str, nn.Parameter]:
        """The parameters among them."""
        return {key: value for key, value in self.tensors(paths).items() if isinstance(value, nn.Parameter)}

    def of(self, name: str) -> dict[str, Tensor]:
        """The head of an adapter, with the values that it had when that adapter was last trained or loaded."""
        return self._kept.get(name) or self.tensors(self[name])

    def keep(self, names: Iterable[str], paths: Iterable[str]) -> None:
        """Before modules change for some adapters: put aside those of every other adapter, so that `of` has them."""
        changing = set(names)
        self._kept = {name: kept for name, kept in self._kept.items() if name not in changing}
        for name, own in self._paths.items():
            if name not in changing and name not in self._kept and set(own) & set(paths):
                self._kept[name] = {key: tensor.detach().clone() for key, tensor in self.tensors(own).items()}

    def assign(self, name: str, paths: tuple[str, ...]) -> None:
        """Note that modules belong to an adapter; none leaves what it has."""
        if paths:
            self._paths[name] = paths

    def forget(self, name: str) -> None:
        """An adapter is no more, or begins anew."""
        self._paths.pop(name, None)
        self._kept.pop(name, None)
