"""The methods that users of the library `adapters` call on a model, each one call of `inarch.Adapters`.

The first line of each docstring is that call; `docs/migrate.md` is made of them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..compose import Fuse, Setup, Stack
from ..core.errors import SetupError
from ..handle import Adapters
from ..methods import ConfigLike

_OF_TRANSFORMERS = frozenset({"peft_model_id", "adapter_name", "peft_config", "adapter_state_dict", "adapter_config"})
"""Arguments that the methods of transformers of the same name take, and those of `adapters` do not."""
_FUSIONS = {"dynamic": "dynamic_fusion", "static": "static_fusion"}


def as_setup(setup: Any) -> Setup:
    """A setup as it may be written there: a list is a `Stack`."""
    if isinstance(setup, list | tuple):
        return setup[0] if len(setup) == 1 else Stack(*setup)
    return setup  # type: ignore[no-any-return]  # a name or a block, or refused where it is used


def as_fuse(names: Any) -> Fuse:
    """A `Fuse` as it may be written there: a list, or names in a text."""
    if isinstance(names, Fuse):
        return names
    return Fuse(*(names.split(",") if isinstance(names, str) else names))


class Active:
    """What `model.active_adapters` is: prints and compares as the setup, and may be called, as in transformers."""

    def __init__(self, setup: Setup | None, call: Callable[..., Any]) -> None:
        self.setup = setup
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return self.setup == (other.setup if isinstance(other, Active) else other)

    def __hash__(self) -> int:
        return hash(self.setup)

    def __bool__(self) -> bool:
        return self.setup is not None

    def __repr__(self) -> str:
        return repr(self.setup)


class ModelMethods:
    """The methods of one model."""

    def __init__(self, handle: Adapters) -> None:
        self._handle = handle
        self._model = handle.model

    def _own(self, name: str) -> Callable[..., Any]:
        """The method of that name that the model's class has."""
        found = getattr(type(self._model), name, None)
        if found is None:
            raise SetupError(
                f"A call in the form of transformers needs its method; got none named `{name}` for "
                f"{type(self._model).__name__}. Call it in the form of `adapters`."
            )
        return found.__get__(self._model)  # type: ignore[no-any-return]

    # Adapters

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """`adapters.add(name, config)`"""
        if hasattr(args[0] if args else None, "peft_type") or _OF_TRANSFORMERS & set(kwargs):
            return self._own("add_adapter")(*args, **kwargs)
        return self._add_adapter(*args, **kwargs)

    def _add_adapter(
        self,
        adapter_name: str,
        config: ConfigLike | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        self._handle.add(adapter_name, "seq_bn" if config is None else config, overwrite=overwrite_ok)
        if set_active:
            self._handle.activate(adapter_name)

    def delete_adapter(self, adapter_name: str | None = None, **kwargs: Any) -> Any:
        """`adapters.remove(name)`"""
        if kwargs:
            return self._own("delete_adapter")(**kwargs)
        return self._handle.remove(str(adapter_name))

    def train_adapter(self, adapter_setup: Any) -> None:
        """`adapters.train(setup)`"""
        self._handle.train(as_setup(adapter_setup))

    def set_active_adapters(self, adapter_setup: Any) -> None:
        """`adapters.activate(setup)`, or `adapters.deactivate()` for none"""
        if adapter_setup is None:
            self._handle.deactivate()
        else:
            self._handle.activate(as_setup(adapter_setup))

    def freeze_model(self, freeze: bool = True) -> None:
        """`parameter.requires_grad_(False)`, which `adapters.train` does by itself"""
        own = {id(parameter) for name in self._handle.names for parameter in self._handle[name].values()}
        for parameter in self._model.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(not freeze)

    def adapter_summary(self) -> str:
        """`adapters.summary()`"""
        return self._handle.summary()

    def has_adapters(self) -> bool:
        """`bool(adapters.names)`"""
        return bool(self._handle.names)

    def get_adapter(self, name: str) -> dict[str, nn.Parameter]:
        """`adapters[name]`: parameters by site"""
        return self._handle[name]

    # Fusion, averages, merging

    def add_adapter_fusion(
        self,
        adapter_names: Any,
        config: ConfigLike | None = None,
        name: str | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """`adapters.add_fusion(Fuse("a", "b"), config)`"""
        block = as_fuse(adapter_names)
        block = block if name is None else Fuse(*block.children, name=name)
        wish = "dynamic" if config is None else config
        known = _FUSIONS.get(wish) if isinstance(wish, str) else None
        self._handle.add_fusion(block, known or wish, overwrite=overwrite_ok)
        if set_active:
            self._handle.activate(block)

    def delete_adapter_fusion(self, adapter_names: Any) -> None:
        """`adapters.remove(Fuse("a", "b").name)`"""
        self._handle.remove(as_fuse(adapter_names).name)

    def train_adapter_fusion(self, adapter_setup: Any, unfreeze_adapters: bool = False) -> None:
        """`adapters.train(Fuse("a", "b"))`, with `fused=True` to train its adapters along"""
        setup = adapter_setup if isinstance(adapter_setup, Stack) else as_fuse(adapter_setup)
        self._handle.train(setup, fused=unfreeze_adapters)

    def get_fusion_regularization_loss(self) -> Tensor:
        """`adapters.penalty()`, which `AdapterTrainer` adds by itself"""
        return self._handle.penalty()

    def average_adapter(  # noqa: PLR0917  as it is called there
        self,
        adapter_name: str,
        adapter_list: Sequence[str] | Mapping[str, float],
        weights: Sequence[float] | None = None,
        combine_strategy: str = "linear",
        normalize_weights: bool = True,
        overwrite_ok: bool = False,
        set_active: bool = False,
        svd_rank: int | None = None,
    ) -> None:
        """`adapters.average(name, of, weights, combine="linear" | "negate_b" | "svd")`"""
        ways = {"lora_linear_only_negate_b": "negate_b", "lora_delta_w_svd": "svd"}
        self._handle.average(
            adapter_name,
            adapter_list,
            weights,
            combine=ways.get(combine_strategy, combine_strategy),  # type: ignore[arg-type]  # refused by name
            normalize_weights=normalize_weights,
            rank=svd_rank,
            overwrite=overwrite_ok,
        )
        if set_active:
            self._handle.activate(adapter_name)

    def merge_adapter(self, name: str) -> None:
        """`adapters.merge(name)`"""
        self._handle.merge(name)

    def reset_adapter(self) -> None:
        """`adapters.unmerge()`"""
        self._handle.unmerge()

    def eject_prefix_tuning(self, name: str) -> None:
        """`adapters.eject_prefix(name)`"""
        self._handle.eject_prefix(name)

    def share_parameters(self, adapter_names: Sequence[str]) -> None:
        """`adapters.share(names)`"""
        self._handle.share(adapter_names)

    def unshare_parameters(self, adapter_names: Sequence[str]) -> None:
        """`adapters.unshare(names)`"""
        self._handle.unshare(adapter_names)

    # Saving and loading

    def save_adapter(
        self,
        save_directory: str,
        adapter_name: str,
        with_head: bool = True,
    ) -> None:
        """`adapters.save(name, folder)`, with `format="adapterhub"` for the library `adapters`"""
        self._handle.save(adapter_name, save_directory, head=with_head)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """`adapters.load(folder_or_repository, name=...)`"""
        if _OF_TRANSFORMERS & set(kwargs):
            return self._own("load_adapter")(*args, **kwargs)
        return self._load_adapter(*args, **kwargs)

    def _load_adapter(
        self,
        adapter_name_or_path: str,
        *,
        load_as: str | None = None,
        with_head: bool = True,
        set_active: bool = False,
    ) -> str:
        name = self._handle.load(adapter_name_or_path, name=load_as, head=with_head, overwrite=True)
        if set_active:
            self._handle.activate(name)
        return name

    def save_all_adapters(self, save_directory: str, with_head: bool = True) -> None:
        """`for name in adapters.names: adapters.save(name, folder)`"""
        for name in self._handle.names:
            self._handle.save(name, Path(save_directory) / name, head=with_head)

    def save_adapter_fusion(self, save_directory: str, adapter_names: Any) -> None:
        """`adapters.save(Fuse("a", "b").name, folder)`"""
        self._handle.save(as_fuse(adapter_names).name, save_directory)

    def load_adapter_fusion(self, adapter_fusion_name_or_path: str, load_as: str | None = None) -> str:
        """`adapters.load(folder, name=...)`"""
        return self._handle.load(adapter_fusion_name_or_path, name=load_as, overwrite=True)

    def save_adapter_setup(self, save_directory: str, adapter_setup: Any) -> None:
        """`adapters.save_setup(folder, setup)`"""
        self._handle.save_setup(save_directory, as_setup(adapter_setup))

    def load_adapter_setup(self, save_directory: str, set_active: bool = False) -> Setup:
        """`adapters.load_setup(folder)`"""
        setup = self._handle.load_setup(save_directory, overwrite=True)
        if set_active:
            self._handle.activate(setup)
        return setup

    # Heads

    def _head(self, name: str, kind: str, *, overwrite_ok: bool, **settings: Any) -> None:
        labels = settings.pop("id2label", None)
        named = {} if labels is None else {"labels": [labels[number] for number in sorted(labels)]}
        pooled = {"pooling": "pooler"} if settings.pop("use_pooler", False) else {}
        self._handle.add_head(name, kind, overwrite=overwrite_ok, **settings, **named, **pooled)

    def add_classification_head(
        self,
        head_name: str,
        num_labels: int = 2,
        overwrite_ok: bool = False,
        multilabel: bool = False,
        **settings: Any,
    ) -> None:
        """`adapters.add_head(name, "classification", num_labels=...)`, or `"multilabel_classification"`"""
        kind = "multilabel_classification" if multilabel else "classification"
        self._head(head_name, kind, overwrite_ok=overwrite_ok, num_labels=num_labels, **settings)

    def add_image_classification_head(
        self,
        head_name: str,
        num_labels: int = 2,
        overwrite_ok: bool = False,
        **settings: Any,
    ) -> None:
        """`adapters.add_head(name, "image_classification", num_labels=...)`"""
        self._head(head_name, "image_classification", overwrite_ok=overwrite_ok, num_labels=num_labels, **settings)

    def add_tagging_head(
        self,
        head_name: str,
        num_labels: int = 2,
        overwrite_ok: bool = False,
        **settings: Any,
    ) -> None:
        """`adapters.add_head(name, "tagging", num_labels=...)`"""
        self._head(head_name, "tagging", overwrite_ok=overwrite_ok, num_labels=num_labels, **settings)

    def add_multiple_choice_head(
        self,
        head_name: str,
        num_choices: int = 2,
        overwrite_ok: bool = False,
        **settings: Any,
    ) -> None:
        """`adapters.add_head(name, "multiple_choice", num_choices=...)`"""
        self._head(head_name, "multiple_choice", overwrite_ok=overwrite_ok, num_choices=num_choices, **settings)

    def add_qa_head(self, head_name: str, overwrite_ok: bool = False, **settings: Any) -> None:
        """`adapters.add_head(name, "question_answering")`"""
        self._head(head_name, "question_answering", overwrite_ok=overwrite_ok, **settings)

    def add_dependency_parsing_head(
        self,
        head_name: str,
        num_labels: int = 2,
        overwrite_ok: bool = False,
        **settings: Any,
    ) -> None:
        """`adapters.add_head(name, "dependency_parsing", num_labels=...)`"""
        self._head(head_name, "dependency_parsing", overwrite_ok=overwrite_ok, num_labels=num_labels, **settings)

    def add_masked_lm_head(self, head_name: str, overwrite_ok: bool = False, **settings: Any) -> None:
        """`adapters.add_head(name, "masked_lm")`"""
        self._head(head_name, "masked_lm", overwrite_ok=overwrite_ok, **settings)

    def add_causal_lm_head(self, head_name: str, overwrite_ok: bool = False, **settings: Any) -> None:
        """`adapters.add_head(name, "causal_lm")`"""
        self._head(head_name, "causal_lm", overwrite_ok=overwrite_ok, **settings)

    def add_seq2seq_lm_head(self, head_name: str, overwrite_ok: bool = False, **settings: Any) -> None:
        """`adapters.add_head(name, "seq2seq_lm")`"""
        self._head(head_name, "seq2seq_lm", overwrite_ok=overwrite_ok, **settings)

    def delete_head(self, head_name: str) -> None:
        """`adapters.remove_head(name)`"""
        self._handle.remove_head(head_name)

    def get_labels(self, head_name: str) -> list[str] | None:
        """`adapters.flexible_heads[name].labels`"""
        labels = getattr(self._handle.flexible_heads[head_name], "labels", None)
        return None if labels is None else list(labels)


METHODS = {
    name: str(method.__doc__).strip()
    for name, method in vars(ModelMethods).items()
    if not name.startswith("_") and callable(method)
}
"""The methods that a model gets, and what each is in inarch."""
