"""What attaching costs on a ViT-B/16: with the layout that is shipped, and with a fresh probe.

    .venv/bin/python bench/attach.py [--runs 7]

`attach` finds the sites and watches one real forward on a small image; `add` makes a `seq_bn` adapter. Both ways take
turns on new models, so a busy machine slows both alike; the processor's time is printed beside that of the clock.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import inarch
from inarch.sites import golden

SHIPPED = golden.FOLDER
WAYS = {"golden": SHIPPED, "meta": Path("nowhere")}


def main() -> None:
    """Print medians and ranges of each way, in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for number in range(runs + 1):
        for way, folder in WAYS.items():
            golden.FOLDER = folder
            times = attach_and_add(way)
            if number:  # the first pair imports and warms caches
                found[way].append(times)
    print(f"ViT-B/16, {torch.get_num_threads()} threads")
    for way, rows in found.items():
        for what, seconds in zip(("attach", "add", "both, processor"), zip(*rows, strict=True), strict=True):
            print(
                f"  {way:<7} {what:<16} median {statistics.median(seconds):.3f} s"
                f"  ({min(seconds):.3f} to {max(seconds):.3f})"
            )


def attach_and_add(way: str) -> tuple[float, float, float]:
    """Seconds of `attach`, of `add`, and of the processor for both."""
    model = ViTForImageClassification(ViTConfig())
    processor, start = time.process_time(), time.perf_counter()
    adapters = inarch.attach(model)
    middle = time.perf_counter()
    adapters.add("a", "seq_bn")
    end = time.perf_counter()
    assert adapters.sites.source == way
    return middle - start, end - middle, time.process_time() - processor


if __name__ == "__main__":
    main()
