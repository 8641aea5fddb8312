"""Keeps what the adapters of one model have to do with its task heads."""

import logging
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..core.errors import SetupError, nearest
from ..core.site import Sites
from .task_head import task_head

logger = logging.getLogger(__name__)


class TrainedHeads:
    """Which modules of the model each adapter was trained with, and their values where others have trained them since.

    Tensors, parameters and buffers, are named as in an adapter file.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self._model = model
        self._sites = sites
        self._paths: dict[str, tuple[str, ...]] = {}
        self._kept: dict[str, dict[str, Tensor]] = {}
        """Copies, by adapter, of heads that another adapter has trained since."""

    def __getitem__(self, name: str) -> tuple[str, ...]:
        """The paths of the modules trained with an adapter; none where no head was."""
        return self._paths.get(name, ())

    def known(self) -> tuple[str, ...]:
        """The paths of all modules that belong to a task and not to the base."""
        trained = [path for paths in self._paths.values() for path in paths]
        return tuple(dict.fromkeys((*task_head(self._model, self._sites), *trained)))

    def find(self, head: bool | Sequence[str]) -> tuple[str, ...]:
        """The paths that are meant: none, those of the head the model has, or these. Raises `SetupError`."""
        if head is False:
            return ()
        if head is True:
            found = task_head(self._model, self._sites)
            # A model of transformers without a task in its name has no head; of any other model nothing is known.
            if not found and ("Classification" in type(self._model).__name__ or not hasattr(self._model, "base_model")):
                logger.warning(
                    "No task head is known in %s, so none is trained; name its modules: `train(..., head=[...])`.",
                    type(self._model).__name__,
                )
            return found
        paths = (head,) if isinstance(head, str) else tuple(head)
        modules = dict(self._model.named_modules())
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
