"""Rules about the data a model is going to be trained on."""

from collections.abc import Iterator

from ..facts import Facts, ModelFacts
from ..findings import Finding, Level, rule


@rule("labels-disagree", "error")
def labels_disagree(facts: Facts) -> Iterator[Finding]:
    """The number of labels, or their names by id, differ between data and model.

    A head of another size fails, or worse, trains on a part of the labels. The same names in another order train well
    and are then evaluated wrongly.
    """
    model, data = facts.model, facts.data
    if model is None or data is None or data.labels is None or model.num_labels is None:
        return
    if len(data.labels) != model.num_labels:
        yield Finding(
            "labels-disagree",
            "error",
            "the task head",
            f"the data have {len(data.labels)} labels, the model's head has {model.num_labels}",
            advice=_with_labels(model, f"num_labels={len(data.labels)}"),
        )
    elif model.labels is not None and model.labels != data.labels:
        place = next(n for n, (a, b) in enumerate(zip(model.labels, data.labels, strict=True)) if a != b)
        yield Finding(
            "labels-disagree",
            "error",
            "the label map",
            f"label {place} is {data.labels[place]!r} in the data and {model.labels[place]!r} in the model",
            advice=(
                f'Call `adapters.name_labels("{model.flexible_head}", labels)` with those of the data, in their order.'
                if model.flexible_head
                else "Load the model with the `id2label` of the data."
            ),
        )


@rule("label-ids", "error")
def label_ids(facts: Facts) -> Iterator[Finding]:
    """A label id of the data is outside of what the head can say.

    On a GPU this is an assertion inside a kernel that names nothing. Ids that start at 1 are the usual cause.
    """
    model, data = facts.model, facts.data
    if model is None or data is None or not data.label_ids or model.num_labels is None:
        return
    low, high = min(data.label_ids), max(data.label_ids)
    if low < 0 or high >= model.num_labels:
        yield Finding(
            "label-ids",
            "error",
            "the labels",
            f"the ids go from {low} to {high}, the head knows 0 to {model.num_labels - 1}",
            advice=f"Count labels from 0. {_with_labels(model, f'num_labels={high + 1}')}",
        )


def _with_labels(model: ModelFacts, settings: str) -> str:
    """How the head of a model gets other settings."""
    if model.flexible_head:
        return f'Add the head again: `adapters.add_head("{model.flexible_head}", ..., {settings}, overwrite=True)`.'
    return f"Load the model with `{settings}`."


@rule("images-not-normalised", "warning")
def images_not_normalised(facts: Facts) -> Iterator[Finding]:
    """Pixel values reach the model as 0 to 255, or as 0 to 1 where the base saw them centred.

    Normalisation and augmentation together are worth 11 to 15 points of accuracy for adapters and 29 for a linear probe
    (arXiv 2409.16434, CIFAR-100 with 1,000 images). Values that are never negative were not centred; values beyond 16
    were not divided either, and that is an error.
    """
    if facts.data is None or facts.data.pixel_range is None:
        return
    low, high = facts.data.pixel_range
    if high > 16 or low >= 0:
        level: Level = "error" if high > 16 else "warning"
        what = "raw bytes, 0 to 255" if high > 16 else "not centred: none is negative"
        yield Finding(
            "images-not-normalised",
            level,
            "`pixel_values`",
            f"the pixel values of the batch, {low:.3g} to {high:.3g}, are {what}",
            advice="Use the model's own processor: `AutoImageProcessor.from_pretrained(model_id)`.",
        )


@rule("images-of-other-size", "warning")
def images_of_other_size(facts: Facts) -> Iterator[Finding]:
    """The images have another size than those the base was trained on.

    Position embeddings are interpolated then, or cut; the patches show the world at another scale.
    """
    model, data = facts.model, facts.data
    if model is None or data is None or data.pixel_size is None or model.image_size is None:
        return
    if data.pixel_size != model.image_size:
        yield Finding(
            "images-of-other-size",
            "warning",
            "`pixel_values`",
            f"the images are {data.pixel_size[0]} x {data.pixel_size[1]}, "
            f"the base was trained on {model.image_size[0]} x {model.image_size[1]}",
            advice="Resize them as the model's own processor does.",
        )
