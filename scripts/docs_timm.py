"""Writes docs/coverage-timm.md: what the probe finds in one model of every file of timm, at full size, without weights.

.venv/bin/python scripts/docs_timm.py             about 3 minutes on one core
.venv/bin/python scripts/docs_timm.py swin_ beit  prints the rows of models whose name begins so
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm_site import import_timm
from torch import nn

import inarch
from inarch.sites import ProbeError

PAGE = Path(__file__).parent.parent / "docs" / "coverage-timm.md"

CHOSEN = {
    "coat": ("coat_tiny", "coat_lite_tiny"),
    "convnext": ("convnext_tiny", "convnext_tiny_hnf"),
    "maxxvit": ("maxvit_tiny_tf_224", "coatnet_0_224"),
    "metaformer": ("caformer_s18", "convformer_s18", "poolformer_s12"),
    "mlp_mixer": ("mixer_b16_224", "gmlp_s16_224", "resmlp_12_224"),
    "eva": ("eva02_base_patch14_224", "vit_base_patch16_dinov3"),
    "twins": ("twins_pcpvt_small", "twins_svt_small"),
    "vision_transformer": ("vit_base_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch14_dinov2"),
}
"""Models of files that hold several families; of every other file, the first one by name."""

_ATTENTION = re.compile(r"attn|attention|xca|outlook|xla", re.IGNORECASE)
_MLP = re.compile(r"mlp|glu$|ffn|feedforward", re.IGNORECASE)
_PART = re.compile(r"pool|embed|norm|drop|scale|bias", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Row:
    """One model: what was found in it, and what its module classes are called."""

    file: str
    model: str
    verdict: str
    sites: Counter[str]
    named: tuple[int, int]
    arrangements: str = ""
    roles: str = ""
    reason: str = ""

    def __str__(self) -> str:
        kinds = (self.sites["self_attention"] + self.sites["cross_attention"], self.sites["mixer"], self.sites["mlp"])
        counts = (f"{a}" if sum(kinds) else "" for a in kinds)
        attention, mlp = self.named
        cells = (self.file, self.model, *counts, f"{attention}, {mlp}", self.arrangements, self.roles, self.verdict)
        return f"| {' | '.join(cells)}{f': {self.reason}' if self.reason else ''} |"


def main(prefixes: list[str]) -> None:
    """Print the rows of some models, or write the page."""
    timm = import_timm()
    models = [
        (file, name)
        for file in timm.list_modules()
        for name in CHOSEN.get(file, sorted(timm.list_models(module=file))[:1])
        if not prefixes or name.startswith(tuple(prefixes))
    ]
    rows = []
    for file, name in models:
        rows.append(row(timm, file, name))
        print(rows[-1], flush=True)
    if not prefixes:
        PAGE.write_text("\n".join(page(timm.__version__, rows)) + "\n", encoding="utf-8")
        print(f"wrote {PAGE}")


def row(timm: Any, file: str, name: str) -> Row:
    """Probe one model on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that are deprecated in favour of others
        with torch.device("meta"):
            model = timm.create_model(name)
        named = (topmost(model, _ATTENTION), topmost(model, _MLP))
        try:
            sites = inarch.probe(model)
        except ProbeError as error:
            return Row(file, name, "refused", Counter(), named, reason=reason(str(error), error.found["refused"]))
    return Row(
        file,
        name,
        "adapts" if not sites.refused else "adapts but for",
        Counter(site.kind for site in sites),
        named,
        ", ".join(sorted({site.arrangement for site in sites})),
        " ".join(
            role for role in ("q", "k", "v", "o", "up", "gate", "down") if any(role in s.projections for s in sites)
        ),
        reason("", list(sites.refused)) if sites.refused else "",
    )


def topmost(model: nn.Module, pattern: re.Pattern[str]) -> int:
    """How many modules are called so and lie in no other that is."""
    paths = [
        path
        for path, module in model.named_modules()
        if pattern.search(type(module).__name__) and not _PART.search(type(module).__name__) and list(module.children())
    ]
    return sum(not any(path.startswith(f"{other}.") for other in paths) for path in paths)


def reason(message: str, refused: list[str]) -> str:
    """In a few words: classes of refused layers by reason, or the first sentence of the error."""
    if "problems:" in message:
        refused = []
    groups: dict[str, Counter[str]] = {}
    for entry in refused:
        classes, _, why = entry.partition("): ")
        count = classes.count("`") // 2
        groups.setdefault(why, Counter())[re.sub(r"^\d+ of ", "", classes.rpartition("(")[2])] += count
    if groups:
        parts = (f"{', '.join(f'{n} {c}' for c, n in classes.items())} ({why})" for why, classes in groups.items())
        return "; ".join(parts)
    sentence = message.splitlines()[1].removeprefix("  - ") if "problems:" in message else message
    return re.sub(r"\. (Complete|If it).*", "", sentence, flags=re.DOTALL).replace("|", "/")


def page(version: str, rows: list[Row]) -> Iterator[str]:
    """The page, line by line."""
    verdicts = Counter(r.verdict for r in rows)
    files = {r.file for r in rows}
    adapting = {r.file for r in rows if r.verdict != "refused"}
    yield f"""# timm {version}

<!-- Written by scripts/docs_timm.py; `make docs` writes it anew. -->

One model of each of its {len(files)} files, more where a file holds several families, built at full size on the meta
device and probed. In {len(adapting)} files something adapts; of the {len(rows)} models {verdicts["adapts"]} adapt,
{verdicts["adapts but for"]} adapt but for what the last column names, {verdicts["refused"]} are refused by name. Those
are networks whose sums dense convolutions make, or where only convolutions carry the stream from one sum to the next.
Other feature maps (B, C, H, W) are adapted on their channels.

*Attention*, *mixer* and *MLP* count the sites; *by name* counts the modules whose class is called an attention and an
MLP, as an independent witness. *Projections* are those LoRA reaches.

| file | model | attention | mixer | MLP | by name | norms | projections | verdict |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
    yield from map(str, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
