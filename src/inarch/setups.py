"""A setup's folder: `setup.json`, and below `adapters/` an adapter folder for each name in it.

Those of the library `adapters` have `adapter_setup.json`, and the adapter folders beside it.
"""

import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from . import loading, state
from .compose import Setup, from_data, names, to_data
from .convert import adapterhub_record
from .core.drafts import drafted, replace_folder
from .core.errors import SetupError, StateError
from .pretrained import FOLDER
from .tensors import is_sharded

_FOREIGN = "adapter_setup.json"


class Handle(Protocol):
    """What is needed of the handle of a model."""

    model: nn.Module

    def save(self, name: str, folder: str | os.PathLike[str]) -> None: ...


def save(handle: Handle, folder: str | os.PathLike[str], setup: Setup | None) -> None:
    """Write a setup with its adapters and fusion layers: all of them beside their places before the first is put there.

    Raises `SetupError` for none, and `StateError` where one of them cannot be written; nothing is changed then.
    """
    if setup is None:
        raise SetupError("A setup is saved; got none, and none is active. Pass the setup to `save_setup`.")
    place = Path(folder).expanduser()
    targets = {name: state.check_target(place / FOLDER / name) for name in names(setup)}

    def put(drafts: Mapping[str, Path], record: Path) -> None:
        for name, draft in drafts.items():
            replace_folder(draft, targets[name])
        record.replace(place / state.SETUP)

    try:
        with ExitStack() as open_drafts:
            # Each beside its own place, which a link may have on another disk.
            drafts = {name: open_drafts.enter_context(drafted(target)) / name for name, target in targets.items()}
            record = open_drafts.enter_context(drafted(place / state.SETUP)) / state.SETUP
            for name, draft in drafts.items():
                try:
                    handle.save(name, draft)
                except StateError as error:
                    raise StateError(str(error).replace(str(draft), str(targets[name]))) from None
            state.write_setup(record, to_data(setup))
            state.once(partial(put, drafts, record), spread=any(map(is_sharded, handle.model.parameters())))
    except OSError as error:
        raise StateError(
            f"The folder of a setup must be writable; got `{folder}`: {error.strerror or error}. Free some space or "
            "choose another folder."
        ) from None


def find(folder: str | os.PathLike[str]) -> tuple[Setup, dict[str, Path]]:
    """The setup in a folder, and the folders of its adapters. Raises `StateError` for anything else."""
    place = Path(folder).expanduser()
    setup = from_data(_foreign(place) if _is_foreign(place) else state.read_setup(place))
    if setup is None:
        raise StateError(f"A stored setup has adapters; got none in `{place}`. Save it again.")
    return setup, {name: loading.locate(_home(place) / name) for name in names(setup)}


def _is_foreign(place: Path) -> bool:
    return (place / _FOREIGN).is_file() and not (place / state.SETUP).is_file()


def _home(place: Path) -> Path:
    """Where a setup's adapter folders are."""
    return place if _is_foreign(place) else place / FOLDER


def _foreign(place: Path) -> Any:
    """The setup of the library `adapters` as our data."""
    return _block(adapterhub_record.read_json(place / _FOREIGN).get("adapter_setup"), place)


def lone_heads(folder: str | os.PathLike[str], adapters: Collection[str]) -> dict[str, Path]:
    """The heads of a setup of the library `adapters` (`head_setup`) that are none of its adapters', with their folders.

    Raises `StateError` for one without a name.
    """
    place = Path(folder).expanduser()
    wish = adapterhub_record.read_json(place / _FOREIGN).get("head_setup") if _is_foreign(place) else None
    if wish is True:
        raise StateError(
            "The heads of a stored setup have names; got `head_setup` true, which is a model's own head, at "
            f"`{place}`. Load with `head=False`, and the head with an adapter."
        )
    return {name: place / name for name in _names(wish) if name not in adapters}


def _names(wish: Any) -> list[str]:
    """The names in a setup of heads: one, a list, or a block."""
    if isinstance(wish, str):
        return [wish]
    inside = wish.get("children") if isinstance(wish, Mapping) else wish
    return [name for child in inside or () for name in _names(child)]


def _block(data: Any, place: Path) -> Any:
    children = data.get("children") if isinstance(data, Mapping) else None
    if not isinstance(children, list) or not children:
        raise StateError(
            f"`{_FOREIGN}` must hold blocks with `type` and `children`; got {data!r} at `{place}`. Save it again."
        )
    if data.get("type") == "single":
        return children[0]
    if data.get("type") == "Fuse":
        raise StateError(
            "A setup of the library `adapters` is read without fusion layers; got a `Fuse` at "
            f"`{place}`. Load its adapters and its fusion folder one by one."
        )
    settings = {key: value for key, value in (data.get("kwargs") or {}).items() if value is not None}
    return {"block": data.get("type"), "children": [_block(child, place) for child in children], **settings}
