"""`inarch check`: what a configuration makes of a model, before anything is trained."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .guard import ERROR
from .output import say, say_json, say_table
from .probe import LAYOUT_HELP, MODEL_HELP

if TYPE_CHECKING:
    from ..check import Report

ADAPTER_HELP = (
    "A configuration: `seq_bn` or another preset, with changes as in `seq_bn[reduction_factor=8]`; or a JSON file."
)


def check(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    *,
    adapter: Annotated[str, typer.Option(help=ADAPTER_HELP, metavar="CONFIG", show_default=False)],
    layout: Annotated[str | None, typer.Option(help=LAYOUT_HELP, metavar="FILE", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove whether a model with an adapter still computes what it was pre-trained to compute.

    Exit code 0 if it does, 1 if it does not.
    """
    from ..handle import check as prove
    from ..methods import read_config
    from .skeleton import skeleton

    report = prove(skeleton(model), read_config(adapter), layout=layout)
    if json:
        say_json(report_data(report))
    else:
        say_report(report)
    if any(finding.level == "error" for finding in report.findings):
        raise typer.Exit(ERROR)


def report_data(report: "Report") -> dict[str, Any]:
    """A report as JSON data."""
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
        "findings": [
            {
                "code": finding.code,
                "level": finding.level,
                "place": finding.place,
                "message": finding.message,
                "fixes": [str(fix) for fix in finding.fixes],
                "advice": finding.advice,
            }
            for finding in report.findings
        ],
    }


def say_report(report: "Report") -> None:
    """A report as a table."""
    say(f"{report.subject} on {report.model_class}: {report.num_parameters:,} parameters", style="bold")
    rows = [
        (
            group.place,
            group.sites[0].arrangement,
            f"y = {group.proof.formula.pretrained}",
            f"y = {group.proof.formula.adapted}",
            group.proof.verdict,
        )
        for group in report.sites
    ]
    styles = ["" if group.proof.sound else "red" for group in report.sites]
    if rows:
        say_table(("sites", "norm", "pre-trained", "with the adapter", "verdict"), rows, styles=styles)
    for finding in report.findings:
        say(str(finding), style="red" if finding.level == "error" else "yellow")
    if report.sound:
        say("Sound: with a zero adapter branch the model computes what it was pre-trained to compute.", style="green")
