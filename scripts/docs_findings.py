"""Write docs/findings.md, the page of all findings, from the rules themselves.

    python scripts/docs_findings.py [--check]

`--check` writes nothing and fails if the page is not what the rules say.
"""

from pages import DOCS, write_or_check

from inarch.check import rules

PAGE = DOCS / "findings.md"

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
    write_or_check(PAGE, page, script="docs_findings.py", documentation=__doc__)


if __name__ == "__main__":
    main()
