"""What scripts that write a page of docs/ share: the command line, and a comparison in the place of writing."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def write_or_check(file: Path, page: Callable[[], str], *, script: str, documentation: str | None) -> bool:
    """Write a page, and return whether it was; with `--check`, exit with a message if it is not what it would be."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if parser.parse_args().check:
        if file.read_text(encoding="utf-8") != page():
            sys.exit(f"{file.name} is not what it is made from says: run {script}")
        return False
    file.write_text(page(), encoding="utf-8")
    return True
