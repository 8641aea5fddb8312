"""Finds the head a model already has."""

from collections.abc import Mapping

from torch import nn

from ..bank import CHILD
from ..core.site import Sites


def task_head(model: nn.Module, sites: Sites | None = None) -> tuple[str, ...]:
    """The paths of the modules that make up the model's task head; empty if it has none or none is known.

    For a transformers model these are the modules beside the base model or, where a task class has no base model of its
    own, those after the last site (the last module, where the sites are not known yet). A model that ends
    in pre-trained output embeddings has none: a language-modelling head is part of the base. For a timm model it is
    the classifier.
    """
    if hasattr(model, "base_model"):
        return _transformers_head(model, sites)
    classifier = getattr(model, "get_classifier", lambda: None)()
    if not isinstance(classifier, nn.Module) or not list(classifier.parameters()):
        return ()
    return tuple(path for path, module in model.named_modules() if module is classifier)


def _transformers_head(model: nn.Module, sites: Sites | None) -> tuple[str, ...]:
    children = [(path, child) for path, child in model.named_children() if path != CHILD and list(child.parameters())]
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return ()
    base = model.base_model
    if base is not model and isinstance(base, nn.Module):
        inside = {id(parameter) for parameter in base.parameters()}
        return tuple(
            path
            for path, child in children
            if child is not base and not any(id(parameter) in inside for parameter in child.parameters())
        )
    if "For" not in type(model).__name__:  # by transformers' naming, a class without a task
        return ()
    if sites is None:
        return tuple(path for path, _ in children[1:][-1:])
    holding = [any(site.layer_path.split(".")[0] == path for site in sites) for path, _ in children]
    last = max((number for number, holds in enumerate(holding) if holds), default=len(children))
    return tuple(path for path, _ in children[last + 1 :])


def id2label(model: nn.Module) -> dict[int, str]:
    """The label names in the model's configuration, by id; empty if it has none."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    return {int(key): str(value) for key, value in labels.items()} if isinstance(labels, Mapping) else {}
