"""What the README shows is run: its code blocks, in order, in one place."""

import re
import shlex
from itertools import zip_longest
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inarch.cli import _load, app
from inarch.methods import registry
from inarch.methods.unions import OLDER_NAMES

ROOT = Path(__file__).parent.parent
BACKBONE = ROOT / "src" / "inarch" / "assets" / "demo_backbone"
HUB_ID = "google/vit-base-patch16-224-in21k"
READMES = ["README.md", "README.zh.md"]


def blocks(page, language):
    """The code blocks of one language; "" is what has none: output, and the tree of files."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


@pytest.mark.parametrize("page", READMES)
def test_the_python_of_the_readme_runs(page, tmp_path, monkeypatch):
    """With the demonstration backbone in the place of the model on the Hub."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    found = blocks(page, "python")
    assert found and any(HUB_ID in block for block in found)
    for block in found:
        exec(compile(block.replace(HUB_ID, str(BACKBONE)), page, "exec"), namespace)
    assert (tmp_path / "out" / "cifar100" / "adapter.safetensors").is_file()


@pytest.mark.parametrize("page", READMES)
def test_the_readme_is_short_and_begins_with_the_two_commands(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    first = blocks(page, "sh")[0]
    assert first.split()[:2] == ["make", "demo"] and "make test" in first


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "CONTRIBUTING.md", "docs/design.md"])
def test_every_link_to_a_file_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", READMES)
def test_the_output_shown_is_what_is_printed(page):
    """But for the ends of lines, which a page has where it is full."""
    (shown,) = [block for block in blocks(page, "") if block.startswith("$ ")]
    command, _, output = shown.partition("\n")
    result = CliRunner().invoke(app, shlex.split(command)[2:])
    assert output.split() == result.output.split()


@pytest.mark.parametrize("page", READMES)
def test_the_commands_of_the_readme_are_understood(page):
    """Each with its options and arguments; nothing is run."""
    lines = [shlex.split(line) for line in "".join(blocks(page, "sh")).splitlines() if line.startswith("inarch ")]
    assert {"train", "predict", "eval", "probe", "check"} <= {words[1] for words in lines}
    for _, name, *arguments in lines:
        _load(name).make_context(name, arguments)


@pytest.mark.parametrize("page", READMES)
def test_every_preset_is_in_the_table(page):
    rows = [line.split("|")[1] for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    told = {name for row in rows for name in re.findall(r"`([\w+]+)`", row)}
    older = {name for method in registry.methods().values() for name in method.aliases} | OLDER_NAMES.keys()
    assert told == registry.preset_names() - older


@pytest.mark.parametrize("page", READMES)
def test_the_tree_shows_files_that_are_there(page):
    (tree,) = [block for block in blocks(page, "") if block.startswith("src/")]
    paths = re.findall(r"(?:^|[;；] +)([\w/]+(?:/|\.py))(?= )", tree, flags=re.MULTILINE)
    assert len(paths) > 10
    assert [path for path in paths if not any((ROOT / place / path).exists() for place in ("", "src/inarch"))] == []


def test_both_readmes_show_the_same():
    """Code but for its comments, tables but for their words, pictures and figures."""

    def shown(page):
        text = (ROOT / page).read_text(encoding="utf-8")
        code = [re.sub(r" *#.*", "", block) for name in ("python", "sh") for block in blocks(page, name)]
        output = [block if block[0] == "$" else re.findall(r"^\S+", block, re.MULTILINE) for block in blocks(page, "")]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        figures = sorted(re.findall(r"\b\d\d\.\d\b|\d+,\d{3}", prose))
        headings = [line.split()[0] for line in prose.splitlines() if line.startswith("#")]
        tables = [re.findall(r"`[^`]+`", line) for line in prose.splitlines() if line.startswith("|")]
        return [*code, *output, *tables, headings, re.findall(r"!\[.*?\]\((.*?)\)", prose), figures]

    for one, other in zip_longest(*map(shown, READMES)):
        assert one == other


def test_every_script_is_told_of_to_contributors():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "scripts").iterdir() if path.name != "__pycache__"}
    assert names and {name for name in names if not re.search(rf"[`/]{re.escape(name)}\b", text)} == set()
