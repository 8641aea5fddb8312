"""Images of letters: drawn, not downloaded.

Every letter in every DejaVu font that ships with matplotlib is rendered once, and each training image is a fresh
distortion of one of those bitmaps. There is no digit among them.
"""

import math
import string
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# Bitmaps

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
# The task

HELD_OUT_COPIES = 5  # distortions of each letter of the held-out font


class Letters:
    """Telling letters apart."""

    num_classes = len(CLASSES)

    def __init__(self, seed: int, scan_ratio: float = 0.5, ramp_ratio: float = 0.3) -> None:
        self.ramp_ratio = ramp_ratio
        self.bitmaps, self.labels = render_letters(TRAINING_FONTS)
        self.distort = Distortion(seed, scan_ratio)
        self.generator = self.distort.generator
        # The held-out images are made once, from a font and a generator that training never uses.
        held_out, labels = render_letters([HELD_OUT_FONT])
        self.held_out_labels = labels.repeat(HELD_OUT_COPIES)
        copies = held_out.repeat(HELD_OUT_COPIES, 1, 1, 1)
        self.held_out_images = Distortion(seed + 1_000_000, scan_ratio)(copies)

    def loss(self, model: nn.Module, size: int, progress: float) -> tuple[Tensor, Tensor]:
        """Loss and accuracy on fresh images, at a share of the training from 0 to 1."""
        # Upright letters first: on fully distorted ones the loss would not move for hundreds of steps.
        self.distort.strength = min(1.0, progress / self.ramp_ratio)
        chosen = torch.randint(len(self.bitmaps), (size,), generator=self.generator)
        logits = model(pixel_values=self.distort(self.bitmaps[chosen])).logits
        return F.cross_entropy(logits, self.labels[chosen]), (logits.argmax(-1) == self.labels[chosen]).float().mean()

    def held_out_accuracy(self, model: nn.Module) -> float:
        """Share of the letters of the held-out font that are given their class."""
        hits = [
            (model(pixel_values=some).logits.argmax(-1) == truth).sum()
            for some, truth in zip(self.held_out_images.split(256), self.held_out_labels.split(256), strict=True)
        ]
        return torch.stack(hits).sum().item() / len(self.held_out_labels)
