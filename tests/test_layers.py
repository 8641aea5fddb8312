"""Imports go one way: the table of layers, read from the source of every module of the package.

To move a module to another layer, or to add one, edit `LAYERS`; to let a layer use another library, edit `LIBRARIES`.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "inarch"

CORE = {"core", "version"}
MECHANISM = CORE | {"methods", "compose", "sites"}
GRAFT = MECHANISM | {
    "tensors",
    "bank",
    "frozen",
    "programs",
    "weight",
    "inputs",
    "prefixes",
    "streams",
    "plan",
    "attach",
}
SERVICES = GRAFT | {
    "check",
    "witness",
    "trial",
    "state",
    "fingerprint",
    "convert",
    "heads",
    "pretrained",
    "trainer_door",
    "report",
    "archives",
    "loading",
    "combine",
    "merge",
    "scores",
    "embeddings",
    "sharing",
    "admission",
    "saving",
    "head_files",
    "setups",
    "publish",
    "summary",
    "trainable",
}
USERS = SERVICES | {"handle", "data", "train", "sweep", "testing"}

LAYERS: dict[str, set[str]] = {
    "core": set(),
    "version": set(),
    "methods": CORE,
    "compose": CORE,
    "sites": CORE,
    "tensors": CORE,
    "undropped": set(),
    "bank": MECHANISM | {"undropped"},
    "frozen": MECHANISM | {"tensors"},
    "programs": MECHANISM | {"frozen", "tensors"},
    "weight": MECHANISM | {"bank", "frozen", "tensors"},
    "vectors": MECHANISM | {"bank", "weight"},
    "beside": MECHANISM | {"bank"},
    "inputs": MECHANISM | {"bank", "beside"},
    "prefixes": MECHANISM | {"bank"},
    "plan": MECHANISM | {"bank", "programs"},
    "streams": MECHANISM | {"bank"},
    "attach": MECHANISM
    | {"tensors", "bank", "frozen", "programs", "weight", "vectors", "inputs", "prefixes", "streams", "plan"},
    "check": GRAFT | {"heads"},
    "witness": GRAFT,
    "trial": GRAFT | {"witness"},
    "state": GRAFT,
    "fingerprint": GRAFT,
    "convert": GRAFT,
    "heads": GRAFT,
    "pretrained": GRAFT | {"state"},
    "trainer_door": GRAFT,
    "combine": GRAFT,
    "scores": GRAFT,
    "embeddings": GRAFT | {"state", "convert"},
    "sharing": GRAFT,
    "trainable": GRAFT,
    "summary": GRAFT | {"heads"},
    "admission": GRAFT | {"check"},
    "merge": GRAFT | {"check"},
    "saving": GRAFT | {"state", "fingerprint", "convert", "heads"},
    "archives": CORE,
    "loading": GRAFT | {"state", "fingerprint", "convert", "heads", "archives"},
    "head_files": GRAFT | {"state", "convert", "heads"},
    "setups": GRAFT | {"state", "loading", "pretrained", "convert"},
    "publish": CORE,
    "report": CORE,
    "grafted": SERVICES,
    "headed": SERVICES | {"grafted"},
    "filed": SERVICES | {"grafted", "headed"},
    "handle": SERVICES | {"grafted", "headed", "filed"},
    "testing": SERVICES | {"handle"},
    "data": CORE,
    "train": SERVICES | {"handle", "data"},
    "sweep": SERVICES | {"handle", "data", "train"},
    "compat": USERS,
    "cli": USERS | {"compat", PACKAGE},
    "__main__": CORE | {"cli"},
    PACKAGE: USERS,  # the front door: `inarch/__init__.py`
}
"""Each top-level module or folder of the package, and those it may import besides itself."""

TORCH_LAYERS = set(LAYERS) - {"archives", "publish", "core", "version", "report", "__main__"}
TRAINING = {"data", "train", "sweep", "testing", "cli"}

LIBRARIES: dict[str, set[str]] = {
    "torch": TORCH_LAYERS,
    "safetensors": TORCH_LAYERS,
    "transformers": {
        "sites",
        "methods",
        "heads",
        "train",
        "sweep",
        "testing",
        "cli",
        "compat",
        "pretrained",
        "embeddings",
        "convert",
    },
    "huggingface_hub": {"loading", "publish", "convert", "train", "testing", "cli", "compat"},
    "typer": {"cli"},
    "rich": {"cli"},
    "numpy": TRAINING,
    "accelerate": TRAINING,
    "datasets": TRAINING,
    "matplotlib": TRAINING,
    "PIL": TRAINING,
    "sklearn": TRAINING,
    "tensorboard": TRAINING,
    "optuna": {"sweep"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "vl_convert": {"report"},
}
"""Each library outside the standard one, and the layers, or single modules by their full name, that may import it."""

LAZY = {"cli", PACKAGE}
"""Layers that may import the package inside a function: the command line, to start quickly, and the front door, so that
`import inarch` does not load the trainer."""

SHARED_BY_METHODS = {
    "inarch.methods.beside",
    "inarch.methods.method",
    "inarch.methods.low_rank",
    "inarch.methods.parameters",
    "inarch.methods.phm",
    "inarch.methods.places",
    "inarch.methods.ports_input",
    "inarch.methods.ports_stream",
}
"""What the files of `methods/` may import from their own folder: what a method is, and what several have in common."""

COLLECT_METHODS = {"inarch.methods", "inarch.methods.registry"}
"""The files of `methods/` that gather the others and are no methods themselves."""


@dataclass(frozen=True)
class Import:
    """One imported module; `inside` tells an import in a function from one that runs with the module."""

    source: str
    target: str
    line: int
    inside: bool


def layer_of(module: str) -> str:
    """The top-level module or folder that `module` belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def imports_of(module: str, code: str, known: Mapping[str, str], folders: set[str]) -> Iterator[Import]:
    """Every import statement of a module, `import_module("...")` with a constant among them, as absolute names."""

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for target in targets(child):
                yield Import(module, target, child.lineno, inside)
            yield from visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    def targets(node: ast.AST) -> list[str]:
        match node:
            case ast.Import(names=names):
                return [alias.name for alias in names]
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    parts = module.split(".") if module in folders else module.split(".")[:-1]
                    anchor = parts[: len(parts) - level + 1]
                    base = ".".join([*anchor, base] if base else anchor)
                submodules = [f"{base}.{alias.name}" for alias in names if f"{base}.{alias.name}" in known]
                return submodules if len(submodules) == len(names) else [base, *submodules]
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                return [target]
        return []

    yield from visit(ast.parse(code), inside=False)


def violations(known: Mapping[str, str], folders: set[str]) -> list[str]:
    """Every broken rule in a package given as the code of each module, and the names of those that are folders."""
    problems = []
    graph: dict[str, set[str]] = {module: set() for module in known}
    for module, code in known.items():
        layer = layer_of(module)
        if layer not in LAYERS:
            problems.append(f"{module}: `{layer}` has no row in the table of layers")
            continue
        for found in imports_of(module, code, known, folders):
            place = f"{module}:{found.line}"
            if found.target.split(".")[0] == PACKAGE:
                if not found.inside:
                    graph[module].add(found.target)
                problems += [f"{place}: {problem}" for problem in own_import_problems(found)]
            elif problem := library_problem(found):
                problems.append(f"{place}: {problem}")
    return problems + [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(graph)]


def own_import_problems(found: Import) -> Iterator[str]:
    """What is wrong with an import of the package by itself."""
    source, target = layer_of(found.source), layer_of(found.target)
    if target != source and target not in LAYERS[source]:
        yield f"`{source}` may not import `{target}`"
    if found.inside and source not in LAZY:
        yield f"`{found.target}` is imported inside a function"
    if source == target == "methods" and found.source not in COLLECT_METHODS and found.target not in SHARED_BY_METHODS:
        yield f"a method may not import `{found.target}`"


def library_problem(found: Import) -> str | None:
    """What is wrong with an import of another library, if anything is."""
    library = found.target.split(".")[0]
    if library in sys.stdlib_module_names:
        return None
    if library not in LIBRARIES:
        return f"`{library}` is in no row of the table of libraries"
    if {layer_of(found.source), found.source} & LIBRARIES[library]:
        return None
    return f"`{found.source}` may not import `{library}`"


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The cycles a depth-first walk meets; none is left out unless it shares a module with one that is named."""
    found, done, path = [], set(), []

    def walk(module: str) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done and module in graph:
            path.append(module)
            for target in sorted(graph[module]):
                walk(target)
            path.pop()
            done.add(module)

    for module in sorted(graph):
        walk(module)
    return found


def package() -> tuple[dict[str, str], set[str]]:
    """The code of every module of the package, and the names of the folders."""
    known, folders = {}, set()
    source = ROOT / "src"
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
            folders.add(".".join(parts))
        known[".".join(parts)] = path.read_text(encoding="utf-8")
    return known, folders


def test_imports_follow_the_table_of_layers():
    known, folders = package()
    assert len(known) > 1
    assert violations(known, folders) == []


def test_the_table_itself_goes_one_way():
    assert cycles({layer: allowed - {layer} for layer, allowed in LAYERS.items()}) == []


def test_the_design_shows_the_same_table():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.search(r"## Layers of the package.*?```\n(.*?)```", text, re.DOTALL)[1].splitlines()
    height = {name: -number for number, row in enumerate(rows) for name in row.split(":")[0].split(", ")}
    assert height.keys() == LAYERS.keys() - {PACKAGE}
    wrong = [(name, other) for name in height for other in LAYERS[name] - {PACKAGE} if height[other] >= height[name]]
    assert wrong == [], "an import goes up, or along a row"


def test_every_library_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
    declared = {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}
    declared |= {"numpy"}  # part of what torch and transformers hand out and take
    distributions = packages_distributions()
    for library in LIBRARIES:
        names = {name.lower().replace("_", "-") for name in distributions.get(library, [library])}
        assert names & declared, f"`{library}` is imported but not declared in pyproject.toml"


@pytest.mark.parametrize(
    ("module", "code", "problem"),
    [
        ("core.errors", "from ..plan import Plan", "`core` may not import `plan`"),
        ("core.errors", "import torch", "`inarch.core.errors` may not import `torch`"),
        ("report.page", "import torch.nn", "`inarch.report.page` may not import `torch`"),
        ("report.page", "from ..check import proof", "`report` may not import `check`"),
        ("methods.lora", "from ..sites import probe", "`methods` may not import `sites`"),
        ("methods.lora", "from .bottleneck import Bottleneck", "a method may not import `inarch.methods.bottleneck`"),
        ("methods.lora", "from . import bottleneck", "a method may not import `inarch.methods.bottleneck`"),
        ("compose.blocks", "from inarch.methods import lora", "`compose` may not import `methods`"),
        ("sites.probe", "import inarch.compose.blocks", "`sites` may not import `compose`"),
        ("bank", "from .attach import graft", "`bank` may not import `attach`"),
        ("plan", "from .check.proof import prove", "`plan` may not import `check`"),
        ("check.proof", "from ..handle import Adapters", "`check` may not import `handle`"),
        ("state", "from .train import recipe", "`state` may not import `train`"),
        ("handle", "from .cli import main", "`handle` may not import `cli`"),
        ("handle", "from . import cli", "`handle` may not import `cli`"),
        ("handle", "import inarch", "`handle` may not import `inarch`"),
        ("handle", "from inarch import attach, probe", "`handle` may not import `inarch`"),
        ("train.trainer", "from ..sweep import study", "`train` may not import `sweep`"),
        ("plan", "import transformers", "`inarch.plan` may not import `transformers`"),
        ("attach", "def f():\n    from transformers import AutoModel", "`inarch.attach` may not import `transformers`"),
        ("attach.graft", "import transformers", "`inarch.attach.graft` may not import `transformers`"),
        ("handle", "import datasets", "`inarch.handle` may not import `datasets`"),
        ("handle", "import requests", "`requests` is in no row of the table of libraries"),
        ("handle", "def f():\n    from .plan import Plan", "`inarch.plan` is imported inside a function"),
        ("handle", "f = lambda: __import__('inarch.plan')", "`inarch.plan` is imported inside a function"),
        ("handle", "from importlib import import_module\nimport_module('inarch.cli')", "`handle` may not import `cli`"),
        ("handle", "if TYPE_CHECKING:\n    from .train import recipe", "`handle` may not import `train`"),
        ("extra", "import os", "`extra` has no row in the table of layers"),
    ],
)
def test_the_checker_finds(module, code, problem):
    others = ["methods.bottleneck", "methods.method", "sites.probe", "check.proof", "train.recipe", "sweep.study"]
    known = {f"inarch.{name}": "" for name in [*others, "plan", "cli", "attach", "compose.blocks"]}
    known |= {"inarch": "", f"inarch.{module}": code}
    found = violations(known, {"inarch"})
    assert len(found) == 1, found
    assert found[0].endswith(problem)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from .wiring import a", "from .site import b"),
        ("from inarch.core import wiring", "import inarch.core.site"),
        ("class A:\n    from .wiring import a", "if True:\n    from .site import b"),
    ],
)
def test_the_checker_finds_a_cycle(first, second):
    known = {"inarch": "", "inarch.core": "", "inarch.core.site": first, "inarch.core.wiring": second}
    found = violations(known, {"inarch", "inarch.core"})
    assert found == ["import cycle: inarch.core.site -> inarch.core.wiring -> inarch.core.site"]


def test_the_checker_finds_a_cycle_through_the_folder():
    known = {"inarch.core": "from .site import Site", "inarch.core.site": "from . import Site"}
    assert violations(known, {"inarch.core"}) == ["import cycle: inarch.core -> inarch.core.site -> inarch.core"]


def test_the_checker_allows_what_the_table_allows():
    known = {
        "inarch": "from .handle import Adapters\n\ndef __getattr__(name):\n    from .train.trainer import Trainer",
        "inarch.core.site": "import os.path",
        "inarch.methods": "from .lora import LoRA",
        "inarch.methods.method": "from ..core.site import Site",
        "inarch.methods.lora": "import torch\nfrom .method import Method\n\ndef f():\n    import transformers",
        "inarch.pretrained": "from transformers import AutoModel",
        "inarch.attach": "",
        "inarch.handle": "import torch\nfrom . import attach\nfrom .core.site import Site",
        "inarch.train.trainer": "import datasets\nfrom ..handle import Adapters",
        "inarch.cli": "def train():\n    from .train import trainer",
    }
    assert violations(known, {"inarch", "inarch.methods"}) == []
