"""Short example inputs, made from a model's forward signature and its configuration.

They are the same in every run and draw no random numbers. A model whose inputs cannot be told needs `example_inputs`.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SiteError
from .arguments import forms, made_arguments, ramp, setting
from .placeholders import with_placeholders
from .trace import leaves


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a forward is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Inputs":
        """The same on another device, with floating tensors in `dtype`; what has no memory becomes ones."""
        return Inputs(
            tuple(_moved(value, device, dtype) for value in self.args),
            {name: _moved(value, device, dtype) for name, value in self.kwargs.items()},
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, in the same order for the same inputs on any device."""
        return [tensor for _, tensor in leaves((self.args, dict(self.kwargs)), depth=5)]


def _moved(value: Any, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        if value.is_meta and torch.device(device).type != "meta":  # what has only a shape
            return torch.ones_like(value, device=device, dtype=dtype if value.is_floating_point() else None)
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_moved(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {name: _moved(item, device, dtype) for name, item in value.items()}
    return value


def given_inputs(example_inputs: Any) -> Inputs:
    """What a user passed: one tensor, a tuple of arguments, or keyword arguments such as a tokenizer returns."""
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,))
    if isinstance(example_inputs, tuple) and any(True for _ in leaves(example_inputs)):
        return Inputs(example_inputs)
    if isinstance(example_inputs, Mapping) and any(True for _ in leaves(example_inputs)):
        return Inputs((), dict(example_inputs))
    raise SiteError(
        "`example_inputs` is a tensor, a tuple of arguments, or a dict of keyword arguments with at least one tensor; "
        f"got {type(example_inputs).__name__}. Pass what you call the model with."
    )


def made_inputs(model: nn.Module) -> list[Inputs]:
    """Inputs worth trying, those that reach most of the model first; none if nothing is known of the model."""
    config = getattr(model, "config", None)
    wanted = inspect.signature(model.forward).parameters
    if config is None or not hasattr(config, "to_dict"):
        return _image_by_default_cfg(model)
    known = made_arguments(config, wanted)
    if not known:
        return []
    if "use_cache" in wanted:
        known["use_cache"] = False
    placed = with_placeholders(model, known, wanted)
    if type(model).__name__.endswith("ForMultipleChoice") and "input_ids" in known:
        known["input_ids"] = known["input_ids"][:, None]
    first = [placed] if placed else []
    if placed and "image_sizes" in placed:  # which a model may name for the sake of one vision tower among many
        first.append({name: value for name, value in placed.items() if name != "image_sizes"})
    complete = forms(known, config)
    parts = [part for form in complete for part in _parts(form)]
    variants = {_shapes(kwargs): kwargs for kwargs in [*first, *complete, *parts]}
    return [Inputs((), kwargs) for kwargs in variants.values()]


def with_small_image(model: nn.Module, inputs: Inputs) -> Inputs | None:
    """The same inputs with an image of two by two patches, which a model may refuse; None without patches."""
    image, config = inputs.kwargs.get("pixel_values"), getattr(model, "config", None)
    if not isinstance(image, Tensor) or image.dim() != 4 or config is None:
        return None
    patch = setting(config, "patch_size")
    sides = tuple(patch) if isinstance(patch, (list, tuple)) else (patch, patch)
    if len(sides) != 2 or not all(
        isinstance(s, int) and 2 * s < have for s, have in zip(sides, image.shape[2:], strict=True)
    ):
        return None
    small = ramp(*image.shape[:2], *(2 * side for side in sides)).to(image)
    flags = {"interpolate_pos_encoding"} & inspect.signature(model.forward).parameters.keys()
    return Inputs(inputs.args, {**inputs.kwargs, "pixel_values": small, **dict.fromkeys(flags, True)})


def _parts(known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One modality at a time, for a model that takes either."""
    for name in _MODALITIES:
        others = {other for modality in _MODALITIES if modality != name for other in _MODALITIES[modality]}
        fewer = {other: value for other, value in known.items() if other not in others}
        if name in known and len(fewer) < len(known):
            yield fewer


def _shapes(kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, tuple(value.shape) if isinstance(value, Tensor) else value) for name, value in kwargs.items())


_MODALITIES = {
    "input_ids": ("input_ids", "bbox"),
    "pixel_values": ("pixel_values", "image_grid_thw", "image_sizes", "spatial_shapes", "pixel_attention_mask"),
    "pixel_values_videos": ("pixel_values_videos",),
    "input_features": ("input_features", "input_features_mask", "feature_attention_mask", "decoder_input_ids"),
    "input_values": ("input_values", "decoder_input_ids"),
}
"""Arguments that make sense alone, and those that go with them."""


def _image_by_default_cfg(model: nn.Module) -> list[Inputs]:
    """An image for a model that describes its own input, as timm's do."""
    described = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    size = described.get("input_size") if isinstance(described, Mapping) else getattr(described, "input_size", None)
    name = next(iter(inspect.signature(model.forward).parameters), None)
    return [Inputs((), {name: ramp(1, *size)})] if size and name else []
