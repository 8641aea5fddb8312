"""Finds the head a model already has."""

from collections.abc import Mapping

from torch import nn


def task_head(model: nn.Module) -> tuple[str, ...]:
    """The paths of the modules that make up the model's task head; empty if it has none or none is known.

    For a transformers model these are the modules beside the base model, unless they end in pre-trained output
    embeddings (a language-modelling head is part of the base); for a timm model, its classifier.
    """
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module):
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if base is model or output is not None:
            return ()
        inside = {id(parameter) for parameter in base.parameters()}
        return tuple(
            path
            for path, child in model.named_children()
            if child is not base and (own := list(child.parameters())) and not any(id(p) in inside for p in own)
        )
    classifier = getattr(model, "get_classifier", lambda: None)()
    if not isinstance(classifier, nn.Module) or not list(classifier.parameters()):
        return ()
    return tuple(path for path, module in model.named_modules() if module is classifier)


def id2label(model: nn.Module) -> dict[int, str]:
    """The label names in the model's configuration, by id; empty if it has none."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    return {int(key): str(value) for key, value in labels.items()} if isinstance(labels, Mapping) else {}
