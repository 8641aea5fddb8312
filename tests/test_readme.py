"""What the README shows is run: its code blocks, in order, in one place."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BACKBONE = ROOT / "src" / "inarch" / "assets" / "demo_backbone"
HUB_ID = "google/vit-base-patch16-224-in21k"


def blocks(page, language):
    """The code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_python_of_the_readme_runs(page, tmp_path, monkeypatch):
    """With the demonstration backbone in the place of the model on the Hub."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    found = blocks(page, "python")
    assert found and any(HUB_ID in block for block in found)
    for block in found:
        exec(compile(block.replace(HUB_ID, str(BACKBONE)), page, "exec"), namespace)
    assert (tmp_path / "out" / "cifar100" / "adapter.safetensors").is_file()


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
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


def test_the_commands_of_the_readme_exist():
    from typer.testing import CliRunner

    from inarch.cli import app

    commands = set(
        re.findall(r"^(?:\.venv/bin/)?inarch (\w+)", "\n".join(blocks("README.md", "sh")), flags=re.MULTILINE)
    )
    assert {"train", "predict", "eval", "probe", "check"} <= commands
    for command in commands:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, command
