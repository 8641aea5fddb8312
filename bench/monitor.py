"""What being watched costs: the time of a training step with `inarch.Monitor` over that of one without, side by side.

    .venv/bin/python bench/monitor.py [--runs 9] [--steps 88] [--device cuda]

The demonstration backbone with `seq_bn` at batch 32, one thread, AdamW: two copies of it are trained, and take turns
step by step, so that a busy machine slows both alike. Each run is a whole short training, with all that a monitor does
more often at its beginning. Prints the median over the runs of the ratio of their times, with quartiles; and the share
of its run's time that was spent in `Monitor.step`, which on a CPU is all that it costs.
"""

import argparse
import statistics
import time
from typing import Any

import torch

import inarch
from inarch.train.models import load_model

LABELS = [str(digit) for digit in range(10)]


class Training:
    """One training, step by step."""

    def __init__(self, device: str, num_steps: int, *, is_watched: bool) -> None:
        torch.manual_seed(0)
        self.model = load_model("demo", LABELS).to(device)
        adapters = inarch.attach(self.model)
        adapters.add("a", "seq_bn")
        adapters.train("a")
        self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.batch: dict[str, Any] = {
            "pixel_values": torch.randn(32, 3, 32, 32, device=device),
            "labels": torch.randint(10, (32,), device=device),
        }
        self.monitor = inarch.Monitor(self.model, num_steps=num_steps, label_prior=[0.1] * 10) if is_watched else None
        self.seconds = self.inside = 0.0

    def step(self) -> None:
        """One optimiser step."""
        begin = time.perf_counter()
        loss = self.model(**self.batch).loss
        loss.backward()
        if self.monitor is not None:
            before = time.perf_counter()
            self.monitor.step(loss)
            self.inside += time.perf_counter() - before
        self.optimizer.step()
        self.optimizer.zero_grad()
        if loss.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - begin


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=88)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ratios, shares, milliseconds = [], [], []
    for run in range(options.runs + 1):
        bare = Training(options.device, options.steps, is_watched=False)
        watched = Training(options.device, options.steps, is_watched=True)
        for step in range(options.steps):
            for one in (bare, watched) if step % 2 else (watched, bare):
                one.step()
        if run:  # the first warms caches
            ratios.append(watched.seconds / bare.seconds)
            shares.append(watched.inside / watched.seconds)
            milliseconds.append(bare.seconds / options.steps * 1e3)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"step without a monitor {statistics.median(milliseconds):.1f} ms on {options.device}")
    print(f"  step with one      {middle:.3f}x  (quartiles {low:.3f} to {high:.3f})")
    low, middle, high = statistics.quantiles(shares, n=4)
    print(f"  spent in it        {middle:.1%}  (quartiles {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
