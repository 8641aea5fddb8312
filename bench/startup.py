"""What importing `inarch.attach` costs beyond `import torch`.

    .venv/bin/python bench/startup.py [--runs 7]

Each import is timed in a fresh interpreter.
"""

import argparse
import statistics
import subprocess
import sys

CODE = "import time, torch; t = time.perf_counter(); import inarch; inarch.attach; print(time.perf_counter() - t)"


def main() -> None:
    """Print medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    seconds = [float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(runs)]
    print(f"median {statistics.median(seconds):.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main()
