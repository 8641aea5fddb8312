"""Write docs/methods.md, the page of all methods and presets, from the methods themselves.

    python scripts/docs_methods.py [--check]

What a method is, its papers and its equation are in the first lines of its file; ports, claims and blocks are what the
class says of its first preset; parameters are counted on models without weights; how far it agrees with the library
`adapters` is taken from docs/agreement.md. `--check` writes nothing and fails if the page is not what these say.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from pages import DOCS, write_or_check
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import inarch
from inarch.compose import BLOCKS
from inarch.core.errors import InarchError
from inarch.methods import AbstractMethod, LinearMethod, method_of, methods, placements, presets, read_config
from inarch.methods.unions import UNIONS
from inarch.plan import plan

PAGE = DOCS / "methods.md"

HEAD = """# Methods

A configuration is a preset, with changes in brackets: `seq_bn[reduction_factor=8]`; `|` joins several methods to one
adapter. `tests/test_contract.py` holds every method, preset and option to what stands here, and to what no method may
break: only its own weights are trained, and all of them get gradients; saved and loaded, it gives the same bit for bit;
no row of a batch touches another; copies, casts, checkpointing, compilation and generation with a cache change nothing;
`detach` gives the base back, bit for bit.

*Starts at the base*: initial weights change no bit of the output. *Merges*: `merge` writes it into the base's weights,
and `unmerge` takes it out bit for bit. *Blocks*: [what it can be composed by](composition.md); `Stack` always. Options
other than the preset's may change these; `inarch check` says what holds of a configuration. Where a module applies a
weight itself (`nn.MultiheadAttention`), methods of the port `linear` act on the `weight`, if they can, and are
composed by `Stack` and `Average` there.

This page is written by `scripts/docs_methods.py` from the methods.
"""


@dataclass(frozen=True, slots=True)
class Description:
    """What the first lines of a method's file say."""

    title: str
    papers: str
    equations: tuple[str, ...]


def described(method: type[AbstractMethod]) -> Description:
    """The first sentence, the paragraphs that name papers, and the indented blocks of a file's documentation."""
    paragraphs = inspect.cleandoc(importlib.import_module(method.__module__).__doc__ or "").split("\n\n")
    equations = [part for part in paragraphs if all(line.startswith("    ") for line in part.splitlines())]
    papers = [part for part in paragraphs[1:] if part not in equations and re.search(r"\bet al\.|arXiv", part)]
    return Description(_one_line(paragraphs[0]), _one_line(" ".join(papers[:1])).rstrip(":"), tuple(equations))


def _one_line(text: str) -> str:
    linked = re.sub(r"arXiv\s+(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", " ".join(text.split()))
    return linked.replace("|", "\\|")


@cache
def models() -> dict[str, inarch.Adapters]:
    """Models of default configurations, without weights."""
    with torch.device("meta"):
        vit, bert = ViTModel(ViTConfig()), BertModel(BertConfig())
    return {"ViT-B/16": inarch.attach(vit), "BERT-base": inarch.attach(bert)}


def parameters(preset: str, adapters: inarch.Adapters) -> str:
    """How many a preset has on a model; a dash where it has no place."""
    try:
        return f"{plan(adapters.sites, {'a': read_config(preset)}).num_parameters:,}"
    except InarchError:
        return "-"


def first(method: type[AbstractMethod]) -> inarch.core.config.Config:
    """The configuration of a method's first preset."""
    return next(iter(method.presets.values()))


def ports(method: type[AbstractMethod]) -> str:
    """The ports of a method where its first preset, or the least that it asks for, has a place."""
    found = {place.port for adapters in models().values() for place in _places(method, adapters)}
    if issubclass(method, LinearMethod):
        found |= {"linear"} | (set() if method.obstacle_on_weight(first(method)) else {"weight"})
    elif not found:
        found |= {port for base in method.__mro__ if (port := PORTS.get(base.__name__))}
    return ", ".join(sorted(found))


PORTS = {"SublayerMethod": "sublayer", "PrefixMethod": "prefix", "InputMethod": "input", "StreamMethod": "stream"}


def _places(method: type[AbstractMethod], adapters: inarch.Adapters) -> list:
    try:
        return placements(first(method), adapters.sites)
    except InarchError:
        return []


def blocks(method: type[AbstractMethod]) -> str:
    """The blocks that have a meaning for the first preset, beside `Stack`, where it has a place."""
    config = first(method)
    places = [place for adapters in models().values() for place in _places(method, adapters)]
    if not places or method.name == "fusion":
        return "-"
    kept = [block for block in BLOCKS if not any(method.obstacle_to_block(config, place, block) for place in places)]
    without = [block for block in BLOCKS if block not in kept]
    return f"all but {', '.join(without)}" if 0 < len(without) < 4 else "all" if not without else ", ".join(kept)


@cache
def agreements() -> dict[str, list[str]]:
    """What docs/agreement.md says of every case and architecture, by method, or preset of several methods; a case is
    named after a preset or a method."""
    table = (DOCS / "agreement.md").read_text(encoding="utf-8").split("```")[1]
    named = {name: name for name in (*methods(), *UNIONS)}
    named |= {preset: method_of(config).name for preset, config in presets().items()}
    named["dvora"] = "dora"  # as which that library's union of it and VeRA is read
    found: dict[str, list[str]] = {}
    for line in table.splitlines():
        case, *cells = line.split() or [""]
        # The names of architectures stand upright, a letter in a line.
        if len(cells) < 20 or len(case) < 3 or case == "__base__":
            continue
        known = [preset for preset in named if case == preset or case.startswith(f"{preset}_")]
        # What is named after no preset is a wiring of the bottleneck.
        found.setdefault(named[max(known, key=len)] if known else "bottleneck", []).extend(cells)
    return found


def agreement(name: str) -> str:
    """The largest difference of a method, or a preset of several, and how many cases there are."""
    cells = [cell for cell in agreements().get(name, []) if cell != "-"]
    refused = cells.count("no")
    if not cells:
        return "-"
    worst = max((float(cell) for cell in cells if cell != "no"), default=0.0)
    return (
        f"{worst:.0e}".replace("e-0", "e-")
        + f" over {len(cells) - refused}"
        + (f", {refused} refused" if refused else "")
    )


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *overview(), "", *sections(), *unions()]) + "\n"


def overview() -> Iterator[str]:
    """A row for each method."""
    yield "| method | port | starts at the base | merges | blocks | agreement with `adapters` |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, method in methods().items():
        config = first(method)
        starts, merges = method.starts_at_base(config), not method.obstacle_to_merge(config)
        cells = (ports(method), _yes(starts), _yes(merges), blocks(method), agreement(name))
        yield f"| [`{name}`](#{name}) | {' | '.join(cells)} |"
    yield ""
    yield "Agreement is the largest difference of hidden states of order 1, over cases and architectures of"
    yield "[the comparison](agreement.md); a dash where there is no case of the method."


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def sections() -> Iterator[str]:
    """A section for each method: what it is, papers, equation, presets."""
    for name, method in methods().items():
        known = described(method)
        yield f"## {name}\n\n{known.title}\n"
        if known.papers:
            yield f"{known.papers}.\n" if not known.papers.endswith(".") else f"{known.papers}\n"
        for equation in known.equations:
            yield f"```\n{inspect.cleandoc(equation)}\n```\n"
        if method.sees_whole_sequences(first(method)):
            yield "A token's result depends on its whole sequence, so a cache changes what is generated.\n"
        yield from preset_table(dict.fromkeys(method.presets, ""), method.aliases)


def unions() -> Iterator[str]:
    """The presets of several methods."""
    yield "## Presets of several methods\n"
    papers = inspect.cleandoc(importlib.import_module("inarch.methods.unions").__doc__ or "").split("\n\n")[1]
    yield f"{_one_line(papers)}\n"
    yield from preset_table(UNIONS, {}, compared=True)


def preset_table(named: dict[str, str], aliases: dict[str, str], *, compared: bool = False) -> Iterator[str]:
    """Presets, with the parameters that they have on each model, and, if wanted, their agreement with `adapters`."""
    agreed = " agreement with `adapters` |" if compared else ""
    yield f"| preset | {' | '.join(f'parameters on {model}' for model in models())} |{agreed}"
    yield f"| --- |{' ---: |' * len(models())}{' --- |' if compared else ''}"
    for preset, text in named.items():
        older = [old for old, new in aliases.items() if new == preset]
        label = f"`{preset}`" + (f" (once {', '.join(f'`{old}`' for old in older)})" if older else "")
        label += f", that is `{text}`".replace("|", "\\|") if text else ""
        cells = [parameters(preset, adapters) for adapters in models().values()]
        yield f"| {' | '.join([label, *cells, *([agreement(preset)] if compared else [])])} |"
    yield ""


def main() -> None:
    """Write the page, or compare it."""
    write_or_check(PAGE, page, script="docs_methods.py", documentation=__doc__)


if __name__ == "__main__":
    main()
