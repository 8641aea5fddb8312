"""The methods that read and write adapters, as users of the library `adapters` call them on a model.

`use_safetensors` chooses nothing: folders of inarch hold no pickle, and in those of `adapters` whichever file is there
is read, without running it. The folder says what its adapter is, so `config` and `model_name` of the old index do not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..compose import Setup
from ..core.errors import SetupError
from ..handle import Adapters
from .composition import as_fuse, as_setup
from .heads import labels_of
from .own import OF_TRANSFORMERS, own_method
from .refused import refuse, refuse_kwargs


class FileMethods:
    """Those of one model."""

    _handle: Adapters
    _model: nn.Module

    def save_adapter(  # noqa: PLR0917  as it is called there
        self,
        save_directory: str,
        adapter_name: str,
        with_head: bool = True,
        meta_dict: Any = None,
        custom_weights_loaders: Any = None,
        use_safetensors: bool = False,
    ) -> None:
        """`adapters.save(name, folder)`, with `format="adapterhub"` for the library `adapters`"""
        refuse("save_adapter", meta_dict=meta_dict, custom_weights_loaders=custom_weights_loaders)
        self._handle.save(adapter_name, save_directory, head=with_head)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """`adapters.load(folder_or_repository, name=..., revision=...)`"""
        if OF_TRANSFORMERS & set(kwargs):
            return own_method(self._model, "load_adapter")(*args, **kwargs)
        return self._load_adapter(*args, **kwargs)

    def _load_adapter(  # noqa: PLR0917  as it is called there
        self,
        adapter_name_or_path: str,
        config: Any = None,
        version: str | None = None,
        model_name: str | None = None,
        load_as: str | None = None,
        with_head: bool = True,
        custom_weights_loaders: Any = None,
        leave_out: Sequence[int] | None = None,
        id2label: Mapping[int, str] | None = None,
        set_active: bool = False,
        use_safetensors: bool = False,
        **kwargs: Any,
    ) -> str:
        refuse("load_adapter", custom_weights_loaders=custom_weights_loaders, leave_out=leave_out or None)
        refuse_kwargs("load_adapter", kwargs)
        labels = None if id2label is None else labels_of(id2label)
        name = self._handle.load(adapter_name_or_path, name=load_as, head=with_head, overwrite=True, revision=version)
        if labels is not None:
            for head in self._handle.heads_of(name, stay=False):
                self._handle.name_labels(head, labels)
        if set_active:
            self._handle.activate(name)
        return name

    def save_all_adapters(
        self,
        save_directory: str,
        with_head: bool = True,
        meta_dict: Any = None,
        custom_weights_loaders: Any = None,
        use_safetensors: bool = False,
    ) -> None:
        """`for name in adapters.names: adapters.save(name, folder)`, without those in `adapters.fusions`"""
        refuse("save_all_adapters", meta_dict=meta_dict, custom_weights_loaders=custom_weights_loaders)
        for name in self._handle.names:
            if name not in self._handle.fusions:
                self._handle.save(name, Path(save_directory) / name, head=with_head)

    def save_adapter_fusion(  # noqa: PLR0917  as it is called there
        self,
        save_directory: str,
        adapter_names: Any,
        meta_dict: Any = None,
        custom_weights_loaders: Any = None,
        with_head: bool = False,
        use_safetensors: bool = False,
    ) -> None:
        """`adapters.save(Fuse("a", "b").name, folder, head=False)`"""
        refuse("save_adapter_fusion", meta_dict=meta_dict, custom_weights_loaders=custom_weights_loaders)
        self._handle.save(as_fuse(adapter_names).name, save_directory, head=bool(with_head))

    def save_all_adapter_fusions(
        self,
        save_directory: str,
        meta_dict: Any = None,
        custom_weights_loaders: Any = None,
        use_safetensors: bool = False,
    ) -> None:
        """`for name in adapters.fusions: adapters.save(name, folder, head=False)`"""
        refuse("save_all_adapter_fusions", meta_dict=meta_dict, custom_weights_loaders=custom_weights_loaders)
        for name in self._handle.fusions:
            self._handle.save(name, Path(save_directory) / name, head=False)

    def load_adapter_fusion(  # noqa: PLR0917  as it is called there
        self,
        adapter_fusion_name_or_path: str,
        load_as: str | None = None,
        custom_weights_loaders: Any = None,
        set_active: bool = False,
        with_head: bool = True,
        use_safetensors: bool = False,
        **kwargs: Any,
    ) -> str:
        """`adapters.load(folder, name=...)`"""
        refuse("load_adapter_fusion", custom_weights_loaders=custom_weights_loaders)
        refuse_kwargs("load_adapter_fusion", kwargs)
        name = self._handle.load(adapter_fusion_name_or_path, name=load_as, head=with_head, overwrite=True)
        if set_active:
            fused = name.split("+")
            if len(fused) < 2 or not all(child in self._handle for child in fused):
                raise SetupError(
                    f"Fusion layers are activated with the adapters that they combine; got `{name}`, which names no "
                    f'adapters of the model. Call `set_active_adapters(Fuse(..., name="{name}"))`.'
                )
            self._handle.activate(as_fuse(fused))
        return name

    def save_adapter_setup(  # noqa: PLR0917  as it is called there
        self,
        save_directory: str,
        adapter_setup: Any,
        head_setup: Any = None,
        meta_dict: Any = None,
        custom_weights_loaders: Any = None,
        use_safetensors: bool = False,
    ) -> None:
        """`adapters.save_setup(folder, setup)`"""
        refuse(
            "save_adapter_setup",
            meta_dict=meta_dict,
            custom_weights_loaders=custom_weights_loaders,
            head_setup=head_setup,
        )
        self._handle.save_setup(save_directory, as_setup(adapter_setup))

    def load_adapter_setup(
        self,
        adapter_setup_name_or_path: str,
        version: str | None = None,
        custom_weights_loaders: Any = None,
        set_active: bool = False,
        use_safetensors: bool = False,
        **kwargs: Any,
    ) -> tuple[Setup, Any]:
        """`adapters.load_setup(folder)`, and `adapters.heads_of(setup)`"""
        refuse("load_adapter_setup", custom_weights_loaders=custom_weights_loaders, version=version)
        refuse_kwargs("load_adapter_setup", kwargs)
        setup = self._handle.load_setup(adapter_setup_name_or_path, overwrite=True)
        heads = self._handle.heads_of(setup, stay=False)
        if set_active:
            self._handle.activate(setup)
        return setup, heads[0] if len(heads) == 1 else list(heads) or None

    def push_adapter_to_hub(  # noqa: PLR0917  as it is called there
        self,
        repo_id: str,
        adapter_name: str,
        datasets_tag: str | None = None,
        local_path: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        overwrite_adapter_card: bool = False,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
        adapter_card_kwargs: Any = None,
    ) -> str:
        """`adapters.push(name, repository, ...)`, which writes a new card each time"""
        refuse("push_adapter_to_hub", local_path=local_path, adapter_card_kwargs=adapter_card_kwargs)
        return self._handle.push(
            adapter_name,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            message=commit_message,
            description=commit_description,
            datasets=() if datasets_tag is None else [datasets_tag],
            pull_request=create_pr,
        )
