"""The methods that users of the library `adapters` call on a model, each one call of `inarch.Adapters`.

The first line of each docstring is that call; `docs/migrate.md` is made of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compose import Fuse, Stack
from ..handle import Adapters
from ..methods import ConfigLike
from .active import setup_in
from .composition import as_fuse, as_setup
from .configuration import DEFAULT_ADAPTER_CONFIG, DEFAULT_ADAPTERFUSION_CONFIG, FUSIONS, as_config
from .file_methods import FileMethods
from .head_methods import HeadMethods
from .own import OF_TRANSFORMERS, own_method
from .refused import refuse


class ModelMethods(HeadMethods, FileMethods):
    """The methods of one model."""

    def __init__(self, handle: Adapters) -> None:
        self._handle = handle
        self._model = handle.model

    # Adapters

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """`adapters.add(name, config)`"""
        if hasattr(args[0] if args else None, "peft_type") or OF_TRANSFORMERS & set(kwargs):
            return own_method(self._model, "add_adapter")(*args, **kwargs)
        return self._add_adapter(*args, **kwargs)

    def _add_adapter(
        self,
        adapter_name: str,
        config: ConfigLike | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        self._handle.add(adapter_name, as_config(config or DEFAULT_ADAPTER_CONFIG), overwrite=overwrite_ok)
        if set_active:
            self._handle.activate(adapter_name)

    def delete_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """`adapters.remove(name)`"""
        if "adapter_names" in kwargs:
            return own_method(self._model, "delete_adapter")(**kwargs)
        return self._delete_adapter(*args, **kwargs)

    def _delete_adapter(self, adapter_name: str) -> None:
        if self._handle.setup in (adapter_name, Stack(adapter_name)):
            self._handle.deactivate()
        self._handle.remove(adapter_name)

    def train_adapter(self, adapter_setup: Any, train_embeddings: bool = False) -> None:
        """`adapters.train(setup)`, with `embeddings=True` to train the active token embeddings along"""
        self._handle.train(as_setup(adapter_setup), embeddings=train_embeddings)

    def set_active_adapters(self, adapter_setup: Any, skip_layers: Sequence[int] | None = None) -> None:
        """`adapters.activate(setup, skip_layers=...)`, or `adapters.deactivate()` for none"""
        setup = as_setup(adapter_setup)
        if setup is None:
            self._handle.deactivate()
        else:
            self._handle.activate(setup, skip_layers=skip_layers or ())

    def freeze_model(self, freeze: bool = True) -> None:
        """`parameter.requires_grad_(False)`, which `adapters.train` does by itself"""
        own = {id(parameter) for name in self._handle.names for parameter in self._handle[name].values()}
        for parameter in self._model.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(not freeze)

    def freeze_embeddings(self, freeze: bool = True) -> None:
        """`adapters.embedding(adapters.active_embeddings).requires_grad_(False)`"""
        self._handle.embedding(self._handle.active_embeddings).requires_grad_(not freeze)

    def adapter_summary(self, as_dict: bool = False) -> str | list[dict[str, Any]]:
        """`adapters.summary()`, or `adapters.rows()`"""
        return self._handle.rows() if as_dict else self._handle.summary()

    def has_adapters(self) -> bool:
        """`bool(adapters.names)`"""
        return bool(self._handle.names)

    def supports_adapter(self, type_or_config: ConfigLike) -> bool:
        """`adapters.supports(config)`"""
        return self._handle.supports(as_config(type_or_config))

    def get_adapter(self, name: str) -> dict[int, dict[str, nn.Module]]:
        """`adapters.modules(name)`: modules by layer and role; `adapters[name]` has the parameters"""
        return self._handle.modules(name)

    def adapter_to(self, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """`adapters.move(name, device=..., dtype=...)`"""
        self._handle.move(name, device=device, dtype=dtype)

    def adapter_fusion_to(
        self, adapter_names: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """`adapters.move(Fuse("a", "b").name, device=..., dtype=...)`"""
        self._handle.move(as_fuse(adapter_names).name, device=device, dtype=dtype)

    def iter_layers(self) -> Iterator[tuple[int, nn.Module]]:
        """`enumerate(adapters.layers)`"""
        return iter(enumerate(self._handle.layers))

    def get_layer(self, idx: int) -> nn.Module:
        """`adapters.layers[number]`"""
        return self._handle.layers[idx]

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
        wish = DEFAULT_ADAPTERFUSION_CONFIG if config is None else config
        known = FUSIONS.get(wish) if isinstance(wish, str) else None
        self._handle.add_fusion(block, known or wish, overwrite=overwrite_ok)
        if set_active:
            self._handle.activate(block)

    def delete_adapter_fusion(self, adapter_names: Any) -> None:
        """`adapters.remove(Fuse("a", "b").name)`"""
        self._handle.remove(as_fuse(adapter_names).name)

    def train_adapter_fusion(self, adapter_setup: Any, unfreeze_adapters: bool = False) -> None:
        """`adapters.train(Fuse("a", "b"))`, with `fused=True` to train its adapters along"""
        given = setup_in(adapter_setup)
        setup = given if isinstance(given, Stack) else as_fuse(given)
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

    def share_parameters(
        self, adapter_names: Any, name: str | None = None, reference_adapter_name: str | None = None
    ) -> None:
        """`adapters.share(names)`: the first one's are shared"""
        refuse("share_parameters", name=name)
        first = [] if reference_adapter_name is None else [reference_adapter_name]
        self._handle.share(list(dict.fromkeys([*first, *_listed(adapter_names)])))

    def unshare_parameters(self, adapter_names: Any, name: str | None = None) -> None:
        """`adapters.unshare(names)`"""
        refuse("unshare_parameters", name=name)
        self._handle.unshare(_listed(adapter_names))

    # Token embeddings

    def add_embeddings(
        self,
        name: str,
        tokenizer: Any,
        reference_embedding: str | None = None,
        reference_tokenizer: Any = None,
        embedding_dim: int | None = None,
    ) -> None:
        """`adapters.add_embeddings(name, tokenizer, reference=..., reference_tokenizer=...)`"""
        refuse("add_embeddings", embedding_dim=embedding_dim)
        self._handle.add_embeddings(
            name, tokenizer, reference=reference_embedding, reference_tokenizer=reference_tokenizer
        )

    def load_embeddings(self, path: str, name: str) -> Any:
        """`adapters.load_embeddings(folder, name=...)`"""
        return self._handle.load_embeddings(path, name=name)

    def save_embeddings(self, path: str, name: str, tokenizer: Any = None) -> None:
        """`adapters.save_embeddings(name, folder, tokenizer=...)`"""
        self._handle.save_embeddings(name, path, tokenizer=tokenizer)

    def delete_embeddings(self, name: str) -> None:
        """`adapters.remove_embeddings(name)`"""
        self._handle.remove_embeddings(name)

    def set_active_embeddings(self, name: str) -> None:
        """`adapters.activate_embeddings(name)`"""
        self._handle.activate_embeddings(name)


def _listed(names: Any) -> list[str]:
    """Names as they may be written there: one, some, or a block."""
    return [names] if isinstance(names, str) else list(names)


METHODS = {
    name: str(method.__doc__).strip()
    for kind in (ModelMethods, FileMethods, HeadMethods)
    for name, method in vars(kind).items()
    if not name.startswith("_") and callable(method)
}
"""The methods that a model gets, and what each is in inarch."""
