"""Short example inputs, made from a model's forward signature and its configuration.

They are the same in every run and draw no random numbers. A model whose inputs cannot be told needs `example_inputs`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SiteError
from .trace import leaves

_TEXT_LENGTH = 8
_AUDIO_FRAMES = 12


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a forward is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Inputs":
        """The same on another device, with floating tensors in `dtype`."""
        return Inputs(
            tuple(_moved(value, device, dtype) for value in self.args),
            {name: _moved(value, device, dtype) for name, value in self.kwargs.items()},
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, in the same order for the same inputs on any device."""
        return [tensor for _, tensor in leaves((self.args, dict(self.kwargs)), depth=5)]


def _moved(value: Any, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
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
    parameters = inspect.signature(model.forward).parameters
    if config is None or not hasattr(config, "to_dict"):
        return _image_by_default_cfg(model)
    made = {name: make(config) for name, make in _MAKERS.items() if name in parameters}
    known: dict[str, Any] = {name: tensor for name, tensor in made.items() if tensor is not None}
    if not known:
        return []
    if "use_cache" in parameters:
        known["use_cache"] = False
    return [Inputs((), kwargs) for kwargs in _variants(type(model).__name__, known)]


def _variants(class_name: str, known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All inputs at once, then one modality at a time for a model that takes either."""
    if class_name.endswith("ForMultipleChoice") and "input_ids" in known:
        known = {**known, "input_ids": known["input_ids"][:, None]}
    yield dict(known)
    for name in ("input_ids", "pixel_values", "input_features", "input_values"):
        others = {"input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids"} - {name}
        fewer = {other: value for other, value in known.items() if other not in others}
        if name in known and len(fewer) < len(known):
            yield fewer


def _image_by_default_cfg(model: nn.Module) -> list[Inputs]:
    """An image for a model that describes its own input, as timm's do."""
    described = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    size = described.get("input_size") if isinstance(described, Mapping) else getattr(described, "input_size", None)
    name = next(iter(inspect.signature(model.forward).parameters), None)
    return [Inputs((), {name: _ramp(1, *size)})] if size and name else []


# -------------------------------------------------------------------- one maker per argument


def _ids(config: Any, text: Any, *, start: Any = None, stop: Any = None) -> Tensor | None:
    """(1, 8) token ids that mean nothing: no image, padding or mask token among them."""
    vocabulary = _value(text, "vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 1:
        return None
    special = _special_ids(config)
    plain = [token for token in range(min(vocabulary, 20 * _TEXT_LENGTH)) if token not in special] or [0]
    ids = [plain[place % len(plain)] for place in range(_TEXT_LENGTH)]
    stop = stop[0] if isinstance(stop, (list, tuple)) and stop else stop
    if isinstance(start, int) and start < vocabulary:
        ids[0] = start
    if isinstance(stop, int) and stop < vocabulary:
        ids[-1] = stop
    return torch.tensor([ids])


def _special_ids(config: Any) -> set[int]:
    settings = (item for part in _parts(config) for item in vars(part).items())
    values = [value for name, value in settings if name.endswith(("token_id", "token_index"))]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return {value for several in lists for value in several if isinstance(value, int)}


def _input_ids(config: Any) -> Tensor | None:
    text = _text_config(config)
    return _ids(config, text, stop=getattr(text, "eos_token_id", None))


def _decoder_input_ids(config: Any) -> Tensor | None:
    decoder = getattr(config, "decoder", None)
    text = decoder if hasattr(decoder, "to_dict") else _text_config(config)
    return _ids(config, text, start=getattr(config, "decoder_start_token_id", None))


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _pixel_values(config: Any) -> Tensor:
    """(1, channels, height, width), with frames before the channels for a video model."""
    size = _value(config, "image_size")
    if isinstance(size, Mapping):
        size = [size.get("height", 224), size.get("width", 224)]
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size or 224, size or 224)
    channels = _value(config, "num_channels") or _value(config, "in_channels") or _value(config, "in_chans") or 3
    frames = getattr(config, "num_frames", None)
    return _ramp(1, *((frames,) if frames else ()), channels, height, width)


def _input_features(config: Any) -> Tensor | None:
    """A spectrogram: (1, mel bins, frames) where the encoder has a fixed length, else (1, frames, features)."""
    bins, positions = _value(config, "num_mel_bins"), _value(config, "max_source_positions")
    features = _value(config, "input_feat_per_channel") or _value(config, "feature_projection_input_dim")
    if features:
        return _ramp(1, 8 * _AUDIO_FRAMES, features)
    return _ramp(1, bins, 2 * positions) if bins and positions else None


def _input_values(config: Any) -> Tensor | None:
    """A waveform (1, samples) long enough for a few frames, or a spectrogram (1, frames, mel bins)."""
    strides, kernels = _value(config, "conv_stride"), _value(config, "conv_kernel")
    if strides and kernels:
        samples = _AUDIO_FRAMES
        for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
            samples = (samples - 1) * stride + kernel
        return _ramp(1, samples)
    bins, length = _value(config, "num_mel_bins"), _value(config, "max_length")
    return _ramp(1, length, bins) if bins and length else None


def _encoder_hidden_states(config: Any) -> Tensor | None:
    """What a decoder looks at that was given cross-attention: (1, length, width)."""
    if not getattr(config, "add_cross_attention", False):
        return None
    width = getattr(config, "cross_attention_hidden_size", None) or getattr(config, "hidden_size", None)
    return _ramp(1, _TEXT_LENGTH - 3, width) if width else None


_MAKERS: dict[str, Callable[[Any], Tensor | None]] = {
    "pixel_values": _pixel_values,
    "input_features": _input_features,
    "input_values": _input_values,
    "input_ids": _input_ids,
    "decoder_input_ids": _decoder_input_ids,
    "encoder_hidden_states": _encoder_hidden_states,
}


def _ramp(*shape: int) -> Tensor:
    size = 1
    for length in shape:
        size *= length
    return torch.linspace(-1.0, 1.0, size).reshape(shape)


def _value(config: Any, name: str) -> Any:
    """A setting of the configuration, or of the nearest one inside it."""
    for part in _parts(config):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return None


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it, nearest first."""
    todo = [config]
    while todo:
        part = todo.pop(0)
        yield part
        todo += [value for value in vars(part).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
