"""The releases of transformers that are tested are those that the package and its readme promise."""

import importlib.machinery
import importlib.util
import re
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def matrix():
    """The command as a module; it has no suffix."""
    loader = importlib.machinery.SourceFileLoader("release_matrix", str(ROOT / "scripts" / "release_matrix"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def test_every_file_pins_the_release_it_is_named_after_and_nothing_that_stays_as_it_is(matrix):
    base = matrix.pins(ROOT / "constraints.txt")
    for release in matrix.releases():
        own = matrix.pins(ROOT / "constraints" / f"transformers-{release}.txt")
        assert own["transformers"].startswith(f"{release}.")
        assert not {name for name, version in own.items() if name != "transformers" and base.get(name) == version}
        assert "torch" not in own


def test_the_oldest_release_is_the_lower_bound_and_the_newest_the_pin(matrix):
    first, *_, last = matrix.releases()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    bounds = [Requirement(text) for text in data["project"]["dependencies"]]
    (bound,) = (requirement.specifier for requirement in bounds if requirement.name == "transformers")
    assert min(Version(part.version) for part in bound) == Version(first)
    pinned = matrix.pins(ROOT / "constraints.txt")["transformers"]
    assert pinned == matrix.pins(ROOT / "constraints" / f"transformers-{last}.txt")["transformers"]
    steps = [int(release.split(".")[1]) for release in matrix.releases()]
    assert all(later - earlier <= 3 for earlier, later in pairwise(steps))


def test_every_file_of_the_core_exists(matrix):
    assert all((ROOT / "tests" / name).is_file() for name in matrix.CORE)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_states_the_tested_range(name, matrix):
    first, *_, last = matrix.releases()
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.search(rf"transformers {re.escape(first)} \S+ {re.escape(last)}\b", text), f"{first} to {last}"


def test_the_tests_that_fail_are_counted_and_named(matrix, tmp_path, monkeypatch):
    """The table would be worth nothing if a failure could hide in it."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        "import pytest\n\n"
        "def test_good(): pass\n\n"
        "def test_bad(): raise ValueError\n\n"
        "def test_skipped(): pytest.skip('not here')\n\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n\n"
        "def test_error(broken): pass\n"
    )
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "CORE", ["test_x.py"])
    passed, skipped, failed, _ = matrix.run_tests(Path(sys.executable), "0", [])
    assert (passed, skipped) == (1, 1)
    assert [name.rpartition("::")[2] for name in failed] == ["test_bad", "test_error"]
    monkeypatch.setattr(matrix, "CORE", ["test_missing.py"])
    with pytest.raises(SystemExit, match="pytest did not run"):
        matrix.run_tests(Path(sys.executable), "0", [])
