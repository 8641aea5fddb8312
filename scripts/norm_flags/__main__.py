"""The command line of the norm-flags study: `python scripts/norm_flags --help`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # the package, not its files

from norm_flags.cli import main  # noqa: E402  the path comes first

if __name__ == "__main__":
    main()
