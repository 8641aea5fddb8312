"""Pre-train the demonstration backbone: a small ViT that learns to tell letters apart and never sees a digit.

    python scripts/pretrain_demo_backbone.py --steps 3500 --batch-size 96 --seed 0 --out runs/demo_backbone

The data are drawn, not downloaded: every letter in every DejaVu font that ships with matplotlib is rendered once, and
each training image is a fresh distortion of one of those bitmaps. The folder written is a transformers checkpoint in
half precision without the letter classifier, its image processor, and the training log.

Deterministic for a given seed, number of threads, and versions of torch and Pillow.
"""

import argparse
import csv
import json
import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the training images")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    # training horizon
    parser.add_argument("--steps", type=int, default=3500, help="number of optimisation steps")
    parser.add_argument("--batch-size", type=int, default=96, help="images per step")
    # optimisation
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup-ratio", type=float, default=0.05, help="share of the steps spent warming up")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of matrices; never of biases and norms")
    parser.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    # training images
    parser.add_argument("--scan-ratio", type=float, default=0.5, help="share of the images seen as by a coarse scanner")
    parser.add_argument("--ramp-ratio", type=float, default=0.3, help="share of the steps until full distortion")
    # logging
    parser.add_argument("--log-every", type=int, default=100, help="steps between two rows of the log")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# Letters

# The three text families in their four styles. The "Display" fonts next to them hold no Latin letters.
FONTS = tuple(
    f"DejaVu{family}{style}"
    for family, styles in (
        ("Sans", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("SansMono", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("Serif", ("", "-Bold", "-Italic", "-BoldItalic")),
    )
    for style in styles
)
HELD_OUT_FONT = "DejaVuSerif-Italic"  # never trained on: the log's held-out accuracy is measured on it
TRAINING_FONTS = tuple(font for font in FONTS if font != HELD_OUT_FONT)

LETTERS = string.ascii_uppercase + string.ascii_lowercase

# Letters are centred and scaled to one size, so these pairs are the same shape in both cases; so are I and l in the
# sans-serif fonts. One class each, or the classifier would be asked to guess.
SAME_IN_BOTH_CASES = "COPSVWXZ"


def class_name(letter: str) -> str:
    """The class that a letter belongs to, named after one of its letters."""
    if letter.upper() in SAME_IN_BOTH_CASES:
        return letter.upper()
    return "I" if letter == "l" else letter


CLASSES = tuple(sorted({class_name(letter) for letter in LETTERS}))

CANVAS = 64  # side of the cached bitmaps: twice the model's images, so that distorting them does not alias
GLYPH = 48  # longest side of a letter's ink on the canvas; the rest is room to rotate and stretch into
IMAGE = 32  # side of the model's images


def render(letter: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """White on black, ink centred on the canvas and as large as `GLYPH` allows."""
    left, top, right, bottom = font.getbbox(letter)
    page = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2))
    ImageDraw.Draw(page).text((1 - left, 1 - top), letter, fill=255, font=font)
    ink = page.crop(page.getbbox())
    scale = GLYPH / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BOX)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(ink, ((CANVAS - ink.width) // 2, (CANVAS - ink.height) // 2))
    return canvas


def vary_strokes(bitmaps: Tensor) -> Tensor:
    """Three stroke widths of each bitmap, in three blocks: thinner by a canvas pixel all round, as drawn, thicker."""
    thin = -F.max_pool2d(-bitmaps, 3, stride=1, padding=1)
    thick = F.max_pool2d(bitmaps, 3, stride=1, padding=1)
    return torch.cat([thin, bitmaps, thick])


def render_letters(fonts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Every letter in every font and stroke width: bitmaps (n, 1, CANVAS, CANVAS) in 0..1, and class indices (n,)."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    bitmaps, labels = [], []
    for name in fonts:
        # The basic layout engine is the one that every build of Pillow has.
        font = ImageFont.truetype(folder / f"{name}.ttf", size=4 * GLYPH, layout_engine=ImageFont.Layout.BASIC)
        for letter in LETTERS:
            bitmaps.append(np.asarray(render(letter, font), dtype=np.float32) / 255)
            labels.append(CLASSES.index(class_name(letter)))
    varied = vary_strokes(torch.from_numpy(np.stack(bitmaps)).unsqueeze(1))
    return varied, torch.tensor(labels).repeat(len(varied) // len(labels))


# ----------------------------------------------------------------------------------------------------------------------
# Distortions: whole batches at once, so that making the images never holds up training


class Distortion:
    """Turns bitmaps from `render_letters` into the model's images, drawing every choice from one generator.

    `strength` goes from 0, letters moved and bent not at all, to 1.
    """

    def __init__(self, seed: int, scan_ratio: float = 0.5, strength: float = 1.0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.scan_ratio = scan_ratio
        self.strength = strength

    def __call__(self, bitmaps: Tensor) -> Tensor:
        """(n, 1, CANVAS, CANVAS) in 0..1 to normalised (n, 3, IMAGE, IMAGE)."""
        ink = self.bend(bitmaps)
        ink = torch.where(self.coin(len(ink), self.scan_ratio), self.scan(ink), self.blur(ink))
        gray = self.expose(ink)
        return ((gray - 0.5) / 0.5).expand(-1, 3, -1, -1)

    def uniform(self, n: int, low: float, high: float) -> Tensor:
        """One number per image, shaped to broadcast over images."""
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=self.generator)

    def coin(self, n: int, probability: float) -> Tensor:
        """One yes or no per image."""
        return self.uniform(n, 0, 1) < probability

    def bend(self, ink: Tensor) -> Tensor:
        """A random affine map and a smooth random displacement in one resampling, then down to the image size."""
        n = len(ink)
        angle, shear = (self.strength * self.uniform(n, -0.3, 0.3).flatten() for _ in range(2))
        right, down = (self.strength * self.uniform(n, -0.1, 0.1).flatten() for _ in range(2))
        # The grid maps output to input coordinates, so letters grow where the scale is below 1. Digits are mostly
        # taller than wide, hence the bias towards narrow letters.
        width = self.uniform(n, 0.70, 1.50).flatten() ** self.strength
        height = self.uniform(n, 0.70, 1.10).flatten() ** self.strength
        cos, sin = angle.cos(), angle.sin()
        to_x = [width * cos, width * (shear * cos - sin), right]
        to_y = [height * sin, height * (shear * sin + cos), down]
        theta = torch.stack(to_x + to_y, dim=-1).view(n, 2, 3)
        grid = F.affine_grid(theta, [n, 1, CANVAS, CANVAS], align_corners=False)
        # A displacement drawn on 5 x 5 points and interpolated bends strokes as a hand does, without tearing them.
        size = self.strength * self.uniform(n, 0.0, 0.1)
        coarse = size * torch.randn(n, 2, 5, 5, generator=self.generator)
        smooth = F.interpolate(coarse, size=(CANVAS, CANVAS), mode="bicubic", align_corners=True)
        bent = F.grid_sample(ink, grid + smooth.permute(0, 2, 3, 1), align_corners=False)
        return F.avg_pool2d(bent, CANVAS // IMAGE)

    def scan(self, ink: Tensor) -> Tensor:
        """As a coarse scanner sees it: ink counted in blocks of 4 x 4 black-or-white pixels, then scaled back up."""
        blocks = F.avg_pool2d((ink > 0.5).float(), 4)
        return F.interpolate(blocks, size=(IMAGE, IMAGE), mode="bilinear", align_corners=False)

    def blur(self, ink: Tensor) -> Tensor:
        """Between sharp and smoothed over 5 x 5 pixels."""
        taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        smoothed = F.conv2d(ink, torch.outer(taps, taps).view(1, 1, 5, 5), padding=2)
        return torch.lerp(ink, smoothed, self.uniform(len(ink), 0, 1))

    def expose(self, ink: Tensor) -> Tensor:
        """Brightness of ground and ink, polarity (one image in four is dark on light), and noise in half of them."""
        n = len(ink)
        # Negative draws become 0 and draws above 1 become 1: half the grounds are pure black, a third of the ink white.
        dark, light = self.uniform(n, -0.25, 0.25).clamp(min=0), self.uniform(n, 0.7, 1.15).clamp(max=1)
        gray = torch.lerp(dark, light, ink)
        gray = torch.where(self.coin(n, 0.25), 1 - gray, gray)
        noise = torch.randn(gray.shape, generator=self.generator) * self.uniform(n, -0.08, 0.08).clamp(min=0)
        return (gray + noise).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Model


def make_config(**changes: Any) -> ViTConfig:
    """The architecture: 1.2 million parameters."""
    return ViTConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=IMAGE,
        patch_size=8,
        num_channels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **changes,
    )


def make_optimizer(model: ViTForImageClassification, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim in (2, 4)]
    others = [parameter for parameter in model.parameters() if parameter.ndim not in (2, 4)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


def lr_multiplier(step: int, steps: int, warmup_ratio: float) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = max(1, round(warmup_ratio * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def measure_accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Share of the images given their class."""
    model.eval()
    hits = [
        (model(pixel_values=some).logits.argmax(-1) == truth).sum()
        for some, truth in zip(images.split(256), labels.split(256), strict=True)
    ]
    model.train()
    return torch.stack(hits).sum().item() / len(labels)


def save_backbone(model: ViTForImageClassification, out: Path) -> None:
    """A transformers checkpoint without the classifier: whoever loads it gets a fresh head of their own size."""
    backbone = {name: weight for name, weight in model.state_dict().items() if not name.startswith("classifier.")}
    # `save_pretrained` writes the tensor names that released transformers versions agree on.
    model.save_pretrained(out, state_dict={name: weight.half() for name, weight in backbone.items()})
    # The weights are stored in half precision for their size only. Naming float32 here makes `from_pretrained` widen
    # them on loading, since a model in half precision does not train on a CPU.
    config = make_config(architectures=["ViTForImageClassification"], dtype="float32")
    config.save_pretrained(out)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE, "width": IMAGE},
        "resample": int(Image.Resampling.BILINEAR),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Training


def main(argv: Sequence[str] | None = None) -> None:
    """Train, log, save."""
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    bitmaps, labels = render_letters(TRAINING_FONTS)
    distort = Distortion(args.seed, args.scan_ratio)
    # The held-out images are made once, from a font and a generator that training never uses.
    held_out_bitmaps, held_out_labels = render_letters([HELD_OUT_FONT])
    held_out_labels = held_out_labels.repeat(5)
    held_out_images = Distortion(args.seed + 1_000_000, args.scan_ratio)(held_out_bitmaps.repeat(5, 1, 1, 1))

    model = ViTForImageClassification(make_config(num_labels=len(CLASSES))).train()
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    backbone_size = sum(parameter.numel() for parameter in model.vit.parameters())
    print(f"{len(bitmaps)} bitmaps, {len(CLASSES)} classes, {backbone_size:,} backbone parameters")

    with (args.out / "training_log.csv").open("w", newline="") as file:
        log = csv.writer(file, lineterminator="\n")
        log.writerow(["step", "lr", "loss", "accuracy", "held_out_accuracy"])
        losses: list[Tensor] = []
        accuracies: list[Tensor] = []
        for step in (progress := tqdm(range(args.steps), desc="pre-training", unit="step")):
            lr = args.lr * lr_multiplier(step, args.steps, args.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Upright letters first: on fully distorted ones the loss would not move for hundreds of steps.
            distort.strength = min(1.0, step / max(1.0, args.ramp_ratio * args.steps))
            chosen = torch.randint(len(bitmaps), (args.batch_size,), generator=distort.generator)
            logits = model(pixel_values=distort(bitmaps[chosen])).logits
            loss = F.cross_entropy(logits, labels[chosen])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            losses.append(loss.detach())
            accuracies.append((logits.argmax(-1) == labels[chosen]).float().mean())
            if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
                mean_loss, accuracy = torch.stack(losses).mean().item(), torch.stack(accuracies).mean().item()
                held_out = measure_accuracy(model, held_out_images, held_out_labels)
                log.writerow([step + 1, f"{lr:.3e}", f"{mean_loss:.4f}", f"{accuracy:.4f}", f"{held_out:.4f}"])
                file.flush()
                losses, accuracies = [], []
                progress.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{accuracy:.3f}", held_out=f"{held_out:.3f}")

    save_backbone(model, args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
