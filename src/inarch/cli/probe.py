"""`inarch probe`: where adapters can go."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..core.interrupt import importing
from ..core.table import ranges
from .output import say, say_json, say_table

if TYPE_CHECKING:
    from ..core.site import Site, Sites

MODEL_HELP = "`demo`, a folder, a model type such as `vit`, or the Hub id of a model. No weights are read."
LAYOUT_HELP = "A JSON file with the model's sites, as `inarch probe --json` prints it, instead of finding them."

_SOURCES = {
    "layout": "As the layout says.",
    "golden": "As the layout says that inarch ships for this architecture; a probe found the same.",
    "meta": "Found by a probe without weights.",
    "forward": "Found by a probe with weights, as the model's code reads its data.",
}


def probe(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    *,
    layout: Annotated[str | None, typer.Option(help=LAYOUT_HELP, metavar="FILE", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the sites as JSON, which `--layout` reads.")] = False,
) -> None:
    """Find the residual sites of a model: where adapters can go.

    Where inarch ships no layout of the architecture, it is run once without weights; nothing large is downloaded or
    held in memory.
    """
    with importing():
        from ..sites import ProbeError
        from ..sites import probe as find_sites
    from .skeleton import skeleton

    try:
        sites = find_sites(skeleton(model), layout=layout)
    except ProbeError as error:
        if json:  # what was found, to complete and to pass as `--layout`
            say_json(error.found)
        raise
    if json:
        say_json(sites.to_dict())
    else:
        _say_sites(sites)


def _say_sites(sites: "Sites") -> None:
    layers = ", ".join(f"{count} layers in `{stack}`" for stack, count in sites.num_layers.items())
    say(f"{sites.model_class}: {len(sites)} sites, {layers or 'no layer'}", style="bold")
    say(_SOURCES[sites.source])
    headers = ("sites", "norm", "width", "layer", "branch output", "stream", "projections")
    say_table(headers, [_row(group) for group in sites.groups()])
    for note in dict.fromkeys(note for site in sites for note in site.notes):
        say(f"note: {note}")
    for refusal in sites.refused:
        say(f"refused: {refusal}")


def _row(group: list["Site"]) -> tuple[object, ...]:
    first = group[0]
    return (
        f"{first.stack} {first.role}, layers {ranges([site.layer for site in group])}",
        first.arrangement,
        first.width,
        first.layer_class,
        first.output.path or "(the layer)",
        "-" if first.stream is None else first.stream.path or "(the layer)",
        " ".join(first.projections) or "-",
    )
