"""Write docs/findings.md, the page of all findings, from the rules themselves.

    python scripts/docs_findings.py [--check]

`--check` writes nothing and fails if the page is not what the rules say.
"""

import argparse
import sys
from pathlib import Path

from inarch.check import rules

PAGE = Path(__file__).parent.parent / "docs" / "findings.md"

HEAD = """# Findings

What `inarch check` and `inarch.check` may say, by code. A code keeps its meaning from version to version. An
*error* will go wrong and makes the command end with 1; a *warning* often goes wrong; a *note* is worth knowing.
Where a change of the configuration helps, the finding has the smallest one, checked again; `--fix` applies it.

This page is written by `scripts/docs_findings.py` from the rules in `src/inarch/check/rules/`.
"""


def page() -> str:
    """The whole page."""
    rows = "\n".join(
        f"| [`{rule.code}`](#{rule.code}) | {rule.level} | {_first_line(rule.documentation)} |" for rule in rules()
    )
    sections = "\n\n".join(f"## {rule.code}\n\n*{rule.level}*. {rule.documentation}" for rule in rules())
    return f"{HEAD}\n| code | level | what is found |\n| --- | --- | --- |\n{rows}\n\n{sections}\n"


def _first_line(text: str) -> str:
    return " ".join(text.split("\n\n", maxsplit=1)[0].split())


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE.name} is not what the rules say: run {Path(__file__).name}")
        return
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
