"""Places in a text for what a tower makes of an image or a sound: as many as the tower gives vectors.

Models of transformers name the tokens in their configuration and give the vectors by `get_image_features` and the like,
so the towers are asked, on a copy without weights if they run there.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import forms, token_of
from .known import Known
from .meta import meta_copy
from .trace import leaves, trace

_KINDS = {"image": ("pixel_values", 1), "video": ("pixel_values_videos", 2), "audio": ("input_features", 3)}
"""The kinds, each with the argument of its data and its number in `mm_token_type_ids`."""


def with_placeholders(model: nn.Module, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments with placeholder tokens for the images and sounds among them; None if there are none.

    The data gets the form that its tower takes; data that no tower takes is left out.
    """
    ids = made.get("input_ids")
    asked = {kind: data for kind, (data, _) in _KINDS.items() if data in made and _has_tower(model, kind)}
    if ids is None or not asked:
        return None
    result = {name: value for name, value in made.items() if not _is_data(name)}
    pieces: dict[str, int] = {}
    towers = _Towers(model)
    for kind, data in asked.items():
        for form in forms({name: value for name, value in made.items() if _goes_with(name, data)}, model.config):
            count = towers.count(kind, form)
            if count:
                pieces[kind] = count
                result |= form
                break
    if not pieces:
        return None
    texts = put_placeholders(model.config, ids, pieces)
    return result | {name: value for name, value in texts.items() if name in wanted}


def count_features(model: nn.Module, kind: str, data: Mapping[str, Any]) -> int | None:
    """How many vectors a model makes of an image, a video or a sound; None if it does not take the data."""
    return _Towers(model).count(kind, data)


def put_placeholders(config: Any, ids: Tensor, pieces: Mapping[str, int]) -> dict[str, Tensor]:
    """`input_ids` (1, length) with that many placeholders of each kind in it, and what goes with them."""
    texts, types = [ids[:, :2]], [torch.zeros(1, 2, dtype=torch.long)]
    for kind, count in pieces.items():
        token = token_of(config, kind)
        assert token is not None, "only towers with a token are asked"
        texts += [torch.full((1, count), token), ids[:, 2:4]]
        types += [torch.full((1, count), _KINDS[kind][1]), torch.zeros(1, 2, dtype=torch.long)]
    placed = torch.cat([*texts, ids[:, 4:]], dim=1)
    return {
        "input_ids": placed,
        "attention_mask": torch.ones_like(placed),
        "mm_token_type_ids": torch.cat([*types, torch.zeros_like(ids[:, 4:])], dim=1),
    }


def _has_tower(model: nn.Module, kind: str) -> bool:
    return hasattr(model, f"get_{kind}_features") and token_of(model.config, kind) is not None


def _goes_with(name: str, data: str) -> bool:
    """Whether an argument is part of the data of a tower: the pixels, their grid, their sizes, a mask."""
    return name == data or name in _COMPANIONS.get(data, ())


def _is_data(name: str) -> bool:
    return any(_goes_with(name, data) for data, _ in _KINDS.values())


_COMPANIONS = {
    "pixel_values": ("image_grid_thw", "image_sizes", "spatial_shapes", "pixel_attention_mask"),
    "input_features": ("input_features_mask", "feature_attention_mask"),
}


class _Features(nn.Module):
    """The part of a model that turns an image or a sound into vectors."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, **kwargs: Any) -> Any:
        result = getattr(self.model, self.method)(**kwargs)
        found = (getattr(result, name, None) for name in ("pooler_output", "last_hidden_state"))
        return next((vectors for vectors in found if vectors is not None), result)


class _Towers:
    """The towers of a model, asked how many vectors they give; without weights where that works."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._twin: nn.Module | None = None

    def count(self, kind: str, data: Mapping[str, Any]) -> int | None:
        """How many vectors the tower makes of the data; None if it does not take them."""
        method = f"get_{kind}_features"
        accepted = inspect.signature(getattr(self._model, method)).parameters
        kwargs = {name: value for name, value in data.items() if name in accepted}
        for run in (self._on_meta, self._for_real):
            try:
                shapes = run(method, kwargs)
            except Exception:  # noqa: BLE001, S112  a model may raise anything; without a count, no placeholders
                continue
            else:
                return sum(int(torch.Size(shape[:-1]).numel()) for shape in shapes)
        return None

    def _on_meta(self, method: str, kwargs: Mapping[str, Any]) -> list[tuple[int, ...]]:
        self._twin = self._twin or meta_copy(self._model)
        known = Known()
        for tensor, value in zip(self._twin.buffers(), self._model.buffers(), strict=True):
            known.put(tensor, value)
        on_meta = {name: self._moved(value, torch.device("meta")) for name, value in kwargs.items()}
        for name, value in kwargs.items():
            known.put(on_meta[name], value)
        graph = trace(_Features(self._twin, method), (), on_meta, known)
        return [graph.values[index].shape for index in graph.calls[0].outputs.values()]

    def _for_real(self, method: str, kwargs: Mapping[str, Any]) -> list[tuple[int, ...]]:
        device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))
        training = [module for module in self._model.modules() if module.training]
        try:
            self._model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                moved = {name: self._moved(value, device) for name, value in kwargs.items()}
                result = _Features(self._model, method)(**moved)
        finally:
            for module in training:
                module.training = True
        return [tuple(tensor.shape) for _, tensor in leaves(result)]

    def _moved(self, value: Tensor, device: torch.device) -> Tensor:
        dtype = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), None)
        return value.to(device, dtype if value.is_floating_point() else None)
