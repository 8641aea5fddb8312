"""`inarch check`: what a configuration makes of a model, before anything is trained."""

import dataclasses
import json as json_library
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ConfigError, SiteError
from ..core.interrupt import importing
from .guard import ERROR, USAGE
from .output import fail, say, say_json, say_table
from .probe import LAYOUT_HELP, MODEL_HELP

if TYPE_CHECKING:
    from ..check import Data, Report
    from ..data.examples import Examples
    from ..methods import AdapterConfig

CONFIG_HELP = (
    "A configuration: `seq_bn` or another preset, with changes as in `seq_bn[reduction_factor=8]`; or a JSON file."
)
ADAPTER_HELP = f"{CONFIG_HELP} Or the folder of an adapter of inarch, of the library `adapters` or of PEFT."
_BATCH = 32
FAILURE = USAGE
"""The exit code where there is no verdict: a program tells it from a verdict with errors."""


def check(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    *,
    adapter: Annotated[str, typer.Option(help=ADAPTER_HELP, metavar="CONFIG|FOLDER", show_default=False)],
    layout: Annotated[str | None, typer.Option(help=LAYOUT_HELP, metavar="FILE", show_default=False)] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="The learning rate you mean to train with, for the rules that ask.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of the batch whose memory is told.")] = _BATCH,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Load the weights and run one batch: drift, gradients, memory. Else memory is estimated. For a folder "
            "the weights are loaded anyway, to be compared with those it was made on.",
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="The images to train on: `digits`, a folder of images by class, a CIFAR archive, a saved data "
            "set or the id of one on the Hub. Their labels and pixels are checked too, and measured on.",
            show_default=False,
        ),
    ] = None,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Apply the smallest repair of every error: rewrite a JSON file, else print it."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove whether a model with an adapter still computes what it was pre-trained to compute, and name what will fail.

    Exit code 0 if nothing is wrong, 1 if a finding is an error, 2 if nothing could be judged.
    """
    with importing():
        from ..check import Training
        from ..handle import attach
        from ..loading import head_labels, is_source, opened
        from ..methods import read_settings
        from ..train.known import check_taken
        from .skeleton import is_type

    stored = is_source(adapter)
    if stored and fix:
        raise ConfigError(
            f"`--fix` changes a configuration; got the folder of an adapter, `{adapter}`. Leave `--fix` out, or give "
            "the configuration that it was trained with."
        )
    labels: tuple[str, ...] = ()
    if stored:
        with opened(adapter) as folder:
            labels = head_labels(folder)
    images = None if data is None else _Images.read(model, data)
    if images is not None and not labels:
        labels = images.known.labels or ()  # training makes a head for them
    network = _network(model, labels, with_weights=measure or (stored and not is_type(model)))
    config = None if stored else read_settings(adapter)[0]
    training = None if learning_rate is None else Training(learning_rate=learning_rate)
    handle = attach(network, layout=layout)
    inputs = images.batch(batch_size) if measure and images is not None else made_batch(network, batch_size)
    if measure and images is not None and inputs is not None:
        check_taken(network, inputs, model)
    if measure and inputs is None:
        raise SiteError(
            f"A model is measured on a batch that its configuration describes; got `{model}`, whose inputs cannot be "
            "told from it. Leave `--measure` out, or call `inarch.check` with `example_inputs` in Python."
        )

    def judge(candidate: "AdapterConfig | str") -> "Report":
        known = None if images is None else images.known
        return handle.check(candidate, example_inputs=inputs, training=training, data=known, measure=inputs is not None)

    report = judge(adapter)
    if fix and report.has_errors and config is not None:
        try:
            repaired = _repaired(config, report, judge)
        except ConfigError as error:  # there is a verdict, but no way to mend it
            say_json(report_data(report)) if json else say_report(report)
            fail(str(error))
            raise typer.Exit(ERROR) from None
        place = _write(adapter, repaired)
        if not json:
            say_report(report)
            say(f"{report.subject if place else adapter} becomes {repaired}{place}", style="bold")
        report = judge(repaired)
    if json:
        say_json(report_data(report))
    else:
        say_report(report)
    if report.has_errors:
        raise typer.Exit(ERROR)


def _network(model: str, labels: Sequence[str], *, with_weights: bool) -> Any:
    from .skeleton import skeleton, with_own_weights

    return with_own_weights(model, labels) if with_weights else skeleton(model, labels)


@dataclass(frozen=True, slots=True)
class _Images:
    """The images that a model is to be trained on, as its own processor makes them."""

    examples: "Examples"
    processor: Any
    known: "Data"

    @classmethod
    def read(cls, model: str, data: str) -> "_Images":
        from ..data import load_data
        from ..train.known import known_data, sample_batch
        from ..train.models import load_processor

        images, processor = load_data(data), load_processor(model)
        known = known_data(sample_batch(images.train, processor), processor, images.labels)
        return cls(images.train, processor, known)

    def batch(self, size: int) -> dict[str, Any]:
        """What the model is called with, for that many of the images."""
        from ..train.known import sample_batch

        return {"pixel_values": sample_batch(self.examples, self.processor, size)["pixel_values"]}


def made_batch(network: Any, size: int) -> dict[str, Any] | None:
    """Made-up inputs of that many samples; None where none can be made."""
    from torch import Tensor

    from ..sites import synthesise

    made = synthesise(network)
    if made is None:
        return None
    return {
        key: value.expand(size, *value.shape[1:]) if isinstance(value, Tensor) and value.shape[:1] == (1,) else value
        for key, value in made.items()
    }


def _repaired(config: "AdapterConfig", report: "Report", judge: Any) -> "AdapterConfig":
    """The configuration with the smallest repair of each error; every step is checked again."""
    while errors := [finding for finding in report.findings if finding.level == "error"]:
        mendable = [finding for finding in errors if finding.fixes]
        if not mendable:
            raise ConfigError(
                f"`--fix` changes a configuration; got `{errors[0].code}`, which no change of it clears. "
                f"{errors[0].advice or 'Choose another configuration.'}"
            )
        config = mendable[0].fixes[0].apply(config)
        report = judge(config)
    return config


def _write(adapter: str, repaired: "AdapterConfig") -> str:
    """Write the repaired configuration where the old one came from, if that is a file."""
    path = Path(adapter)
    if path.suffix != ".json" or not path.is_file():
        return ""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json_library.dumps(repaired.to_dict(), indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
    return f", written to {path}"


def report_data(report: "Report") -> dict[str, Any]:
    """A report as JSON data."""
    from ..check import projection_rows

    return {
        "sound": report.sound,
        "adapter": report.subject,
        "model_class": report.model_class,
        "num_parameters": report.num_parameters,
        "sites": [
            {
                "place": group.place,
                "sites": [site.key for site in group.sites],
                "norm": group.sites[0].arrangement,
                "pretrained": f"y = {group.proof.formula.pretrained}",
                "adapted": f"y = {group.proof.formula.adapted}",
                "at_zero": f"y = {group.proof.formula.at_zero}",
                "verdict": group.proof.verdict,
                "sound": group.proof.sound,
            }
            for group in report.sites
        ],
        "projections": [{"place": place, "adapted": formula} for place, formula in projection_rows(report)],
        "evidence": None if report.evidence is None else dataclasses.asdict(report.evidence),
        "memory": None if report.memory is None else dataclasses.asdict(report.memory),
        "findings": [
            {
                "code": finding.code,
                "level": finding.level,
                "place": finding.place,
                "message": finding.message,
                "fixes": [dict(fix.changes) for fix in finding.fixes],
                "advice": finding.advice,
            }
            for finding in report.findings
        ],
    }


_STYLES = {"error": "red", "warning": "yellow", "note": ""}


def say_report(report: "Report") -> None:
    """A report as a table."""
    from ..check import (
        PROJECTION_HEADERS,
        SITE_HEADERS,
        evidence_lines,
        headline,
        memory_lines,
        projection_rows,
        site_rows,
        soundness,
    )

    say(headline(report), style="bold")
    styles = ["" if group.proof.sound else "red" for group in report.sites]
    if rows := site_rows(report):
        say_table(SITE_HEADERS, rows, styles=styles)
    if projections := projection_rows(report):
        say_table(PROJECTION_HEADERS, projections)
    for line in (*evidence_lines(report.evidence), *memory_lines(report.memory)):
        say(line)
    for finding in report.findings:
        say(str(finding), style=_STYLES[finding.level])
    if report.sound:
        say(soundness(report), style="green")
