"""The demonstration backbone: the files that ship."""

import csv
from pathlib import Path

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
from transformers import AutoImageProcessor, ViTForImageClassification, ViTModel

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "src" / "inarch" / "assets" / "demo_backbone"


def load_backbone(folder: Path) -> tuple[ViTModel, dict[str, set[str]]]:
    """The bare backbone in single precision, and what loading it reported."""
    return ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32, output_loading_info=True)


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
