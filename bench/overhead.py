"""What being attached costs: forward time of a ViT with adapters over the bare model's, measured side by side.

    .venv/bin/python bench/overhead.py [--calls 200]

One thread, `inference_mode`, batch 1; the variants take turns call by call, so a busy machine slows all alike, and in a
new order each round, so none has always the same one before it. The garbage collector passes over what was there before
the first call, as `timeit` has it do nothing. Prints the median of the per-round ratios to the bare model, with
quartiles.
"""

import argparse
import copy
import gc
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import ViTConfig, ViTModel

import inarch

VARIANTS = {"inactive": None, "seq_bn": "seq_bn", "double_seq_bn": "double_seq_bn", "lora (q, v)": "lora"}
MODELS = {
    # 16 patches and the class token: everything is overhead here
    "width 128, 17 tokens": {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "image_size": 32,
        "patch_size": 8,
    },
    "ViT-Tiny, 224 px": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
}


def main() -> None:
    """Print one table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="rounds; each calls every variant once")
    calls = parser.parse_args().calls
    torch.set_num_threads(1)
    for name, settings in MODELS.items():
        bare = ViTModel(ViTConfig(num_hidden_layers=12, **settings)).eval()
        size = bare.config.image_size
        pixels = torch.randn(1, 3, size, size)
        models = {"bare": bare} | {variant: adapted(bare, config) for variant, config in VARIANTS.items()}
        times = measure({variant: partial(model, pixel_values=pixels) for variant, model in models.items()}, calls)
        print(f"\n{name}: bare {statistics.median(times['bare']) * 1e3:.2f} ms")
        for variant in VARIANTS:
            ratios = [a / b for a, b in zip(times[variant], times["bare"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"  {variant:<14} {middle:.3f}x  (quartiles {low:.3f} to {high:.3f})")


def adapted(bare: ViTModel, config: str | None) -> ViTModel:
    """A copy of the model with one adapter active, or attached with none active."""
    model = copy.deepcopy(bare)
    adapters = inarch.attach(model)
    if config is not None:
        adapters.add("a", config)
        adapters.activate("a")
    return model


def measure(runs: dict[str, Callable[[], object]], calls: int) -> dict[str, list[float]]:
    """Seconds of each call of each variant, taken in turns."""
    times: dict[str, list[float]] = {variant: [] for variant in runs}
    order = list(runs)
    gc.collect()
    gc.freeze()
    with torch.inference_mode():
        for number in range(calls + 10):
            random.shuffle(order)
            for variant in order:
                start = time.perf_counter()
                runs[variant]()
                if number >= 10:  # the first calls warm caches
                    times[variant].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
