"""The front door: the names a user may rely on, and what importing them costs."""

import json
import os
import subprocess
import sys
import types

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

SLOW = ["PIL", "accelerate", "datasets", "matplotlib", "optuna", "pandas", "plotly", "scipy", "sklearn", "transformers"]
"""Libraries that `import inarch` leaves alone: they take seconds, or come with an extra."""


def loaded_by(statement):
    """The libraries of `SLOW` that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(set(sys.modules) & set({SLOW!r}))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_exported_names_are_these():
    public = {name for name in dir(inarch) if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(inarch, name), types.ModuleType)}
    assert sorted(public - modules) == EXPORTS  # a name missing here may be hidden by the module of that name
    assert sorted(getattr(inarch, "__all__", EXPORTS)) == EXPORTS


def test_the_exported_names_are_few_and_sorted():
    assert len(EXPORTS) <= 25
    assert sorted(EXPORTS) == EXPORTS


def test_every_exported_name_explains_itself():
    assert [name for name in EXPORTS if not getattr(inarch, name).__doc__] == []


def test_importing_the_package_loads_no_slow_library():
    assert loaded_by("import inarch") == []


def test_a_slow_library_would_be_seen():
    assert loaded_by("import inarch.core.errors, PIL.Image") == ["PIL"]
