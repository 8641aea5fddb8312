"""A setup's folder: `setup.json`, and below `adapters/` an adapter folder for each name in it."""

import os
from pathlib import Path
from typing import Protocol

from torch import nn

from . import loading, state
from .compose import Setup, from_data, names, to_data
from .core.errors import SetupError, StateError
from .core.site import Sites
from .pretrained import FOLDER


class Handle(Protocol):
    """What is needed of the handle of a model."""

    def save(self, name: str, folder: str | os.PathLike[str]) -> None: ...
    def load(self, source: str | os.PathLike[str], *, name: str, overwrite: bool, head: bool) -> str: ...


def save(handle: Handle, folder: str | os.PathLike[str], setup: Setup | None) -> None:
    """Write a setup with its adapters and fusion layers. Raises `SetupError` for none."""
    if setup is None:
        raise SetupError("A setup is saved; got none, and none is active. Pass the setup to `save_setup`.")
    place = Path(folder)
    for name in names(setup):
        handle.save(name, place / FOLDER / name)
    state.write_setup(place, to_data(setup))


def find(
    folder: str | os.PathLike[str], model: nn.Module, sites: Sites, heads: tuple[str, ...], *, head: bool
) -> Setup:
    """The setup in a folder, all of whose adapters can be read. Raises `StateError` for anything else."""
    place = Path(folder)
    setup = from_data(state.read_setup(place))
    if setup is None:
        raise StateError(f"A stored setup has adapters; got none in `{place}`. Save it again.")
    for name in names(setup):
        found = loading.locate(place / FOLDER / name)
        loading.find(found, model, sites, heads=heads, head=head, other_base="refuse")
    return setup


def load(handle: Handle, folder: str | os.PathLike[str], setup: Setup, *, overwrite: bool, head: bool) -> None:
    """Read the adapters of a setup that `find` found."""
    for name in names(setup):
        handle.load(Path(folder) / FOLDER / name, name=name, overwrite=overwrite, head=head)
