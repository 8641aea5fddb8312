"""The methods of prediction heads that users of the library `adapters` call on a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import SetupError, nearest
from ..handle import Adapters
from ..heads import read_foreign_settings
from .heads import PredictionHead, labels_of, settings_of, two_scores
from .refused import refuse_kwargs


class HeadMethods:
    """Those of one model."""

    _handle: Adapters

    def _head(self, name: str, kind: str, *, overwrite_ok: bool, **settings: Any) -> None:
        given = settings_of(settings.pop("id2label", None), use_pooler=settings.pop("use_pooler", False), **settings)
        self._handle.add_head(name, kind, overwrite=overwrite_ok, **given)

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
        self._head(head_name, "question_answering", overwrite_ok=overwrite_ok, **two_scores(settings))

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

    def add_prediction_head(self, head: PredictionHead, overwrite_ok: bool = False, set_active: bool = True) -> None:
        """`adapters.add_head(name, kind, ...)`"""
        self._add(head.name, head.config, overwrite_ok=overwrite_ok, set_active=set_active)

    def add_prediction_head_from_config(
        self, head_name: str, config: Mapping[str, Any], overwrite_ok: bool = False, set_active: bool = True
    ) -> None:
        """`adapters.add_head(name, inarch.heads.read_foreign_settings(config))`"""
        self._add(head_name, read_foreign_settings(config), overwrite_ok=overwrite_ok, set_active=set_active)

    def _add(self, name: str, config: Any, *, overwrite_ok: bool, set_active: bool) -> None:
        active = self._handle.active_head
        self._handle.add_head(name, config, overwrite=overwrite_ok)
        if not set_active:
            self._handle.active_head = active

    def average_head(  # noqa: PLR0917  as it is called there
        self,
        head_name: str,
        head_list: Sequence[str] | Mapping[str, float],
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """`adapters.average_heads(name, of, weights)`"""
        self._handle.average_heads(
            head_name, head_list, weights, normalize_weights=normalize_weights, overwrite=overwrite_ok
        )
        if set_active:
            self._handle.active_head = head_name

    def delete_head(self, head_name: str) -> None:
        """`adapters.remove_head(name)`"""
        self._handle.remove_head(head_name)

    def get_labels(self, head_name: str | None = None) -> list[str] | None:
        """`adapters.flexible_heads[name].labels`"""
        labels = self.get_labels_dict(head_name)
        return None if labels is None else list(labels.values())

    def get_labels_dict(self, head_name: str | None = None) -> dict[int, str] | None:
        """`dict(enumerate(adapters.flexible_heads[name].labels))`"""
        name, heads = self._handle.active_head if head_name is None else head_name, self._handle.flexible_heads
        if not isinstance(name, str) or name not in heads:
            raise SetupError(f"The labels of one head are asked for; got {name!r}. {nearest(str(name), heads)}")
        labels = getattr(heads[name], "labels", None)
        return None if labels is None else dict(enumerate(labels))

    # Files

    def save_head(self, save_directory: str, head_name: str | None = None, use_safetensors: bool = False) -> None:
        """`adapters.save_head(name, folder)`"""
        self._handle.save_head(str(head_name or self._handle.active_head), save_directory)

    def save_all_heads(self, save_directory: str, use_safetensors: bool = False) -> None:
        """`for name in adapters.flexible_heads: adapters.save_head(name, folder)`"""
        for name in self._handle.flexible_heads:
            self._handle.save_head(name, Path(save_directory) / name)

    def load_head(
        self,
        save_directory: str,
        load_as: str | None = None,
        id2label: Mapping[int, str] | None = None,
        use_safetensors: bool = False,
        **kwargs: Any,
    ) -> str:
        """`adapters.load_head(folder, name=...)`"""
        refuse_kwargs("load_head", kwargs)
        labels = None if id2label is None else labels_of(id2label)
        name = self._handle.load_head(save_directory, name=load_as, overwrite=True)
        if labels is not None:
            self._handle.name_labels(name, labels)
        return name
