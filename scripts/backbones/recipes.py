"""What the demonstration backbones are: one recipe for each arrangement of norms and sums."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from . import language, letters
from .training import Task


@dataclass(frozen=True, slots=True)
class Recipe:
    """An architecture, and what it is pre-trained to do."""

    configure: Callable[..., PreTrainedConfig]
    build: Callable[[PreTrainedConfig], PreTrainedModel]
    """The model to train, from the configuration."""
    trunk: str
    """The prefix of the backbone's weights, which are kept; the rest is the task's."""
    task: Callable[[int], Task]
    """The task, by seed."""
    used_as: str
    """The class that the folder is loaded as."""
    write_preprocessing: Callable[[Path], None]
    """Writes what turns images or text into the model's inputs."""


def _vit(**changes: Any) -> ViTConfig:
    """Norms before the branches: 1.2 million parameters."""
    return ViTConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=letters.IMAGE,
        patch_size=8,
        num_channels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **changes,
    )


def _dinov2(**changes: Any) -> Dinov2Config:
    """Norms before the branches and learned scales behind them."""
    return Dinov2Config(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        mlp_ratio=4,
        image_size=letters.IMAGE,
        patch_size=8,
        # small, as the networks that introduced layer scale start, or it would be hard to tell from none
        layerscale_value=0.1,
        use_mask_token=False,
        **changes,
    )


def _swinv2(**changes: Any) -> Swinv2Config:
    """Norms on the branches only; 64 tokens in windows of 16, then 16 tokens of twice the width."""
    return Swinv2Config(
        image_size=letters.IMAGE,
        patch_size=4,
        embed_dim=48,
        depths=(2, 4),
        num_heads=(2, 4),
        window_size=4,
        pretrained_window_sizes=(0, 0),
        drop_path_rate=0.0,
        **changes,
    )


def _bert(**changes: Any) -> BertConfig:
    """Norms behind the sums."""
    return BertConfig(
        vocab_size=len(language.WORDS),
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=language.LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **changes,
    )


def _reader(config: PreTrainedConfig) -> PreTrainedModel:
    """BERT with its heads of pre-training, the second of which names titles."""
    model = BertForPreTraining(config)
    model.cls.seq_relationship = nn.Linear(config.hidden_size, language.MaskedWords.num_classes)
    return model


def _write_image_processor(out: Path) -> None:
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": letters.IMAGE, "width": letters.IMAGE},
        "resample": int(Image.Resampling.BILINEAR),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def _write_vocabulary(out: Path) -> None:
    (out / "vocab.txt").write_text("".join(f"{word}\n" for word in language.WORDS), encoding="utf-8")


RECIPES = {
    "vit": Recipe(
        _vit, ViTForImageClassification, "vit.", letters.Letters, "ViTForImageClassification", _write_image_processor
    ),
    "dinov2": Recipe(
        _dinov2,
        Dinov2ForImageClassification,
        "dinov2.",
        letters.Letters,
        "Dinov2ForImageClassification",
        _write_image_processor,
    ),
    "swinv2": Recipe(
        _swinv2,
        Swinv2ForImageClassification,
        "swinv2.",
        letters.Letters,
        "Swinv2ForImageClassification",
        _write_image_processor,
    ),
    "bert": Recipe(_bert, _reader, "bert.", language.MaskedWords, "BertForSequenceClassification", _write_vocabulary),
}
