"""What the tests that train share: a tiny model, small pictures, and ways to stop and to compare."""

import json

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from inarch.testing import perturb

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def save_model(folder):
    """A tiny random model in a folder, with the settings of its image processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        )
        network = ViTForImageClassification(config)
        perturb(network)
    network.save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def save_pictures(root, classes=COLOURS, count=8):
    """A folder of images by class: each class has a colour."""
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(np.array(COLOURS[name]) + generator.normal(0, 20, (20, 24, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return str(root)


class RandomImages(Dataset):
    """Random tensors in the size of an image, each of its own random numbers."""

    def __init__(self, number=24, classes=5):
        self.number, self.classes = number, classes

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % self.classes}


class Killed(BaseException):
    """Stands for the end of a process that is killed."""


class StopAt(TrainerCallback):
    """Leaves in the middle of a step, without any tidying."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **rest):
        if state.global_step == self.step:
            raise Killed


def weights(model):
    """A copy of all tensors of a model."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(one, other):
    """Whether two mappings hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
