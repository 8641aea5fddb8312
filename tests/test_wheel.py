"""What a user installs: the wheel holds the package and nothing else, and works with the core dependencies alone.

The environment without extras is made of links to the installed core dependencies. `INARCH_FULL_WHEEL_TEST=1` installs
them anew into a virtual environment instead, which takes minutes and the network.
"""

import os
import re
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import inarch

ROOT = Path(__file__).parent.parent
FULL = "INARCH_FULL_WHEEL_TEST"

SMOKE = """
import sys
from importlib.util import find_spec

for extra in {extras!r}:
    assert find_spec(extra) is None, f"{{extra}} is here: this environment is not the core alone"

import inarch

assert inarch.__file__.startswith({home!r}), inarch.__file__

import torch
from transformers import ViTConfig, ViTForImageClassification

config = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8,
    num_labels=3,
)
model = ViTForImageClassification(config)
adapters = inarch.attach(model)
adapters.add("a", "seq_bn")
adapters.train("a")
logits = model(torch.randn(2, 3, 16, 16)).logits
logits.sum().backward()
assert logits.shape == (2, 3)

sys.argv = ["inarch", "--help"]
from inarch.cli import main

main()
"""

EXTRA_MODULES = [
    "accelerate",
    "datasets",
    "PIL",
    "sklearn",
    "matplotlib",
    "tensorboard",
    "optuna",
    "vl_convert",
    "pytest",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def run(*command, cwd=None):
    """The output of a command; its error output, where it fails, in the test's failure."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dependencies(name, extras=()):
    """The distributions that `name` with its `extras` asks for, and those that these ask for, as canonical names."""
    found = {}
    todo = [(name, extra) for extra in ("", *extras)]
    while todo:
        name, extra = todo.pop()
        if extra in found.setdefault(canonicalize_name(name), set()):
            continue
        found[canonicalize_name(name)].add(extra)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
    return set(found)


def link(names, folder):
    """Make `folder` a site-packages that holds these distributions alone."""
    for name in names:
        installed = distribution(name)
        tops = {file.parts[0] for file in installed.files if len(file.parts) > 1 or file.suffix in {".py", ".so"}}
        for top in tops - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(installed.locate_file(top))


def smoke(home):
    return SMOKE.format(extras=EXTRA_MODULES, home=str(home))


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "inarch").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "inarch/py.typed" in expected
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_data_files_are_in_the_wheel(wheel):
    package = ROOT / "src" / "inarch"
    files = [path for path in (package / "assets").rglob("*") if path.is_file()]
    files += (package / "sites" / "layouts").glob("*.json")
    assert {path.parent.name for path in files} >= {"demo_backbone", "layouts"}
    with zipfile.ZipFile(wheel) as archive:
        for path in files:
            assert archive.read(path.relative_to(ROOT / "src").as_posix()) == path.read_bytes()


def test_the_metadata_say_what_the_project_says(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE")
    core = {Requirement(line).name for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert metadata["Version"] == inarch.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert core == {"torch", "transformers", "safetensors", "huggingface-hub", "typer", "rich"}
    assert set(metadata.get_all("Provides-Extra")) == {"train", "sweep", "postgresql", "report", "quantised", "dev"}
    assert "inarch = inarch.__main__:main" in scripts
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_the_core_alone_attaches_an_adapter(wheel, tmp_path):
    link(dependencies("inarch") - {"inarch"}, tmp_path)
    run(sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", tmp_path, wheel)
    # `-S` leaves out this environment's own site-packages, `-I` the working directory and PYTHONPATH
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    assert "check" in run(sys.executable, "-I", "-S", "-c", f"{path}\n{smoke(tmp_path)}", cwd=tmp_path)


def test_the_core_alone_is_told_from_an_environment_with_extras(tmp_path):
    link({"pillow", "packaging"}, tmp_path)
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    code = f"{path}\n{smoke(tmp_path)}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert "PIL is here" in done.stderr


@pytest.mark.skipif(os.environ.get(FULL) != "1", reason=f"takes minutes and the network; {FULL}=1 runs it")
def test_a_clean_environment_attaches_an_adapter(wheel, tmp_path):
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "-qq", "--constraint", constraints, wheel, cwd=tmp_path)
    assert "check" in run(python, "-I", "-c", smoke(tmp_path), cwd=tmp_path)


def test_every_installed_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line).groups() for line in lines if not line.startswith("#"))
    names = dependencies("inarch", ["train", "dev"]) - {"inarch"}
    of_cuda = ("cuda-", "nvidia-", "triton")  # what a CUDA build of torch asks for is left to torch
    installed = {name: distribution(name).version.split("+")[0] for name in names if not name.startswith(of_cuda)}
    assert installed == {name: pins.get(name) for name in installed}
