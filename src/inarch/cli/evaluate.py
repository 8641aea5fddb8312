"""`inarch eval`: how well an adapter predicts labelled images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.interrupt import importing
from ..core.table import counted
from ..train.recipe import DataConfig
from .guard import Misused, lacking
from .options import configured, made_from
from .output import note, progress, say, say_json, say_table
from .predict import ADAPTER_HELP, BASE_HELP, DEVICE_HELP

if TYPE_CHECKING:
    from ..train.evaluate import Evaluation


@configured(data=DataConfig)
def evaluate(
    adapter: Annotated[str, typer.Argument(help=ADAPTER_HELP, show_default=False)],
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="Every image of the data, not only those held out from training.")
    ] = False,
    model: Annotated[str | None, typer.Option(help=BASE_HELP, show_default=False)] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the confusion matrix.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    subset: Annotated[bool, typer.Option("--subset", help="Allow data without some of the adapter's labels.")] = False,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Where images have several labels: the probability of a chosen one.")
    ] = 0.5,
    batch_size: Annotated[int, typer.Option(min=1, help="How many images to compute at once.")] = 32,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    data: dict[str, Any],
) -> None:
    """Compare an adapter's predictions with the labels of data: of the images that training holds out.

    The same `--data`, `--validation` and `--split-seed` as in training hold out the same images.
    """
    if "data" not in data:
        raise lacking("An evaluation needs labelled images", "--data")
    if picture is not None and picture.suffix.lower() != ".png":
        raise Misused(f"A picture is written as PNG; got `{picture}` for `--picture`. Let its name end in `.png`.")
    with importing():
        from ..data import load_data
        from ..train.evaluate import evaluate as evaluate_on
        from ..train.predict import load_predictor

    chosen = made_from(DataConfig, data)
    assert isinstance(chosen, DataConfig)
    images = load_data(**chosen.arguments() | ({"validation": 1.0} if everything else {}))
    predictor = load_predictor(adapter, model=model, device=device)
    with progress("Evaluating") as report:
        result = evaluate_on(
            predictor, images, batch_size=batch_size, threshold=threshold, subset=subset, progress=report
        )
    if picture is not None:
        _draw(result, picture)
    say_json(result.to_dict()) if json else _say_result(result)
    if picture is not None:
        note(f"Wrote {picture}")


def _draw(result: "Evaluation", picture: Path) -> None:
    import numpy as np

    from ..core.errors import DataError
    from ..train.pictures import draw_confusion

    if result.confusion is None:
        raise DataError(
            f"A confusion matrix is for one label an image; got several in `{result.data}`. Leave out `--picture`."
        )
    names = [row.label for row in result.labels]
    title = f"What the adapter sees in {result.data}"
    draw_confusion(np.array(result.confusion), names, picture, title=title)


def _say_result(result: "Evaluation") -> None:
    say(
        f"accuracy {result.accuracy * 100:.2f} % on {counted(result.num_images, 'image')} of {result.data}, "
        f"mean F1 {result.macro_f1:.4f}",
        style="bold",
    )
    rows = [
        (row.label, f"{row.precision:.4f}", f"{row.recall:.4f}", f"{row.f1:.4f}", row.support) for row in result.labels
    ]
    say_table(("label", "precision", "recall", "F1", "images"), rows)
