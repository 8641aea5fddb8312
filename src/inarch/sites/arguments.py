"""One maker for each argument that models of transformers take, from the configuration alone.

A maker returns None where the configuration does not say enough. Images that are cut into patches beforehand are small
grids, whatever the size a model was trained on; other images, and spectrograms, have the size the configuration names.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TEXT_LENGTH = 8
_AUDIO_FRAMES = 12
_SAMPLES = 3200


def made_arguments(config: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What can be made of the arguments `wanted`: names with their parameters."""
    made: dict[str, Any] = {}
    for name, make in _MAKERS.items():
        if name in wanted:
            value = make(config, wanted)
            if value is not None:
                made[name] = value
    return made


def forms(made: Mapping[str, Any], config: Any) -> list[dict[str, Any]]:
    """The arguments as they are, then the ways in which models want the same data otherwise."""
    found = [dict(made)]
    pixels, sound = made.get("pixel_values"), made.get("input_features")
    if pixels is not None and pixels.dim() == 2:
        channels = _channels(config)
        side = int((pixels.shape[1] // channels) ** 0.5)
        if channels * side**2 == pixels.shape[1]:
            found.append({**made, "pixel_values": pixels.reshape(-1, channels, side, side)})
    elif pixels is not None and pixels.dim() == 4:
        several = {**made, "pixel_values": pixels[:, None]}
        plain = [{name: value for name, value in form.items() if name != "image_sizes"} for form in (made, several)]
        found += [several, *plain] if "image_sizes" in made else [several]
    if sound is not None and sound.dim() == 3:
        found += [{**form, "input_features": sound.transpose(1, 2)} for form in found]
    return found


def token_of(config: Any, kind: str) -> int | None:
    """The token that stands for a piece of an image, a video or a sound in the text."""
    for name in (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_placeholder_token_id"):
        token = setting(config, name)
        if isinstance(token, int):
            return token
    return None


def ramp(*shape: int) -> Tensor:
    """Numbers from -1 to 1 in the given shape."""
    size = 1
    for length in shape:
        size *= length
    return torch.linspace(-1.0, 1.0, size).reshape(shape)


def setting(config: Any, name: str) -> Any:
    """A setting of the configuration, or of the nearest one inside it."""
    for part in parts(config):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return None


def parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it, nearest first."""
    todo = [config]
    while todo:
        part = todo.pop(0)
        yield part
        todo += [value for value in vars(part).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        value = setting(config, name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


# -------------------------------------------------------------------- text


def _ids(config: Any, text: Any, *, start: Any = None, stop: Any = None) -> Tensor | None:
    """(1, 8) token ids that mean nothing: no image, padding or mask token among them."""
    vocabulary = setting(text, "vocab_size") or (2**16 if hasattr(text, "num_hash_functions") else None)
    if not isinstance(vocabulary, int) or vocabulary < 1:
        return None
    special = _special_ids(config)
    plain = [token for token in range(min(vocabulary, 20 * TEXT_LENGTH)) if token not in special] or [0]
    ids = [plain[place % len(plain)] for place in range(TEXT_LENGTH)]
    stop = stop[0] if isinstance(stop, (list, tuple)) and stop else stop
    if isinstance(start, int) and start < vocabulary:
        ids[0] = start
    if isinstance(stop, int) and stop < vocabulary:
        ids[-1] = stop
    return torch.tensor([ids])


def _special_ids(config: Any) -> set[int]:
    settings = (item for part in parts(config) for item in vars(part).items())
    values = [value for name, value in settings if name.endswith(("token_id", "token_index"))]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return {value for several in lists for value in several if isinstance(value, int)}


def _input_ids(config: Any, _wanted: Mapping[str, Any]) -> Tensor | None:
    text = _text_config(config)
    return _ids(config, text, stop=getattr(text, "eos_token_id", None))


def _decoder_input_ids(config: Any, _wanted: Mapping[str, Any]) -> Tensor | None:
    decoder = getattr(config, "decoder", None)
    text = decoder if hasattr(decoder, "to_dict") else _text_config(config)
    return _ids(config, text, start=getattr(config, "decoder_start_token_id", None))


def _text_config(config: Any) -> Any:
    """The part that describes the text; where there are several, the one that reads."""
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:
        return next((part for part in (getattr(config, name, None) for name in _READERS) if part is not None), config)


_READERS = ("text_config", "text_encoder", "encoder", "decoder")


def _bbox(_config: Any, _wanted: Mapping[str, Any]) -> Tensor:
    """(1, 8, 4): a box on the page for each token, x0 y0 x1 y1."""
    corner = torch.arange(TEXT_LENGTH)
    return torch.stack([corner, corner, corner + 3, corner + 2], dim=-1)[None]


# -------------------------------------------------------------------- images


def _pixel_values(config: Any, wanted: Mapping[str, Any]) -> Tensor | None:
    """(1, channels, height, width), with frames before the channels for a video model; or patches of a grid."""
    if "spatial_shapes" in wanted:
        patches = _flat_patches(config)
        return None if patches is None else patches[None]
    if any(name in wanted for name in ("image_grid_thw", "grid_thw")):
        return _flat_patches(config)
    channels, height, width = _image_shape(config)
    pinpoint = _pinpoint(config)
    if pinpoint and "image_sizes" in wanted:
        return ramp(1, 1 + (pinpoint[0] // height) * (pinpoint[1] // width), channels, height, width)
    frames = getattr(config, "num_frames", None)
    return ramp(1, *((frames,) if frames else ()), channels, height, width)


def _pixel_values_videos(config: Any, _wanted: Mapping[str, Any]) -> Tensor | None:
    """(1, frames, channels, height, width), for a model of videos."""
    frames = setting(config, "num_frames") or setting(config, "frames_per_clip")
    return ramp(1, frames, *_image_shape(config)) if isinstance(frames, int) else None


def _image_shape(config: Any) -> tuple[int, int, int]:
    size = setting(config, "image_size") or setting(config, "crop_size")
    if isinstance(size, Mapping):
        size = [size.get("height", 224), size.get("width", 224)]
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size or 224, size or 224)
    return _channels(config), height, width


def _channels(config: Any) -> int:
    return _first(config, "num_channels", "in_channels", "in_chans", "image_channels") or 3


def _side(config: Any) -> int:
    """Patches along each side of a small image: two after merging."""
    merge = (
        setting(config, "spatial_merge_size") or setting(config, "merge_size") or setting(config, "merge_kernel_size")
    )
    merge = merge[0] if isinstance(merge, (list, tuple)) else merge
    return 2 * (merge if isinstance(merge, int) else 2)


def _flat_patches(config: Any) -> Tensor | None:
    """(patches, values of one): what image processors make of an image of variable size."""
    patch = setting(config, "patch_size")
    side = patch[0] if isinstance(patch, (list, tuple)) else patch
    if not isinstance(side, int):
        return None
    frames = setting(config, "temporal_patch_size") or setting(config, "patch_temporal") or 1
    frames = frames[0] if isinstance(frames, (list, tuple)) else frames
    return ramp(_side(config) ** 2, _channels(config) * frames * side**2)


def _grid(config: Any, _wanted: Mapping[str, Any]) -> Tensor:
    """(1, 3): frames, rows and columns of patches of one image."""
    return torch.tensor([[1, _side(config), _side(config)]])


def _spatial_shapes(config: Any, _wanted: Mapping[str, Any]) -> Tensor:
    return torch.tensor([[_side(config), _side(config)]])


def _pixel_attention_mask(config: Any, wanted: Mapping[str, Any]) -> Tensor | None:
    """(1, patches), all of them part of the image."""
    return torch.ones(1, _side(config) ** 2, dtype=torch.long) if "spatial_shapes" in wanted else None


def _image_sizes(config: Any, _wanted: Mapping[str, Any]) -> Tensor:
    return torch.tensor([_pinpoint(config) or _image_shape(config)[1:]])


def _pinpoint(config: Any) -> list[int] | None:
    """(height, width) of an image that is cut into pieces, besides being seen as a whole."""
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    return list(pinpoints[0]) if pinpoints else None


def _patches_as_hidden_states(config: Any, wanted: Mapping[str, Any]) -> Tensor | None:
    return _flat_patches(config) if "grid_thw" in wanted else None


# -------------------------------------------------------------------- sound


def _input_features(config: Any, _wanted: Mapping[str, Any]) -> Tensor | None:
    """A spectrogram: (1, mel bins, frames) where the encoder has a fixed length, else (1, frames, features)."""
    bins, positions = setting(config, "num_mel_bins"), setting(config, "max_source_positions")
    features = _first(config, "input_feat_per_channel", "feature_projection_input_dim", "input_feat_size", "input_dim")
    if features:
        return ramp(1, 8 * _AUDIO_FRAMES, features)
    if bins and positions:
        return ramp(1, bins, 2 * positions)
    return ramp(1, 16 * _AUDIO_FRAMES, bins) if bins else None


def _frames_mask(config: Any, wanted: Mapping[str, Any]) -> Tensor | None:
    """(1, frames): which frames of the spectrogram are sound; all."""
    features = _input_features(config, wanted)
    if features is None:
        return None
    bins = setting(config, "num_mel_bins")
    frames = features.shape[2] if features.shape[1] == bins else features.shape[1]
    return torch.ones(1, frames, dtype=torch.long)


def _input_values(config: Any, _wanted: Mapping[str, Any]) -> Tensor | None:
    """A waveform (1, samples) long enough for a few frames, or a spectrogram (1, frames, mel bins)."""
    strides, kernels = setting(config, "conv_stride"), setting(config, "conv_kernel")
    if isinstance(strides, (list, tuple)) and isinstance(kernels, (list, tuple)):
        samples = _AUDIO_FRAMES
        for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
            samples = (samples - 1) * stride + kernel
        return ramp(1, samples)
    bins, length = setting(config, "num_mel_bins"), setting(config, "max_length")
    if bins and length:
        return ramp(1, length, bins)
    return ramp(1, 1, _SAMPLES) if setting(config, "sampling_rate") else None


def _past_values(config: Any, _wanted: Mapping[str, Any]) -> Tensor | None:
    """(1, length, channels) of a time series."""
    length, channels = getattr(config, "context_length", None), getattr(config, "num_input_channels", None)
    return ramp(1, length, channels) if isinstance(length, int) and isinstance(channels, int) else None


def _encoder_hidden_states(config: Any, wanted: Mapping[str, Any]) -> Tensor | None:
    """What a decoder looks at that was given cross-attention: (1, length, width)."""
    required = wanted["encoder_hidden_states"].default is wanted["encoder_hidden_states"].empty
    if not required and not getattr(config, "add_cross_attention", False):
        return None
    width = getattr(config, "cross_attention_hidden_size", None) or getattr(config, "hidden_size", None)
    return ramp(1, TEXT_LENGTH - 3, width) if width else None


_MAKERS: dict[str, Callable[[Any, Mapping[str, Any]], Tensor | None]] = {
    "pixel_values": _pixel_values,
    "pixel_values_videos": _pixel_values_videos,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "hidden_states": _patches_as_hidden_states,
    "spatial_shapes": _spatial_shapes,
    "pixel_attention_mask": _pixel_attention_mask,
    "image_sizes": _image_sizes,
    "input_features": _input_features,
    "input_features_mask": _frames_mask,
    "feature_attention_mask": _frames_mask,
    "input_values": _input_values,
    "input_ids": _input_ids,
    "bbox": _bbox,
    "decoder_input_ids": _decoder_input_ids,
    "encoder_hidden_states": _encoder_hidden_states,
    "past_values": _past_values,
}
