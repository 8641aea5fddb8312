"""The demonstration backbone: the files that ship, and the script that makes them."""

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTModel

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "pretrain_demo_backbone.py"
FOLDER = ROOT / "src" / "inarch" / "assets" / "demo_backbone"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The pre-training script as a module."""
    spec = importlib.util.spec_from_file_location("pretrain_demo_backbone", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def torch_state() -> Iterator[None]:
    """Gives torch's thread count and random state back after a test that runs the script."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def load_backbone(folder: Path) -> tuple[ViTModel, dict[str, set[str]]]:
    """The bare backbone in single precision, and what loading it reported."""
    return ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32, output_loading_info=True)


def describe(config: ViTConfig) -> dict[str, Any]:
    """The configuration as a dictionary, without where and by which version of transformers it was written."""
    return {
        key: value for key, value in config.to_dict().items() if key not in ("transformers_version", "_name_or_path")
    }


# ----------------------------------------------------------------------------------------------------------------------
# The files that ship


def test_files_present_and_small() -> None:
    """Everything needed offline is there, in less than 3 MB."""
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training_log.csv",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3_000_000


def test_stored_weights_are_the_backbone_in_half_precision() -> None:
    """The file holds finite float16 tensors of the backbone and no head of any kind."""
    weights = load_file(FOLDER / "model.safetensors")
    assert all(name.startswith("vit.") and "pooler" not in name for name in weights)
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert all(weight.isfinite().all() for weight in weights.values())


def test_loads_bare() -> None:
    """`ViTModel` finds every weight; 1.2 million of them."""
    model, info = load_backbone(FOLDER)
    assert not any(info.values())
    assert 1.15e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.25e6


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_loads_with_a_fresh_head(dtype: torch.dtype | None) -> None:
    """Only the classifier is new; the precision is single unless another is asked for."""
    wanted = {} if dtype is None else {"dtype": dtype}
    model, info = ViTForImageClassification.from_pretrained(FOLDER, num_labels=10, output_loading_info=True, **wanted)
    assert info.pop("missing_keys") == {"classifier.weight", "classifier.bias"}
    assert not any(info.values())
    assert model.dtype == (dtype or torch.float32)
    assert model.classifier.out_features == 10


def test_processor_loads_and_prepares_images() -> None:
    """An 8 x 8 image becomes 3 x 32 x 32, with black at -1 and white at 1."""
    processor = AutoImageProcessor.from_pretrained(FOLDER)
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, 4:] = 255
    values = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 32, 32)
    assert values[..., 0].tolist() == torch.full((1, 3, 32), -1.0).tolist()
    assert values[..., -1].tolist() == torch.full((1, 3, 32), 1.0).tolist()


def test_training_log_reports_a_trained_model() -> None:
    """The log's columns are the documented ones, and it ends with most held-out letters recognised."""
    with (FOLDER / "training_log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "lr", "loss", "accuracy", "held_out_accuracy"]
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 4
    assert float(rows[-1]["held_out_accuracy"]) > 0.85


def test_features_separate_digits_better_than_random_weights_do() -> None:
    """A logistic regression from 300 digits does far better on frozen features than on an untrained backbone's."""
    digits = load_digits()
    scans = torch.tensor(digits.images[:700] / 16, dtype=torch.float32).unsqueeze(1)
    images = torch.nn.functional.interpolate(scans, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)

    def accuracy(model: ViTModel) -> float:
        with torch.no_grad():
            features: Tensor = model.eval()(pixel_values=(images - 0.5) / 0.5).last_hidden_state[:, 0]
        x, y = features.numpy(), digits.target[:700]
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        return float(probe.fit(x[:300], y[:300]).score(x[300:], y[300:]))

    trained, _ = load_backbone(FOLDER)
    torch.manual_seed(0)
    untrained = ViTModel(trained.config, add_pooling_layer=False)
    assert accuracy(trained) > accuracy(untrained) + 0.1


# ----------------------------------------------------------------------------------------------------------------------
# The script that makes them


def test_letters_only(script: ModuleType) -> None:
    """No digit is ever drawn or named, and every letter has a class."""
    assert all(name.isascii() and name.isalpha() and len(name) == 1 for name in script.CLASSES)
    assert all(letter.isascii() and letter.isalpha() for letter in script.LETTERS)
    assert len(script.LETTERS) == 52
    assert {script.class_name(letter) for letter in script.LETTERS} == set(script.CLASSES)


def test_held_out_font_is_held_out(script: ModuleType) -> None:
    """The font that measures held-out accuracy is never trained on."""
    assert script.HELD_OUT_FONT in script.FONTS
    assert script.HELD_OUT_FONT not in script.TRAINING_FONTS


def test_rendering(script: ModuleType) -> None:
    """Every letter gives one bitmap per stroke width, within 0..1, inked, labelled, and the same every time."""
    bitmaps, labels = script.render_letters([script.HELD_OUT_FONT])
    assert bitmaps.shape == (3 * 52, 1, script.CANVAS, script.CANVAS)
    assert labels.shape == (3 * 52,)
    assert set(labels.tolist()) == set(range(len(script.CLASSES)))
    assert bitmaps.min() == 0 and bitmaps.max() <= 1
    ink = bitmaps.sum(dim=(1, 2, 3)).view(3, 52)
    assert (ink[0] > 0).all()
    assert (ink.diff(dim=0) > 0).all()  # the three blocks go from thin to thick
    assert torch.equal(script.render_letters([script.HELD_OUT_FONT])[0], bitmaps)


def test_distortion(script: ModuleType) -> None:
    """Images have the model's shape and range, three equal channels, and depend on nothing but the seed."""
    bitmaps, _ = script.render_letters([script.HELD_OUT_FONT])
    images = script.Distortion(seed=3)(bitmaps)
    assert images.shape == (len(bitmaps), 3, script.IMAGE, script.IMAGE)
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert torch.equal(script.Distortion(seed=3)(bitmaps), images)
    assert not torch.equal(script.Distortion(seed=4)(bitmaps), images)


def test_learning_rate_warms_up_and_decays(script: ModuleType) -> None:
    """Linear up to 1 over the warm-up, then down to nearly 0."""
    rates = [script.lr_multiplier(step, steps=100, warmup_ratio=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(1) and rates[-1] < 0.001


@pytest.mark.usefixtures("torch_state")
def test_two_steps_write_a_loadable_checkpoint_twice_the_same(script: ModuleType, tmp_path: Path) -> None:
    """A tiny run writes what ships (README aside), loads without a missing weight, and repeats to the byte."""
    for name in ("first", "second"):
        script.main(["--steps", "2", "--batch-size", "4", "--seed", "7", "--out", str(tmp_path / name)])
    first, second = tmp_path / "first", tmp_path / "second"
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    model, info = load_backbone(first)
    assert not any(info.values())
    assert describe(model.config) == describe(load_backbone(FOLDER)[0].config)
    assert AutoImageProcessor.from_pretrained(first).size == {"height": 32, "width": 32}
