"""Print how far inarch agrees with the library `adapters` on reference cases of that library.

    python scripts/oracle_table.py ORACLE_DIR [--architectures vit,bert] [--cases seq_bn,lora] [--tolerance 1e-5]

ORACLE_DIR holds, for every model type, the base model `base/`, the forward arguments `inputs.safetensors`, the outputs
by case `outputs.safetensors`, and one adapter folder for each case, all written by that library; a case with arguments
of its own has `inputs.<case>.safetensors`. Each cell of the table is the largest absolute difference of the last hidden
states in float32, or what stands in the way:

    refused   the adapter cannot be read exactly and is refused; `--reasons` prints why
    -         the reference has no such case

`--page FILE` writes the table with the reasons as a page of the documentation.

Exits with 1 if a case that is not refused differs by more than the tolerance. It is meant for values of order 1; where
the largest value is larger, so is the tolerance, since rounding is.
"""

import argparse
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

import inarch

TOLERANCE = 1e-5
BASE = "__base__"


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest absolute difference between two outputs, and the largest value expected."""

    value: float
    scale: float

    def agrees(self, tolerance: float) -> bool:
        """Whether it can be rounding."""
        return self.value <= tolerance * max(1.0, self.scale)


def difference(model: torch.nn.Module, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> Difference:
    """How far the last hidden state is from the expected one."""
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
    expected = expected[:, expected.shape[1] - found.shape[1] :]  # the reference gives prompts as well, in front
    return Difference(float((found.float() - expected.float()).abs().max()), float(expected.abs().max()))


def compare(
    folder: Path, wanted: set[str], other_base: Literal["refuse", "allow"] = "refuse", *, by_sdpa: bool = False
) -> dict[str, Difference | str]:
    """By case, the difference or the refusal."""
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    model = AutoModel.from_pretrained(folder / "base").eval()
    cases = [case for case in sorted(outputs) if case != BASE and (not wanted or case in wanted)]
    results: dict[str, Difference | str] = {BASE: difference(model, inputs, outputs[BASE])}
    try:
        adapters = inarch.attach(model, example_inputs=inputs)
    except inarch.InarchError as error:
        return results | dict.fromkeys(cases, str(error))
    for case in cases:
        try:
            name = adapters.load(folder / case, other_base=other_base)
            adapters.activate(name)
        except inarch.InarchError as error:
            results[case] = str(error)
            continue
        own = folder / f"inputs.{case}.safetensors"
        given = load_file(own) if own.is_file() else inputs
        if by_sdpa and case == "prompt_tuning":  # there the reference cannot extend the mask, and has none
            given = {key: value for key, value in given.items() if key != "attention_mask"}
        results[case] = difference(model, given, outputs[case])
        adapters.deactivate()
        adapters.remove(name)
    return results


def table(found: dict[str, dict[str, Difference | str]], tolerance: float) -> str:
    """Cases down, architectures across."""
    cases = sorted({case for results in found.values() for case in results})
    width = max(map(len, cases))
    lines = [" " * width + "".join(f"  {name[:11]:>11}" for name in found)]
    for case in cases:
        cells = []
        for results in found.values():
            value = results.get(case)
            text = "refused" if isinstance(value, str) else "-"
            if isinstance(value, Difference):
                text = f"{value.value:.1e}{' ' if value.agrees(tolerance) else '!'}"
            cells.append(f"  {text:>11}")
        lines.append(f"{case:<{width}}" + "".join(cells))
    return "\n".join(lines)


def reasons(found: dict[str, dict[str, Difference | str]], root: Path) -> str:
    """Each reason for a refusal once, with the cases it holds for."""
    return "\n".join(f"\n{', '.join(where)}:\n  {text}" for text, where in _reasons(found, root).items())


def _reasons(found: dict[str, dict[str, Difference | str]], root: Path) -> dict[str, list[str]]:
    cases: dict[str, list[str]] = {}
    for architecture, results in found.items():
        for case, value in results.items():
            if isinstance(value, str):
                text = value.replace(str(root / architecture / case), "…").replace("\n", " ")
                cases.setdefault(text, []).append(f"{architecture}/{case}")
    return cases


FAMILIES = {
    "ALBERT": ("albert",),
    "BART": ("bart",),
    "BEiT": ("beit",),
    "BERT": ("bert", "bert_decoder"),
    "BERT-Generation": ("bert-generation",),
    "CLIP": ("clip_text_model", "clip_vision_model"),
    "DeBERTa": ("deberta",),
    "DeBERTa-v2": ("deberta-v2",),
    "DistilBERT": ("distilbert",),
    "ELECTRA": ("electra",),
    "EncoderDecoder": (),
    "GPT-2": ("gpt2",),
    "GPT-J": ("gptj",),
    "Llama": ("llama",),
    "MBart": ("mbart",),
    "Mistral": ("mistral",),
    "mT5": ("mt5",),
    "PLBart": ("plbart",),
    "RoBERTa": ("roberta",),
    "T5": ("t5",),
    "ViT": ("vit",),
    "Whisper": ("whisper",),
    "XLM-RoBERTa": ("xlm-roberta",),
    "X-MOD": ("xmod",),
    "by hooks": ("gemma2", "gemma3_text", "modernbert", "phi", "qwen2", "qwen3"),
}
"""What the library has code of its own for, with the folders of the oracle; and what its shipped interfaces name."""
NO_NAMES = "refused: its modules are those of two other models, and a folder does not say of which"

PAGE = """# Agreement with the library `adapters`

What adapters saved by the library `adapters` 1.3.0 (transformers 4.57.6) compute there, and what they compute when
inarch reads them into a model of today's transformers: the largest absolute difference of the last hidden states, in
float32, for values of order 1.

Made by

    python scripts/make_adapterhub_fixtures.py build/oracle --full     # in an environment with adapters==1.3.0
    python scripts/oracle_table.py build/oracle --other-base --page docs/agreement.md

The bases are tiny and random; so are the adapters, with weights far from their initial values. Rows are configurations:
the presets, all combinations of the three flags of the wiring, gates, scales, norms, layers left out, LoRA and (IA)³.

{summary}

| architecture | compared | worst difference | largest value there | refused |
|---|---:|---:|---:|---:|
{rows}

{notes}

## The model families

| family | compared |
|---|---|
{families}

`load` reads `clip` as both of its towers, and any other model with an `adapter_interface.json` by the names in it.

## Every case

`0` is equality to the last bit, `no` a refusal, `-` a case that the library itself refuses.

```
{table}
```

## What is refused

{reasons}
"""

NOTES = """The library adds a random bias to the fused projections of DeBERTa and ModernBERT and does not save it, so an
adapter of these was trained on a base that is lost: `load` refuses it unless `other_base="allow"` is passed. Their rows
compare with that bias set to zero. Gemma 2 and 3, ModernBERT, Phi, Qwen 2 and 3 are models that the library adapts
through hooks; `bert_decoder` is BERT with cross-attention.

Prefixes of a causal model and of DistilBERT are right in that library only where it attends by `eager`, as here, and no
folder says whether it did: `load` refuses them unless `other_base="allow"` is passed. Those of T5 are refused.

A folder of ReFT does not tell NoReFT from DiReFT, so both are refused until `subtract_projection` is written into its
`config`; with it they agree as LoReFT does.

A bare base model of that library saves VeRA and Compacter without the parameters that their modules share; such folders
are refused. Here these adapters were saved from a model with a head. With `sdpa`, prompts are computed there without
the mask of the tokens. On DeBERTa
prompts attend to padding there, so that what they compute depends on how far a batch is padded: `load` refuses them
unless `other_base="allow"` is passed, for one that was trained without padding. Their rows compare on such a batch."""


def page(found: dict[str, dict[str, Difference | str]], root: Path, tolerance: float) -> str:
    """The page of the documentation."""
    rows = []
    for name, results in sorted(found.items()):
        compared = [value for value in results.values() if isinstance(value, Difference)]
        worst = max(compared, key=lambda value: value.value / max(1.0, value.scale))
        refused = len(results) - len(compared)
        rows.append(f"| {name} | {len(compared)} | {_short(worst)} | {worst.scale:.1f} | {refused or ''} |")
    return PAGE.format(
        summary=summary(found, tolerance),
        rows="\n".join(rows),
        notes=NOTES,
        families="\n".join(f"| {family} | {_of_family(types, found)} |" for family, types in FAMILIES.items()),
        table=small_table(found),
        reasons="\n".join(f"* {', '.join(where)}: {text}" for text, where in _reasons(found, root).items()),
    )


def _of_family(types: tuple[str, ...], found: dict[str, dict[str, Difference | str]]) -> str:
    """How many cases of each model type were compared."""
    counts = {
        name: sum(isinstance(value, Difference) for value in results.values())
        for name, results in found.items()
        if name in types
    }
    return ", ".join(f"`{name}`: {count}" for name, count in counts.items()) or (NO_NAMES if not types else "none")


def small_table(found: dict[str, dict[str, Difference | str]]) -> str:
    """Cases down, architectures across, in cells as narrow as can be."""
    cases = sorted({case for results in found.values() for case in results})
    names = sorted(found)
    width = max(map(len, cases))
    height = max(map(len, names))
    lines = [" " * width + "".join(f"{name.rjust(height)[place]:>6}" for name in names) for place in range(height)]
    for case in cases:
        values = [found[name].get(case) for name in names]
        lines.append(f"{case:<{width}}" + "".join(f"{_cell(value):>6}" for value in values))
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Difference | str | None) -> str:
    return "-" if value is None else "no" if isinstance(value, str) else _short(value)


def _short(value: Difference) -> str:
    return f"{value.value:.0e}".replace("e-0", "e-") if value.value else "0"


def summary(found: dict[str, dict[str, Difference | str]], tolerance: float) -> str:
    """The counts in one line."""
    values = [value for results in found.values() for value in results.values()]
    compared = [value for value in values if isinstance(value, Difference)]
    apart = [value for value in compared if not value.agrees(tolerance)]
    return f"{len(compared)} compared, {len(values) - len(compared)} refused, {len(apart)} apart by more than rounding."


def main() -> int:
    """Compare, print, and say by the exit status whether all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("oracle", type=Path, help="the folder with the reference cases")
    parser.add_argument("--architectures", default="", help="comma separated model types; all by default")
    parser.add_argument("--cases", default="", help="comma separated names of cases; all by default")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="the largest difference that agrees")
    parser.add_argument(
        "--other-base",
        action="store_true",
        help="read adapters of bases that the library changes at random, too: for cases made without that change",
    )
    parser.add_argument(
        "--sdpa", action="store_true", help="the reference cases were computed by `sdpa`, not by `eager`"
    )
    parser.add_argument("--reasons", action="store_true", help="print the text of every refusal")
    parser.add_argument("--page", type=Path, help="write the table as a page of the documentation, too")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    logging.getLogger("inarch").setLevel(logging.ERROR)
    disable_progress_bar()
    chosen = {name for name in arguments.architectures.split(",") if name}
    wanted = {name for name in arguments.cases.split(",") if name}
    folders = [
        path
        for path in sorted(arguments.oracle.iterdir())
        if (path / "outputs.safetensors").is_file() and (not chosen or path.name in chosen)
    ]
    other_base: Literal["refuse", "allow"] = "allow" if arguments.other_base else "refuse"
    found = {folder.name: compare(folder, wanted, other_base, by_sdpa=arguments.sdpa) for folder in folders}
    if not found:
        print(f"There must be reference cases to compare with; got none at {arguments.oracle}.", file=sys.stderr)
        return 2
    print(table(found, arguments.tolerance))
    if arguments.reasons:
        print(reasons(found, arguments.oracle))
    if arguments.page is not None:
        arguments.page.write_text(page(found, arguments.oracle, arguments.tolerance), encoding="utf-8")
    print(f"\n{summary(found, arguments.tolerance)}")
    values = [value for results in found.values() for value in results.values()]
    return int(any(isinstance(value, Difference) and not value.agrees(arguments.tolerance) for value in values))


if __name__ == "__main__":
    sys.exit(main())
