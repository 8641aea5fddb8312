"""Reads (IA)³ of PEFT: one vector for each projection, at its input or its output."""

import re
from collections import defaultdict

from torch import Tensor

from ..bank import module_key
from ..core.config import Config
from ..core.errors import StateError
from ..methods.ia3 import IA3
from .peft_config import ATTENTION_ROLES, left_out, made
from .peft_source import Source, check_rest, plain, rows_of

_IA3_KEY = re.compile(r"(?P<path>.+)\.ia3_l(?:\.default)?")


def read_ia3(source: Source, stored: dict[str, Tensor]) -> tuple[Config, dict[str, Tensor], list[str]]:
    """The configuration, the tensors by our keys, and the paths of the adapted modules.

    PEFT scales the input of what `feedforward_modules` names, and the output of the rest: the tensor is a row, or a
    column.
    """
    scales: dict[str, Tensor] = {}
    for key in list(stored):
        if (found := _IA3_KEY.fullmatch(key)) is not None:
            scales[plain(found["path"])] = stored.pop(key)
    places = source.find(scales)
    check_rest(source, stored)
    tensors: dict[str, Tensor] = {}
    at_input: dict[str, set[bool]] = defaultdict(set)
    for path, scale in scales.items():
        inner = len(scale) == 1 and scale.shape[-1] != 1
        for place in places[path]:
            at_input[place.role].add(inner)
            key = f"{place.site.key}.{module_key(IA3.name, place)}"
            if inner:
                tensors[f"{key}.input_scale"] = scale.flatten()
            else:
                tensors[f"{key}.scale"] = rows_of(place, scale.flatten())
    mixed = [role for role, sides in at_input.items() if len(sides) > 1 or (role == "gate")]
    if mixed:
        raise StateError(
            "The projections of one role are all scaled at their input, or all at their output, and no gate is; got "
            f"`{mixed[0]}` otherwise, at `{source.folder}`. Use PEFT."
        )
    inside = {role for role, sides in at_input.items() if True in sides}
    present = [place for meanings in places.values() for place in meanings]
    attention = [role for role in ATTENTION_ROLES if role in at_input]
    if "up" in at_input and "down" in inside:
        raise StateError(
            "(IA)³ scales an MLP between its projections at one place; got the output of the up-projection and the "
            f"input of the down-projection, at `{source.folder}`. Use PEFT."
        )
    config = made(
        source,
        IA3.name,
        selfattn_lora=bool(attention),
        attn_matrices=attention or ["k", "v"],
        intermediate_lora="up" in at_input or "down" in inside,
        after_activation="up" not in at_input,
        output_lora="down" in at_input and "down" not in inside,
        input_matrices=[role for role in (*ATTENTION_ROLES, "up") if role in inside],
        **left_out(source.names.sites, present),
    )
    return config, tensors, list(scales)
