"""Where the stacks of a model get their tokens from: read off the module tree and the signatures, without a forward."""

import inspect
from dataclasses import replace
from itertools import accumulate

from torch import nn

from ..core.site import Entry, Site, Sites


def with_entries(model: nn.Module, sites: Sites) -> Sites:
    """The sites, with the entry of every stack."""
    firsts: dict[str, Site] = {}
    for site in sites:
        firsts.setdefault(site.stack, site)
    return replace(sites, entries={stack: _entry(model, first) for stack, first in firsts.items()})


def _entry(model: nn.Module, first: Site) -> Entry:
    path, width = first.layer_path, first.width
    above = ["", *accumulate(path.split(".")[:-1], lambda a, b: f"{a}.{b}")] if path else [""]
    owners = [one for one in above if not isinstance(model.get_submodule(one), nn.ModuleList | nn.ModuleDict)]
    is_text = first.stack.startswith("text")
    callers = [one for one in reversed(owners) if is_text and "input_ids" in _parameters(model.get_submodule(one))]
    if not callers:
        fan_in = _fan_in(model, owners, path, width)
        return Entry(caller=None, runner=owners[-1], words=None, embedding=None, width=width, fan_in=fan_in)
    caller = callers[0]
    # The child of the caller on the way to the layers: where it runs them alone, what follows sees whole outputs.
    inside = [one for one in owners if len(one) >= len(caller)]
    words = _words(model, caller, owners)
    embedding = None if words is None else _embedding(caller, words, path)
    if words is not None and embedding is not None:
        width = _width(model.get_submodule(embedding), model.get_submodule(words))
    return Entry(
        caller=caller,
        runner=inside[1] if len(inside) > 1 else caller,
        words=words,
        embedding=embedding,
        width=width,
        fan_in=width,
        words_width=0 if words is None else int(model.get_submodule(words).weight.shape[1]),  # type: ignore[index]
        gives_positions=embedding is not None and _num_tables(model.get_submodule(embedding)) > 1,
        takes_embeddings="inputs_embeds" in _parameters(model.get_submodule(caller)),
    )


def _parameters(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(module.forward).parameters)


def _words(model: nn.Module, caller: str, owners: list[str]) -> str | None:
    """The path of the table that embeds token ids, if it lies inside of the caller."""
    prefix = f"{caller}." if caller else ""
    for owner in (caller, *reversed(owners)):
        find = getattr(model.get_submodule(owner), "get_input_embeddings", None)
        try:
            table = find() if find is not None else None
        except (NotImplementedError, AttributeError):
            continue
        if getattr(getattr(table, "weight", None), "ndim", 0) != 2:
            continue  # a list of tables, one for each of several tokens that stand together
        paths = (path for path, module in model.named_modules(remove_duplicate=False) if module is table)
        found: str | None = next((path for path in paths if path.startswith(prefix)), None)
        if found is not None:
            return found
    return None


def _embedding(caller: str, words: str, layer: str) -> str | None:
    """The child of the caller that the table of words is a part of; None where the table is the child itself."""
    prefix = f"{caller}." if caller else ""
    head, _, rest = words.removeprefix(prefix).partition(".")
    return f"{prefix}{head}" if rest and not f"{layer}.".startswith(f"{prefix}{head}.") else None


def _num_tables(embedding: nn.Module) -> int:
    """Tables of learned vectors: of words, positions, types."""
    tables = [module for module in embedding.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    return sum(module.weight.dim() == 2 and not isinstance(module, nn.Linear) for module in tables)  # type: ignore[operator]


def _width(embedding: nn.Module, table: nn.Module) -> int:
    """The width of what an embedding gives: that of its norm, or of its table of words."""
    shapes = [getattr(module, "normalized_shape", None) for module in embedding.modules()]
    normed = [shape[-1] for shape in shapes if isinstance(shape, tuple)]
    return int(normed[-1] if normed else table.weight.shape[1])  # type: ignore[index]


def _fan_in(model: nn.Module, owners: list[str], layer: str, width: int) -> int:
    """How many numbers of an image make one token: the inputs of the map, beside the layers, that has patches."""
    layers = f"{layer.rpartition('.')[0]}."
    for owner in reversed(owners):
        for inner, module in model.get_submodule(owner).named_modules(prefix=owner):
            weight = getattr(module, "weight", None)
            is_map = isinstance(module, nn.Conv2d | nn.Conv3d) or (isinstance(module, nn.Linear) and "patch" in inner)
            if is_map and weight is not None and weight.shape[0] == width and not inner.startswith(layers):
                return int(weight[0].numel())
    return width
