"""LoRA of PEFT on the experts that a module holds in one parameter (`target_parameters`), read and written.

    lora_A (E r, in)    lora_B (out, r E)         the update of expert e: lora_B[:, e::E] · lora_A[e r:(e + 1) r]

E experts of rank r; `in` and `out` are those of the parameter as PEFT takes it to be stored: (E, in, out) where the
module says `is_transposed`, else (E, out, in). PEFT wraps the module once for each of its parameters, in their order,
so that `base_layer` stands in the paths of all but the last. No path says which parameter is meant: the shapes do.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..core.errors import StateError
from ..core.site import Projection
from ..methods import Placement
from .peft_names import module_path
from .peft_source import LORA_KEY, Source, plain


@dataclass(frozen=True, slots=True)
class Experts:
    """The updates of one parameter."""

    placement: Placement
    parameter: str
    """Its path, with which the patterns of ranks and scales are compared."""
    a: Tensor
    """(E, r, in)"""
    b: Tensor
    """(E, out, r)"""


def take_experts(source: Source, stored: dict[str, Tensor]) -> list[Experts]:
    """The updates of experts, taken out of what is stored. Raises `StateError` for one that is of no parameter here."""
    maps: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in list(stored):
        found = LORA_KEY.fullmatch(key)
        if found is not None and found["leaf"] == "weight":
            places = source.names.find(plain(found["path"]))
            if places and places[0].projection.experts:
                maps[found["path"]][found["side"]] = stored.pop(key)
    updates = [_read(source, path, parts) for path, parts in maps.items()]
    if len({update.placement.projection_key for update in updates}) < len(updates):
        raise _strange(source, next(iter(maps)))
    return updates


def _read(source: Source, path: str, parts: Mapping[str, Tensor]) -> Experts:
    places = source.names.find(plain(path))
    if len(parts) < 2 or any(part.dim() != 2 for part in parts.values()):
        raise _strange(source, path)
    a, b = parts["A"], parts["B"]
    meant = []
    for place in places:
        module, projection = _holder(source.model, place), place.projection
        rows, columns = _stored(module, projection)
        if a.shape[1] == columns and b.shape[0] == rows and not len(a) % projection.experts and len(a) == b.shape[1]:
            meant.append(place)
    if len(meant) != 1:
        raise _strange(source, path)
    projection = meant[0].projection
    count = projection.experts
    a = a.reshape(count, -1, a.shape[1])
    b = b.reshape(len(b), -1, count).permute(2, 0, 1)
    if _is_turned(_holder(source.model, meant[0]), projection):
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return Experts(meant[0], f"{plain(path)}.{projection.weight}", a.contiguous(), b.contiguous())


def written(updates: Iterable[Experts], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a folder, by their keys there."""
    by_module: dict[str, list[Experts]] = defaultdict(list)
    for update in updates:
        by_module[module_path(update.placement.site, update.placement.projection)].append(update)
    found: dict[str, Tensor] = {}
    for path, several in by_module.items():
        order = [name for name, _ in model.get_submodule(path).named_parameters(recurse=False)]
        several.sort(key=lambda update: order.index(update.placement.projection.weight))
        for depth, update in enumerate(reversed(several)):
            a, b = update.a, update.b
            if _is_turned(model.get_submodule(path), update.placement.projection):
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            key = ".".join(["base_model.model", path, *["base_layer"] * depth])
            found[f"{key}.lora_A.weight"] = a.flatten(0, 1).contiguous()
            found[f"{key}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
    return found


def _holder(model: nn.Module, place: Placement) -> nn.Module:
    return model.get_submodule(module_path(place.site, place.projection))


def _stored(module: nn.Module, projection: Projection) -> tuple[int, int]:
    """Rows of B and columns of A of the update of a parameter, as PEFT makes them."""
    turned = _is_turned(module, projection)
    return (projection.in_features, projection.num_rows) if turned else (projection.num_rows, projection.in_features)


def _is_turned(module: nn.Module, projection: Projection) -> bool:
    """Whether what PEFT takes for inputs are the outputs of an expert: where it takes (in, out) for (out, in)."""
    return bool(getattr(module, "is_transposed", False)) != projection.transposed


def _strange(source: Source, path: str) -> StateError:
    return StateError(
        "An update of experts is one of a parameter that holds them all, and of one parameter only; got none such for "
        f"`{path}` in {type(source.model).__name__}, at `{source.folder}`. Load it on the base model it was trained on."
    )
