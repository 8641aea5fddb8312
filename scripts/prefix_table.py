"""Compare every attention that has a prefix with the formula of attention, in float64, over the models of the zoo.

    python scripts/prefix_table.py [--every 10] [TYPE ...]

Each type of transformers is built tiny (see `scripts/zoo`), given random prefixes, and run once under `sdpa` and once
under `eager`. What an attention hands to the interface, before a prefix is there, is recorded; what it gets back is
compared with

    softmax(cap(q [P_K; K]ᵀ · scale) + [0; bias + mask]) [P_V; V]

Prints the largest difference for each type, relative to the largest value where that is above 1, or why it has none;
ends with 1 if one is above 1e-5. All types take half an hour on one core; `--every 10` takes every tenth.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface
from transformers.utils.logging import set_verbosity_error
from zoo.build import model_types, tiny_model
from zoo.factories import FACTORIES
from zoo.judge import _generic, _run

import inarch
from inarch.attach import stored
from inarch.prefixes import ATTRIBUTE

TOLERANCE = 1e-5
HIDDEN = -1e30


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, keys: Tensor, values: Tensor,
             is_causal: bool, **settings: Any) -> Tensor:  # fmt: skip
    """What an attention gives with a prefix of keys and values, (B, L, N, H)."""
    q, k, v = q.double(), k.double(), v.double()
    size, heads, length, width = q.shape
    seen = k.shape[2]

    def whole(prefix: Tensor, own: Tensor) -> Tensor:
        split = prefix.detach().double().view(1, -1, own.shape[1], own.shape[3]).transpose(1, 2)
        joined = torch.cat([split.expand(size, -1, -1, -1), own], 2)
        return joined.repeat_interleave(heads // own.shape[1], 1)

    scale = settings.get("scaling")
    scores = q @ whole(keys, k).mT * (width**-0.5 if scale is None else scale)
    if (cap := settings.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    own = scores[..., len(keys) :]
    if (bias := settings.get("position_bias")) is not None:
        own += bias.double()
    if mask is not None:
        mask = mask[..., :seen]
        own += torch.where(mask, 0.0, HIDDEN) if mask.dtype == torch.bool else mask.double().clamp(min=HIDDEN)
    elif is_causal and length > 1:
        own += torch.full((length, seen), HIDDEN, dtype=torch.double).triu(1)
    sinks = settings.get("s_aux")
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(size, -1, length, 1)], -1)
    return (scores.softmax(-1)[..., : len(keys) + seen] @ whole(values, v)).transpose(1, 2)


class Watch:
    """Stands before the attention interface, and before what puts prefixes there; compares every call."""

    def __init__(self, prefixes: dict[int, nn.Module]) -> None:
        self.prefixes, self.worst, self.count = prefixes, 0.0, 0

    def get_interface(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A `get_interface` whose functions are compared."""

        def found(interface: Any, implementation: str, default: Any) -> Any:
            function = inner(interface, implementation, default)

            def call(module: nn.Module, *args: Any, **settings: Any) -> Any:
                names = ("query", "key", "value", "attention_mask")[len(args) :]
                args = (*args, *(settings.pop(name, None) for name in names))
                result = function(module, *args, **settings)
                if ATTRIBUTE in module.__dict__:
                    given = settings.pop("is_causal", None)
                    is_causal = getattr(module, "is_causal", True) if given is None else given
                    keys, values = self.prefixes[id(module)].flattened()
                    is_causal = is_causal and implementation == "sdpa"
                    want = expected(*args[:4], keys=keys, values=values, is_causal=is_causal, **settings)
                    apart = (result[0].double().reshape(want.shape) - want).abs().max()
                    self.worst = max(self.worst, float(apart / want.abs().max().clamp(min=1)))
                    self.count += 1
                return result

            return call

        return found


def compare(model_type: str) -> float | str:
    """The largest difference, or what stands in the way."""
    try:
        model = tiny_model(model_type)
        factory = FACTORIES.get(model_type)
        inputs = factory(model) if factory else _generic(model)
        given = None if factory is None else dict(inputs.kwargs) if not inputs.args else inputs.args
        adapters = inarch.attach(model, example_inputs=given)
    except Exception as error:  # noqa: BLE001  the zoo says what is wrong with a model that is none
        return f"not in the zoo: {type(error).__name__}"
    try:
        adapters.add("a", "prefix_tuning_flat[prefix_length=3]")
        adapters.activate("a")
        slots = {id(module): module.__dict__[ATTRIBUTE] for module in model.modules() if ATTRIBUTE in module.__dict__}
        at = stored(model, adapters.sites, "a")
        watch = Watch({key: at[slot.site.key].find("prefix") for key, slot in slots.items()})
        for implementation in ("sdpa", "eager"):
            try:
                model.set_attn_implementation(implementation)
            except ValueError:
                continue
            ours = AttentionInterface.get_interface
            AttentionInterface.get_interface = watch.get_interface(ours)
            try:
                _run(model, inputs)
            finally:
                AttentionInterface.get_interface = ours
    except inarch.InarchError as error:
        return f"refused: {str(error).partition(';')[0]}"
    return watch.worst if watch.count else "runs, in another way than by the interface"


def main() -> int:
    """Print a line for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--every", type=int, default=1, help="take every n-th of them")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    set_verbosity_error()
    torch.set_num_threads(1)
    worst = 0.0
    for model_type in (arguments.types or model_types())[:: arguments.every]:
        found = compare(model_type)
        print(f"{model_type:<32}{found if isinstance(found, str) else f'{found:.1e}'}", flush=True)
        worst = max(worst, 0.0 if isinstance(found, str) else found)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
