"""Finds what an adapter folder of any format, or a repository of the Hub, holds for one model.

Nothing here changes the model: a folder is read, compared with the model and told in its terms, or refused.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from . import archives, convert, state
from .attach import build, tensors_in
from .bank import Modules
from .core.config import Config
from .core.errors import ConfigError, StateError
from .core.places import absent, is_path, nearest_place
from .core.records import RECORD as RUN
from .core.records import STUDY, read_study
from .core.site import Sites
from .fingerprint import compare_bases
from .heads import HeadConfig, id2label, name_at, path_of, read_foreign, read_head
from .methods import AdapterConfig, OutOfRange, placements, preset_names, read_config, renumber
from .tensors import copy_into

logger = logging.getLogger(__name__)

OtherBase = Literal["refuse", "allow"]
Stance = Literal["refuse", "allow", "tell"]
"""What to do about another base: `tell` says it in `Found.difference` alone, and numbers out of range likewise."""
ADAPTER_FOLDER = "adapter"
"""Where a run folder has its adapter."""
_NO_NAME = re.compile(r"[./,|\[\]\s\0]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """An adapter folder of any format, in terms of one model."""

    folder: Path
    name: str
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    head: tuple[str, ...] = ()
    """The modules of the model's own task head whose tensors are among them."""
    flexible: Mapping[str, HeadConfig] = field(default_factory=dict)
    """By name, the heads that the model is to be given, whose tensors are among them."""
    difference: str = ""
    """How its base differs from the model, as a sentence; empty if nothing is known to differ."""
    base: str = ""
    """The base it names, where it keeps nothing by which to know it."""
    idle: tuple[str, ...] = ()
    """What it says was chosen, and holds nothing of."""
    out_of_range: tuple[OutOfRange, ...] = ()
    """Numbers with which no adapter can be; `config` has others in their place."""


# Where it is


@contextmanager
def opened(source: str | os.PathLike[str], revision: str | None = None) -> Iterator[Path]:
    """The folder of an adapter for the length of a block: what `locate` finds, or what is packed in an archive.

    An archive, here or at an address, is unpacked into a folder that is gone afterwards. Raises `StateError` as these
    do, and for an archive with no adapter, or with several.
    """
    if not archives.is_packed(source):
        yield locate(source, revision)
        return
    with archives.unpacked(source) as place:
        yield _packed(place, os.fspath(source))


def _packed(place: Path, source: str) -> Path:
    """The one adapter folder of an archive: all of it, or a folder in it."""
    inside = [folder for folder in (place, *sorted(place.rglob("*"))) if folder.is_dir() and is_adapter(folder)]
    if len(inside) != 1:
        got = ", ".join(f"`{folder.relative_to(place)}`" for folder in inside[:6]) or "none"
        raise StateError(
            f"An archive holds one adapter; got {got} in `{source}`. "
            f"{'Unpack it and give one of the folders.' if inside else 'Give the archive of an adapter folder.'}"
        )
    return inside[0]


def is_adapter(folder: Path) -> bool:
    """Whether a folder is that of an adapter, in any format."""
    return state.is_adapter(folder) or convert.is_adapterhub(folder) or convert.is_peft(folder)


def _has_adapter(place: Path) -> bool:
    """Whether a place may have been meant for that of an adapter."""
    return is_adapter(place) or is_adapter(place / ADAPTER_FOLDER) or archives.is_packed(place)


def locate(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of an adapter: the folder itself, the one in that of a run, or a snapshot of a Hub repository.

    Of a repository the record is fetched first, so that what is no adapter, or one that this version cannot read, costs
    no download of weights; `revision` is its branch, tag or commit. Raises `StateError` if there is neither, and for a
    run without an adapter, or with several.
    """
    path = Path(source).expanduser()
    text = os.fspath(source)
    if text and path.is_dir():
        return _of_run(path)
    if path.exists() or text.count("/") != 1 or is_path(text):
        got = f"the file `{text}`" if path.is_file() else f"`{text}`, where nothing is"
        raise StateError(
            f"An adapter is a folder, an archive or a Hub repository `owner/name`; got {got}. "
            f"{nearest_place(text, fits=_has_adapter) or 'Give the folder that `save` wrote.'}"
        )
    folder = _fetch(text, [state.RECORD, *convert.RECORDS], revision)
    if state.is_adapter(folder):
        state.read_record(folder)
        return _fetch(text, [state.TENSORS], folder.name)
    if not convert.is_adapterhub(folder) and not convert.is_peft(folder):
        raise _unknown(text)
    weights = convert.adapterhub_record.WEIGHTS if convert.is_adapterhub(folder) else convert.peft_record.WEIGHTS
    for record, (safe, other) in weights.items():
        if (folder / record).is_file() and not (_fetch(text, [safe], folder.name) / safe).is_file():
            _fetch(text, [other], folder.name)
    return folder


def _of_run(folder: Path) -> Path:
    """The adapter folder in that of a run; any other folder as it is."""
    if is_adapter(folder):
        return folder
    if state.is_adapter(folder / ADAPTER_FOLDER):
        return folder / ADAPTER_FOLDER
    place = f"{ADAPTER_FOLDER}/{state.RECORD}"
    inside = sorted(record.parent for record in (*folder.glob(f"*/{place}"), *folder.glob(f"*/*/{place}")))
    if inside:
        advice = f"Choose one of the {len(inside)} in it, such as `{_best(folder) or inside[0]}`."
    elif (folder / "model" / "config.json").is_file():
        advice = f"A whole model was trained; load it from `{folder / 'model'}` with transformers."
    elif (folder / RUN).is_file():
        advice = f"Its training has not finished: `inarch train --output {folder} --resume` goes on with it."
    else:
        return folder
    raise StateError(
        f"An adapter is a folder with `{state.RECORD}`, or a run with one; got `{folder}`, which has none of its own. "
        f"{advice}"
    )


def _best(folder: Path) -> Path | None:
    """The adapter of the best trial of a study, where it is there."""
    study = read_study(folder) if (folder / STUDY).is_file() else None
    runs = [] if study is None or study.best is None else study.trials[study.best].runs
    return next((place for run in runs if state.is_adapter(place := folder / run / ADAPTER_FOLDER)), None)


def _fetch(repository: str, files: list[str], revision: str | None = None) -> Path:
    """The snapshot of a repository, with those of the files that it has."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=files, revision=revision))
    except Exception as error:  # noqa: BLE001 - the client raises errors of several libraries: all mean that it cannot be had
        hint = nearest_place(repository, fits=_has_adapter) or "Check the name and the connection."
        raise StateError(
            "An adapter is a folder, an archive or a Hub repository `owner/name`; got "
            f"`{repository}`: {absent(error)}. {hint}"
        ) from None


def _unknown(place: str | Path) -> StateError:
    return StateError(
        f"An adapter folder holds `{state.RECORD}`, as `save` writes it, or what the library `adapters` or PEFT saves; "
        f"got no `{state.RECORD}` and nothing of those in `{place}`. Give the folder of one adapter."
    )


def named_base(folder: Path) -> str:
    """The id or the place of the base that an adapter folder of any format names; empty for none."""
    if state.is_adapter(folder):
        return str(state.read_record(folder)["base"].get("id") or "")
    try:
        record = json.loads((folder / convert.RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(record.get("base_model_name_or_path") or record.get("model_name") or "")


def head_labels(folder: Path) -> tuple[str, ...]:
    """The labels of the task head in an adapter folder, in their order; none where it holds none, or does not say."""
    if convert.is_peft(folder):
        return convert.peft_head.own_head_labels(folder)
    if not state.is_adapter(folder):
        return convert.adapterhub_record.own_head_labels(folder)
    head = state.read_record(folder).get("head") or {}
    is_own = any(not name_at(path) for path in head.get("modules", ()))
    return tuple(map(str, head.get("labels", ()))) if is_own else ()


def is_source(text: object) -> bool:
    """Whether what may be a configuration is a place of adapters: a folder, an archive, an address or a repository."""
    if not isinstance(text, str | os.PathLike):
        return False
    words = os.fspath(text)
    if not words or words in preset_names():  # a preset stays one, whatever lies in the working directory
        return False
    if archives.is_packed(words):
        return True
    return Path(words).expanduser().is_dir() or ("/" in words and "[" not in words and not words.endswith(".json"))


# What it holds


def find(
    folder: Path, model: nn.Module, sites: Sites, *, heads: Iterable[str], head: bool, other_base: Stance
) -> Found:
    """What an adapter folder of any format holds for this model.

    Arguments: `heads` are the paths of the model's task heads, no part of its base; `head=False` leaves out the stored
    one; `other_base="allow"` takes an adapter made on a base with other weights.

    Raises `StateError` for anything that does not fit.
    """
    if state.is_adapter(folder):
        stored = state.read(folder)
        try:
            stacks = stored.stacks()
            difference = compare_bases(stored.record, sites, model, stacks=stacks, heads=heads)
            _check_difference(difference, stored, other_base)
            return Found(
                folder=folder,
                name=str(stored.record.get("name", "")),
                config=_for_stacks(read_config(stored.record["config"]), stored.record["sites"], sites, stacks),
                tensors={k: v for k, v in stored.tensors.items() if head or not k.startswith("head.")},
                head=_head(stored, model) if head else (),
                flexible=_flexible(stored) if head else {},
                difference=difference,
            )
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise StateError(
                f"`{state.RECORD}` must be as `save` wrote it; got one that cannot be read at `{folder}`: {error}. "
                "Save the adapter again."
            ) from None
    if convert.is_adapterhub(folder):
        if convert.is_fusion(folder):
            read = convert.read_fusion(folder, sites, other_base=other_base)
        else:
            read = convert.read(folder, model, sites, head=head, other_base=other_base)
        own, flexible, tensors = _foreign_head(read.head, model, folder) if read.head is not None else ((), {}, {})
        return Found(
            folder=folder,
            name=read.name,
            config=read.config,
            tensors={**read.tensors, **tensors},
            head=own,
            flexible=flexible,
            difference=read.difference,
            base=read.base,
        )
    if convert.is_peft(folder):
        peft = convert.peft.read(folder, model, sites, own_heads=heads, head=head, other_base=other_base)
        return Found(
            folder=folder,
            name=_name_of(folder),
            config=peft.config,
            tensors=peft.tensors,
            head=peft.head,
            difference=peft.difference,
            base=peft.base,
            idle=peft.idle,
            out_of_range=peft.out_of_range,
        )
    raise _unknown(folder)


def built(found: Found, model: nn.Module, sites: Sites, heads: Mapping[str, Tensor]) -> dict[str, Modules]:
    """The modules of a found adapter with their values, by site key, not trainable and not yet in the model.

    `heads` are the tensors of its task head in the model. Raises `StateError` for anything missing, unexpected or of
    another shape.
    """
    modules_by_site = build(model, sites, found.config, started=False)
    wanted = tensors_in(modules_by_site)
    state.check_tensors(found.tensors, {**wanted, **heads}, str(found.folder))
    for key, tensor in wanted.items():
        copy_into(tensor, found.tensors[key])
        tensor.requires_grad_(False)
    return modules_by_site


def _name_of(folder: Path) -> str:
    """A name for an adapter whose folder holds none: that of the folder or, for a snapshot, of the repository."""
    resolved = folder.resolve()
    name = resolved.parent.parent.name.rpartition("--")[2] if resolved.parent.name == "snapshots" else resolved.name
    return _NO_NAME.sub("_", name).strip("_") or "adapter"


def _check_difference(difference: str, stored: state.Stored, other_base: Stance) -> None:
    """Raise `StateError` for another base, unless it is allowed."""
    if difference and other_base == "refuse":
        raise StateError(
            f"{difference[0].upper()}{difference[1:]}, at `{stored.folder}`. Load the base model "
            f"`{stored.record['base'].get('id') or stored.record['base'].get('model_class')}`, or pass "
            '`other_base="allow"` if the change is wanted.'
        )
    if difference and other_base == "allow":
        logger.warning("Loading %s although %s.", stored.folder, difference)


def _for_stacks(config: AdapterConfig, before: Iterable[str], sites: Sites, stacks: set[str]) -> AdapterConfig:
    """A configuration that counts the layers of one model, for one that has other stacks beside those it touches."""
    theirs: dict[str, int] = {}
    for key in before:
        stack, layer, _ = key.split(".")
        theirs[stack] = max(theirs.get(stack, 0), int(layer) + 1)
    ours = sites.num_layers
    if list(theirs.items()) == list(ours.items()):
        return config
    old, new = ({place: n for n, place in enumerate(_places(counts))} for counts in (theirs, ours))
    numbers = {old[place]: number for place, number in new.items() if place in old and place[0] in stacks}
    others = [number for place, number in new.items() if place[0] not in stacks]
    return replace(config, parts=tuple(_for_layers(part, numbers, others, sites, stacks) for part in config.parts))


def _for_layers(part: Config, numbers: Mapping[int, int], others: list[int], sites: Sites, stacks: set[str]) -> Config:
    """One method of it, which leaves the layers of other stacks out where it would be there."""
    plain = renumber(part, numbers, ())
    try:
        if all(placement.site.stack in stacks for placement in placements(plain, sites)):
            return plain
    except ConfigError:  # it cannot be there
        pass
    return renumber(part, numbers, others)


def _places(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Every layer by stack and number, in the order in which configurations count them."""
    return [(stack, layer) for stack, count in counts.items() for layer in range(count)]


def _flexible(stored: state.Stored) -> dict[str, HeadConfig]:
    """The stored heads that the model is to be given, by name."""
    record: Mapping[str, Any] = stored.record.get("head") or {}
    return {name_at(path): read_head(values) for path, values in (record.get("flexible") or {}).items()}


_Head = tuple[tuple[str, ...], dict[str, HeadConfig], dict[str, Tensor]]
"""Modules of the model's own head, heads that it is to be given, and the tensors of both."""


def _foreign_head(head: convert.StoredHead, model: nn.Module, folder: Path) -> _Head:
    """A prediction head of the library `adapters`. One that the model cannot have is told of and left out."""
    try:
        return _read_foreign_head(head, model)
    except StateError as error:
        logger.warning("Of %s only the adapter was loaded, not the prediction head stored beside it. %s", folder, error)
        return (), {}, {}


def _read_foreign_head(head: convert.StoredHead, model: nn.Module) -> _Head:
    read = read_foreign(head.config, head.tensors, model)
    if read.config is not None:
        start = f"head.{path_of(read.name)}."
        return (), {read.name: read.config}, {f"{start}{key}": tensor for key, tensor in read.tensors.items()}
    paths = tuple(dict.fromkeys(key.partition(".")[0] for key in read.tensors))
    own = {f"{path}.{key}": tensor for path in paths for key, tensor in _tensors_at(model, path).items()}
    unlike = [key for key, tensor in read.tensors.items() if key not in own or own[key].shape != tensor.shape]
    if unlike or len(own) != len(read.tensors):
        here = type(model).__name__
        there = head.config.get("model_class")
        fix = f"the class `{there}`" if there != here else f"`num_labels={head.config.get('num_labels')}`"
        raise StateError(
            f"A head without a type is one of the model's own; got `{(unlike or [*own])[0]}`, which {here} has not, or "
            f"of another shape. Load the model with {fix}."
        )
    return paths, {}, {f"head.{key}": tensor for key, tensor in read.tensors.items()}


def _tensors_at(model: nn.Module, path: str) -> dict[str, Tensor]:
    """The tensors of a child of the model; none where there is none of that name."""
    child = model._modules.get(path)
    return {} if child is None else child.state_dict(keep_vars=True)


def _head(stored: state.Stored, model: nn.Module) -> tuple[str, ...]:
    """The modules of the stored task head. Raises `StateError` if the model's head is none of its kind."""
    record: Mapping[str, Any] = stored.record.get("head") or {}
    paths = tuple(path for path in record.get("modules", ()) if not name_at(path))
    modules = dict(model.named_modules())
    absent = [path for path in paths if path not in modules]
    if absent:
        raise StateError(
            f"The task head of an adapter must exist in the model; got `{absent[0]}` of `{stored.folder}` for "
            f"{type(model).__name__}. Load the model with its task head, or pass `head=False`."
        )
    labels, own = list(record.get("labels", ())), [label for _, label in sorted(id2label(model).items())]
    if paths and labels and own and len(labels) != len(own):
        raise StateError(
            f"The labels of an adapter's head and of the model must agree; got {len(labels)} in `{stored.folder}` "
            f"and {len(own)} in {type(model).__name__}. Load the model with `num_labels={len(labels)}`."
        )
    unnamed = [f"LABEL_{number}" for number in range(len(own))]
    if paths and labels not in (own, unnamed) and own not in ([], unnamed):
        place, theirs, ours = next((n, a, b) for n, (a, b) in enumerate(zip(labels, own, strict=True)) if a != b)
        raise StateError(
            f"The labels of an adapter's head and of the model must agree in order; got `{theirs}` and `{ours}` "
            f"for label {place}, at `{stored.folder}`. Load the model with the adapter's `id2label`."
        )
    return paths
