"""Labelled images by index, and how to hold some of them out.

Nothing here decodes an image: examples are a list of where the images are and what they show.
"""

import dataclasses
import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError, nearest
from .images import NUM_NAMED, ImageSource, Sources

logger = logging.getLogger(__name__)

Task = Literal["single_label", "multi_label"]

DEFAULT_SHARE = 0.1
"""The share of the images held out of a source that has no validation part of its own."""

Target = int | tuple[int, ...]
"""What an image shows: the id of its label or, in a multi-label task, the ids of all of them."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Images with labels, by index."""

    images: Sources
    targets: Sequence[Target]
    num_labels: int

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[ImageSource, int | NDArray[np.float32]]:
        """An image and its label: an id or, in a multi-label task, a vector with a 1 for each label it has."""
        return self.images[index], self.label(index)

    def label(self, index: int) -> int | NDArray[np.float32]:
        """The label alone, without the image."""
        target = self.targets[index]
        if isinstance(target, int):
            return target
        vector = np.zeros(self.num_labels, dtype=np.float32)
        vector[list(target)] = 1
        return vector

    def pick(self, indices: Sequence[int]) -> "Examples":
        """Some of the examples."""
        return Examples(Picked(self.images, indices), [self.targets[index] for index in indices], self.num_labels)


@dataclass(frozen=True, slots=True)
class Picked:
    """Some of the images, by a new index."""

    images: Sources
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> ImageSource:
        return self.images[self.indices[index]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageData:
    """Images to train and to validate on, and what can be done to them without changing what they show.

    `mirror_safe`: a mirrored image still shows its class. `crop_safe`: the smallest share of an image's area that does.
    """

    name: str
    task: Task
    labels: list[str]
    train: Examples
    validation: Examples
    mirror_safe: bool = True
    crop_safe: float = 0.6

    def with_labels(self, labels: Sequence[str]) -> Self:
        """The same images under the ids of `labels`, those of a trained model; a label it lacks is refused."""
        ids = {name: index for index, name in enumerate(labels)}
        unknown = [name for name in self.labels if name not in ids]
        if unknown:
            raise DataError(
                f"Every label must be one the model knows; got {quoted(unknown)} in `{self.name}`. "
                f"{nearest(unknown[0], labels)}"
            )
        moved = [ids[name] for name in self.labels]
        return dataclasses.replace(
            self,
            labels=list(labels),
            train=_relabelled(self.train, moved, len(labels)),
            validation=_relabelled(self.validation, moved, len(labels)),
        )


def _relabelled(examples: Examples, moved: list[int], num_labels: int) -> Examples:
    targets: list[Target] = [
        moved[target] if isinstance(target, int) else tuple(sorted(moved[one] for one in target))
        for target in examples.targets
    ]
    return Examples(examples.images, targets, num_labels)


def quoted(names: Sequence[str]) -> str:
    """The first names, each in backquotes, and the number of the others."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(f"`{name}`" for name in names[:NUM_NAMED]) + more


def divide(
    place: object,
    labels: Sequence[str],
    train: Examples,
    own: Examples | None = None,
    *,
    share: float | None,
    seed: int,
) -> tuple[Examples, Examples]:
    """The examples to train and to validate on: the source's `own` validation part, or a share of the others.

    With a share the source's own part is left alone, so that it can serve as a test set.
    """
    if own is not None and share is None:
        return train, own
    if own is not None:
        logger.warning(
            "The %d images for validation of `%s` are not used: `validation` asks for a share of the others.",
            len(own), place,
        )  # fmt: skip
    share = DEFAULT_SHARE if share is None else share
    if share not in (0, 1):
        _refuse_single(place, labels, train.targets)
    kept, held = hold_out(train.targets, share, seed)
    if share and not held:
        raise DataError(
            f"An image can be held out only if each of its labels is on another one; got none of {len(train)} images "
            f"at `{place}`. Add images, or give the data a validation part."
        )
    return train.pick(kept), train.pick(held)


def _refuse_single(place: object, labels: Sequence[str], targets: Sequence[Target]) -> None:
    """Refuse to divide the one image of a class; with several labels such an image stays in training."""
    counts = Counter(targets)
    single = [name for index, name in enumerate(labels) if counts[index] == 1]
    if single:
        raise DataError(
            f"A class must have at least 2 images, one to train and one to validate on; got 1 in {quoted(single)} "
            f"at `{place}`. Add images, or give the data a validation part."
        )


def seeded(*parts: object) -> random.Random:
    """Random numbers that depend on `parts` alone; of a seeded generator Python guarantees what `random()` returns."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest))  # noqa: S311  nothing here is secret


def shuffled(items: Iterable[int], generator: random.Random) -> list[int]:
    """The items in random order. (What `Random.shuffle` makes of a seed may change with the version of Python.)"""
    return [item for _, item in sorted((generator.random(), item) for item in items)]


def hold_out(targets: Sequence[Target], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to validate on: `share` of every class, at least one image of each on either side.

    With several labels an image is held out only if each of its labels stays in training. `share` 0 holds out nothing
    and 1 everything.
    """
    everything = list(range(len(targets)))
    if share in (0, 1):
        return (everything, []) if share == 0 else ([], everything)
    if all(isinstance(target, int) for target in targets):
        held = _stratified(targets, share, seed)
    else:
        held = _uncritical(targets, share, seed)
    return [index for index in everything if index not in held], sorted(held)


def _stratified(targets: Sequence[Target], share: float, seed: int) -> set[int]:
    members: dict[Target, list[int]] = {}
    for index, target in enumerate(targets):
        members.setdefault(target, []).append(index)
    num_held = quotas({target: len(indices) for target, indices in members.items()}, share)
    held: set[int] = set()
    for target, indices in members.items():
        # One generator a class: the images of a class are split alike, whatever the other classes are.
        held.update(shuffled(indices, seeded(seed, target))[: num_held[target]])
    return held


def quotas(counts: dict[Target, int], share: float) -> dict[Target, int]:
    """How many to hold out of each class: in all `share`, spread evenly, 1 at least and never the last one."""
    ideal = {target: share * count for target, count in counts.items()}
    held = {target: min(max(1, int(ideal[target])), counts[target] - 1) for target in counts}
    for target in sorted(counts, key=lambda target: int(ideal[target]) - ideal[target]):  # the largest remainder first
        if sum(held.values()) >= round(share * sum(counts.values())):
            break
        held[target] = min(held[target] + 1, counts[target] - 1)
    return held


def _uncritical(targets: Sequence[Target], share: float, seed: int) -> set[int]:
    """Images that can be held out because every label of theirs is left on another image."""
    labels = [target if isinstance(target, tuple) else (target,) for target in targets]
    left = Counter(label for each in labels for label in each)
    held: set[int] = set()
    for index in shuffled(range(len(targets)), seeded(seed, "labels")):
        if len(held) >= max(1, round(share * len(targets))):
            break
        if all(left[label] > 1 for label in labels[index]):
            held.add(index)
            left.subtract(labels[index])
    return held
