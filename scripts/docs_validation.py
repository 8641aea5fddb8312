"""Set the proof against the measured drift, over many configurations and architectures, and write docs/validation.md.

    python scripts/docs_validation.py [--configurations 300] [--architectures vit,bert]

For every wiring of a bottleneck adapter and every architecture: the verdict is derived on symbols, then the adapter is
attached to a tiny model whose norms and other weights are random, its branch is set to zero, and the output is compared
with the base model's. A proof of "preserved" must go with a relative drift below 1e-5, any other verdict with one above
1e-3. The drift of the adapter's actual initial weights is told apart.
"""

import argparse
import itertools
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inarch
from inarch.check import prove
from inarch.methods import read_config
from inarch.plan import plan
from inarch.testing import tiny, tiny_inputs

PAGE = Path(__file__).parent.parent / "docs" / "validation.md"
ARCHITECTURES = {
    "vit": "pre-norm",
    "gpt2": "pre-norm",
    "t5": "pre-norm, encoder and decoder",
    "bert": "post-norm",
    "bart": "post-norm, encoder and decoder",
    "distilbert": "post-norm",
    "gemma2": "sandwich",
    "olmo2": "norm on the branch",
    "swinv2": "norm on the branch, windows",
    "gptj": "parallel attention and MLP",
    "dinov2": "layer scale",
    "beit": "layer scale behind the branch",
}
SAME, OTHER = 1e-5, 1e-3


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration on one architecture."""

    architecture: str
    config: str
    verdict: str
    drift: float
    """Relative, with a zero branch."""
    start: float
    """Relative, with the initial weights."""

    @property
    def agrees(self) -> bool:
        """Whether proof and measurement say the same."""
        return self.drift < SAME if self.verdict == "preserved" else self.drift > OTHER


def configurations() -> list[str]:
    """Every wiring: all values of the flags, at the attention, the MLP or both."""
    flags: dict[str, Sequence[Any]] = {
        "original_ln_before": (False, True),
        "original_ln_after": (False, True),
        "residual_before_ln": (False, True, "post_add"),
        "adapter_residual_before_ln": (False, True),
        "ln_before": (False, True),
        "ln_after": (False, True),
        "is_parallel": (False, True),
    }
    places = ({"mh_adapter": True, "output_adapter": False}, {"mh_adapter": False}, {"mh_adapter": True})
    found = []
    for values in itertools.product(*flags.values()):
        for place in places:
            settings = dict(zip(flags, values, strict=True)) | place
            text = ",".join(f"{key}={value}" for key, value in settings.items())
            found.append(f"bottleneck[{text},reduction_factor=8,init_weights_seed=1]")
    return found


def sample(number: int) -> list[str]:
    """That many of the configurations, the same in every run."""
    every = configurations()
    return every if number >= len(every) else random.Random(0).sample(every, number)


def trials(architecture: str, configs: Sequence[str]) -> Iterator[Trial]:
    """Each configuration on one architecture. One that the model cannot run is passed over."""
    model, inputs = tiny(architecture), tiny_inputs(architecture)
    adapters = inarch.attach(model, example_inputs=inputs)
    with torch.no_grad():
        base = _outputs(model, inputs)
        for text in configs:
            config = read_config(text)
            try:
                adapters.add("a", config, unsound="allow")
                adapters.activate("a")
            except inarch.SiteError:  # it reads the stream where the stream has another layout than the branch
                if "a" in adapters:
                    adapters.remove("a")
                continue
            start = _drift(_outputs(model, inputs), base)
            for key, parameter in adapters["a"].items():
                if ".up." in key:
                    parameter.zero_()
            drift = _drift(_outputs(model, inputs), base)
            adapters.deactivate()
            adapters.remove("a")
            touched = {module.placement.site.key for module in plan(adapters.sites, {"a": config}).modules}
            proofs = [prove(site, "a", {"a": config}) for site in adapters.sites if site.key in touched]
            verdicts = [proof.verdict for proof in proofs if proof is not None and not proof.sound]
            yield Trial(architecture, text, verdicts[0] if verdicts else "preserved", drift, start)


def _outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [value for value in model(**inputs).values() if isinstance(value, Tensor)]


def _drift(found: list[Tensor], base: list[Tensor]) -> float:
    change = sum(float((a - b).double().square().sum()) for a, b in zip(found, base, strict=True))
    return float((change / sum(float(b.double().square().sum()) for b in base)) ** 0.5)


def table(found: Sequence[Trial]) -> str:
    """The confusion table, in Markdown."""
    verdicts = ["preserved", *sorted({trial.verdict for trial in found} - {"preserved"})]
    lines = [
        "| proved | measured: the same | measured: another | smallest drift | largest drift |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for verdict in verdicts:
        own = [trial for trial in found if trial.verdict == verdict]
        same = sum(trial.drift < SAME for trial in own)
        other = sum(trial.drift > OTHER for trial in own)
        drifts = [trial.drift for trial in own]
        lines.append(f"| {verdict} | {same:,} | {other:,} | {min(drifts):.1e} | {max(drifts):.1e} |")
    return "\n".join(lines)


def by_architecture(found: Sequence[Trial]) -> str:
    """How many configurations each architecture ran, in Markdown."""
    counts, exceptions = Counter(t.architecture for t in found), Counter(t.architecture for t in found if not t.agrees)
    lines = [
        "| model | arrangement | configurations | exceptions | drift of a sound adapter's initial weights, median |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, arrangement in ARCHITECTURES.items():
        if counts[name]:
            start = statistics.median(t.start for t in found if t.architecture == name and t.verdict == "preserved")
            lines.append(f"| {name} | {arrangement} | {counts[name]:,} | {exceptions[name]} | {start:.1e} |")
    return "\n".join(lines)


def main() -> None:
    """Run all, print the table, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=576, help="how many of the 576")
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES), help="comma separated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configs = sample(arguments.configurations)
    found = [trial for name in arguments.architectures.split(",") for trial in trials(name, configs)]
    exceptions = [trial for trial in found if not trial.agrees]
    text = (
        "# The proof against measurement\n\n"
        f"{(__doc__ or '').split(chr(10) * 2, maxsplit=2)[2].strip()}\n\n"
        "This page is written by `scripts/docs_validation.py`.\n\n"
        f"{len(found):,} trials, {len(exceptions)} exceptions.\n\n{table(found)}\n\n{by_architecture(found)}\n\n"
        "A configuration that reads the stream is left out where the stream has another layout than the branch.\n"
    )
    print(text)
    for trial in exceptions[:20]:
        print(trial)
    if not exceptions and arguments.architectures == ",".join(ARCHITECTURES):
        PAGE.write_text(text, encoding="utf-8")
    raise SystemExit(bool(exceptions))


if __name__ == "__main__":
    main()
