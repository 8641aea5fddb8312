"""The front door: the names a user may rely on, and what importing them costs."""

import ast
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import inarch

EXPORTS = [
    "AdapterTrainer",
    "Adapters",
    "Average",
    "BatchSplit",
    "ConfigError",
    "DataError",
    "Finding",
    "Fuse",
    "InarchError",
    "Monitor",
    "MultiTask",
    "Parallel",
    "Plan",
    "Report",
    "SetupError",
    "Site",
    "SiteError",
    "Sites",
    "Split",
    "Stack",
    "StateError",
    "attach",
    "check",
    "probe",
]
"""Sorted. To take a name away is a breaking change; to add one wants a reason."""

SLOW = [
    "PIL", "accelerate", "datasets", "matplotlib", "optuna", "pandas", "scipy", "sklearn", "transformers", "vl_convert",
]  # fmt: skip
"""Libraries that what a user calls first leaves alone: they take seconds, or come with an extra."""


def loaded_by(statement):
    """The libraries of `SLOW` that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(set(sys.modules) & set({SLOW!r}))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_exported_names_are_these():
    public = {name for name in dir(inarch) if not name.startswith("_")}
    assert sorted(public) == EXPORTS
    modules = [name for name in public if isinstance(getattr(inarch, name), types.ModuleType)]
    assert modules == []
    assert sorted(inarch.__all__) == EXPORTS


def silent(found):
    """The public methods and properties of a class of ours that say nothing of themselves."""
    for key, value in inspect.getmembers(found):
        function = value.fget if isinstance(value, property) else value
        is_ours = inspect.isroutine(function) and (getattr(function, "__module__", "") or "").startswith("inarch")
        if is_ours and not key.startswith("_") and not inspect.getdoc(getattr(found, key)):
            yield f"{found.__name__}.{key}"


def test_every_public_name_of_an_export_says_what_it_does():
    found = [getattr(inarch, name) for name in EXPORTS]
    assert all(map(inspect.getdoc, found))
    assert [name for one in found if isinstance(one, type) for name in silent(one)] == []

    class Mute:
        said = property(lambda _: None, doc="Something.")
        unsaid = property(lambda _: None)

    Mute.unsaid.fget.__module__ = Mute.said.fget.__module__ = "inarch.mute"
    assert list(silent(Mute)) == ["Mute.unsaid"]


def test_type_checkers_and_users_get_a_name_from_the_same_module():
    tree = ast.parse(Path(inarch.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]  # `if TYPE_CHECKING:`
    assert {alias.asname: node.module for node in block.body for alias in node.names} == inarch._HOMES


def test_a_module_of_the_same_name_does_not_take_the_place_of_an_export():
    """Whatever is imported first: `inarch.attach` and `inarch.check` are modules too."""
    shared = [name for name in EXPORTS if (Path(inarch.__file__).parent / name).with_suffix(".py").exists()
              or (Path(inarch.__file__).parent / name).is_dir()]  # fmt: skip
    assert shared == ["attach", "check"]
    code = (
        "import inarch.attach, inarch.check.proof, inarch.handle, inarch\n"
        "assert inarch.attach is inarch.handle.attach and inarch.check is inarch.handle.check"
    )
    assert loaded_by(code) == []


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module `inarch` has no attribute `atach`"):
        inarch.atach  # noqa: B018


def test_the_exported_names_are_few_and_sorted():
    assert len(EXPORTS) <= 25
    assert sorted(EXPORTS) == EXPORTS


def test_every_exported_name_explains_itself():
    assert [name for name in EXPORTS if not getattr(inarch, name).__doc__] == []


def test_importing_the_package_loads_no_slow_library():
    assert loaded_by("import inarch, sys; assert 'torch' not in sys.modules") == []
    assert loaded_by("import inarch; inarch.attach, inarch.check, inarch.probe, inarch.Stack") == []


def test_a_slow_library_would_be_seen():
    assert loaded_by("import inarch.core.errors, PIL.Image") == ["PIL"]
