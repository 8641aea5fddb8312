"""`inarch convert`: an adapter folder in the format of another library."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError, StateError
from ..core.interrupt import importing
from .output import say
from .probe import MODEL_HELP


class Target(StrEnum):
    """The formats that are written."""

    inarch = "inarch"
    peft = "peft"
    adapterhub = "adapterhub"


def convert(
    source: Annotated[
        str,
        typer.Argument(help="An adapter of inarch, `adapters` or PEFT: folder, archive, address or Hub repository."),
    ],
    destination: Annotated[Path, typer.Argument(help="The folder to write.")],
    *,
    to: Annotated[Target, typer.Option(help="The format to write.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL_HELP} By default the base that the adapter names.", show_default=False)
    ] = None,
    head: Annotated[bool, typer.Option(help="Take the task head along, which the model must have then.")] = True,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Take an adapter that was made on a base with other weights.")
    ] = False,
    labels: Annotated[
        str | None,
        typer.Option(
            help="The labels of its task head by number, commas between, for a folder that names none, as PEFT's.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the destination.")] = False,
) -> None:
    """Write an adapter of one library in the format of another, so that it computes the same there."""
    with importing():
        from ..handle import attach
        from ..loading import head_labels, named_base, opened
        from .skeleton import with_own_weights

    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise StateError(
            f"An adapter is written to a new folder; got `{destination}`, which holds files. Choose another, or pass "
            "`--overwrite` to replace the adapter there."
        )
    with opened(source) as folder:
        base = model or named_base(folder)
        if not base:
            raise StateError(
                f"An adapter is converted with its base model; got a folder that names none, `{source}`. Name it with "
                "`--model`."
            )
        network = with_own_weights(base, _named(labels, head_labels(folder)) if head else ())
        adapters = attach(network)
        name = adapters.load(folder, head=head, other_base="allow" if other_base else "refuse")
    processor = _processor(network, base) if to is Target.inarch else None
    adapters.save(name, destination, head=head, format=to.value, processor=processor)
    say(f"{name} for {adapters.sites.model_class}, in the format {to.value}, is in {destination}", style="bold")


def _named(given: str | None, stored: tuple[str, ...]) -> tuple[str, ...]:
    """The labels of a task head: those that are given, where there are as many as stored ones."""
    names = stored if given is None else tuple(name.strip() for name in given.split(","))
    if stored and len(names) != len(stored):
        raise StateError(
            f"The labels of a task head are as many as it tells apart; got {len(names)} in `--labels` for "
            f"{len(stored)}. Give one for each, by number."
        )
    return names


def _processor(network: Any, base: str) -> Any:
    """The image processor of a base that takes images, so that the adapter predicts them; None where it has none."""
    from ..train.models import load_processor

    if getattr(network, "main_input_name", "") != "pixel_values":
        return None
    try:
        return load_processor(base)
    except ConfigError:
        return None
