"""Pre-train a demonstration backbone.

    python scripts/backbones vit --steps 3500 --batch-size 96 --seed 0 --out runs/demo_backbone

The data are made, not downloaded. The folder written is a transformers checkpoint in half precision without the head of
pre-training, with what turns images or text into its inputs, and the training log. A run that was stopped goes on if it
is started again.

Deterministic for a given seed, number of threads, and versions of torch and Pillow.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .recipes import RECIPES, Recipe
from .training import train


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python scripts/backbones", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES, help="which backbone")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the training examples")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    # training horizon
    parser.add_argument("--steps", type=int, default=3500, help="number of optimisation steps")
    parser.add_argument("--batch-size", type=int, default=96, help="examples per step")
    # optimisation
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup-ratio", type=float, default=0.05, help="share of the steps spent warming up")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of matrices; never of biases and norms")
    parser.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    # logging
    parser.add_argument("--log-every", type=int, default=100, help="steps between two rows of the log")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, log, save."""
    args = parse_arguments(argv)
    recipe = RECIPES[args.recipe]
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    task = recipe.task(args.seed)
    model = recipe.build(recipe.configure(num_labels=task.num_classes))
    size = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(recipe.trunk))
    print(f"{args.recipe}: {task.num_classes} classes, {size:,} backbone parameters")
    train(
        model,
        task,
        args.out,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        warmup_ratio=args.warmup_ratio,
        weight_decay=args.weight_decay,
        grad_clip=args.grad_clip,
        log_every=args.log_every,
    )
    save_backbone(model, recipe, args.out)
    print(f"saved {args.out}")


def save_backbone(model: PreTrainedModel, recipe: Recipe, out: Path) -> None:
    """A transformers checkpoint without the task's head: whoever loads it gets a fresh head of their own size."""
    backbone = {name: weight for name, weight in model.state_dict().items() if name.startswith(recipe.trunk)}
    # `save_pretrained` writes the tensor names that released transformers versions agree on.
    model.save_pretrained(out, state_dict={name: weight.half() for name, weight in backbone.items()})
    # The weights are stored in half precision for their size only. Naming float32 here makes `from_pretrained` widen
    # them on loading, since a model in half precision does not train on a CPU.
    config = recipe.configure(architectures=[recipe.used_as], dtype="float32")
    config.save_pretrained(out)
    recipe.write_preprocessing(out)
