"""Models that classify images, by name: `demo`, a folder, or an id on the Hub. A model's own code is never run."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

# Not from `transformers`: early versions of it hide the class where torchvision is missing, though PIL is enough.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..core.errors import ConfigError
from ..core.places import first_line, is_path, no_model
from ..data.examples import Task
from ..heads import task_head
from .quiet import quiet

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "assets" / "demo_backbone"


def locate_model(name: str) -> str:
    """What transformers calls the model: its folder, or its id on the Hub. A folder called `demo` is `./demo`."""
    if name == DEMO:
        return str(DEMO_FOLDER)
    path = Path(name).expanduser()
    return str(path) if path.exists() else name


def load_model(
    name: str, labels: Sequence[str], *, task: Task = "single_label", revision: str | None = None
) -> nn.Module:
    """A pre-trained model with a task head for these labels, in 32-bit numbers.

    The head keeps its weights if it has as many labels; otherwise it is new, from torch's random state.

    Raises `ConfigError` for a name that stands for no model, or a model that cannot classify images.
    """
    config = _config(name, revision)
    if type(config) not in transformers.AutoModelForImageClassification._model_mapping:
        raise ConfigError(
            f"A model must be one that transformers can make a classifier of images of; got `{name}`, a "
            f"`{config.model_type}`. Use a model such as ViT, DeiT, BEiT, Swin or DINOv2."
        )
    with quiet():
        try:
            model, info = AutoModelForImageClassification.from_pretrained(
                locate_model(name),
                revision=revision,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: index for index, label in enumerate(labels)},
                problem_type="multi_label_classification" if task == "multi_label" else "single_label_classification",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=torch.float32,
                trust_remote_code=False,
            )
        except Exception as error:  # noqa: BLE001  the Hub's client and the readers of weights raise errors of many kinds
            raise ConfigError(no_model(name, error)) from None
    _check_weights(name, model, info["missing_keys"])
    model.config._name_or_path = _lasting(name)  # noqa: SLF001  where transformers keeps a model's name
    return model  # type: ignore[no-any-return]


def load_processor(name: str, *, revision: str | None = None) -> Any:
    """The image processor of a model. Raises `ConfigError` if it has none."""
    with quiet():
        advice = "Add that file to the model"
        try:
            return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                locate_model(name), revision=revision, trust_remote_code=False
            )
        except Exception as error:  # noqa: BLE001  as above
            reason = first_line(error)
            if isinstance(error, ImportError):
                advice = "Install the package, or a later version of transformers, which goes without"
    raise ConfigError(
        "A model for images must come with the settings of its image processor, `preprocessor_config.json`; got "
        f"`{name}`: {reason}. {advice}."
    )


def _config(name: str, revision: str | None) -> Any:
    path = Path(locate_model(name))
    if is_path(name) and not path.is_dir():
        raise ConfigError(no_model(name))
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(
            f"The folder of a model has a `config.json`; got `{name}`, which has none. Give the folder that "
            "`save_pretrained` wrote."
        )
    with quiet():
        try:
            return AutoConfig.from_pretrained(
                str(path) if path.exists() else name, revision=revision, trust_remote_code=False
            )
        except Exception as error:  # noqa: BLE001  as above
            raise ConfigError(no_model(name, error)) from None


def _check_weights(name: str, model: nn.Module, missing: Sequence[str]) -> None:
    """Refuse weights of another architecture; announce those that lack, since a frozen base never learns them."""
    heads = tuple(f"{path}." for path in task_head(model))
    base = [key for key, _ in model.named_parameters() if not key.startswith(heads)]
    absent = sorted(set(base) & set(missing))
    if 2 * len(absent) > len(base):
        raise ConfigError(
            f"The weights of a model must be those of its architecture; got `{name}`, where {len(absent)} of "
            f"{len(base)} tensors of {type(model).__name__} are missing, first `{absent[0]}`. Use another model."
        )
    if absent:
        logger.warning(
            "%d tensors of the base model are not among the weights of `%s` and keep their initial values, first `%s`.",
            len(absent), name, absent[0],
        )  # fmt: skip


def _lasting(name: str) -> str:
    """The name as an adapter file keeps it: that of a folder must hold in another place too."""
    return str(Path(name).expanduser().resolve()) if name != DEMO and Path(name).expanduser().is_dir() else name
