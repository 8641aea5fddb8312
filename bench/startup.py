"""What importing `inarch.attach` costs beyond `import torch`, and what attaching costs on a ViT-B/16.

    .venv/bin/python bench/startup.py [--runs 7]

Each import is timed in a fresh interpreter. Attaching is a fresh probe on the meta device and one real forward.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from transformers import ViTConfig, ViTForImageClassification

import inarch

CODE = "import time, torch; t = time.perf_counter(); import inarch; inarch.attach; print(time.perf_counter() - t)"


def main() -> None:
    """Print medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    show(
        "inarch.attach, after torch",
        [float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(runs)],
    )
    probe_times, attach_times = [], []
    for _ in range(runs):
        model = ViTForImageClassification(ViTConfig())
        start = time.perf_counter()
        inarch.probe(model)
        middle = time.perf_counter()
        inarch.attach(model).add("a", "seq_bn")
        probe_times.append(middle - start)
        attach_times.append(time.perf_counter() - middle)
    show(f"probe ViT-B/16, {torch.get_num_threads()} threads", probe_times)
    show("attach and add seq_bn", attach_times)


def show(what: str, seconds: list[float]) -> None:
    """One line."""
    print(f"{what:<32} median {statistics.median(seconds):.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main()
