"""Models by name: without weights, as what the architecture alone can tell costs no download and no memory; or with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import SiteError
from ..core.places import absent, first_line, is_path, no_model
from .output import watch

AUTO_CLASSES = (
    "AutoModelForImageClassification",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
)
"""Where the class of a configuration that names none is looked up; the first is what `inarch train` trains."""

DEMO = "demo"
DEMO_BACKBONE = Path(__file__).parents[1] / "assets" / "demo_backbone"


def skeleton(model: str, labels: Sequence[str] = ()) -> Any:
    """The model on the meta device. `model`: `demo`, a folder, a model type such as `vit`, or a Hub id.

    `labels` are those of a task head that it is to have, in their order, instead of its own.

    Raises `SiteError` if there is no such model, or it cannot be built without its own code.
    """
    import torch

    config = _labelled(read_model_config(model), labels)
    try:
        with torch.device("meta"):
            return _model_class(config)._from_config(config).eval()
    except SiteError:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise SiteError(
            f"A model must be buildable from its configuration; got `{first_line(error)}` for `{model}`. "
            "Build it in Python and pass it to `inarch.probe`."
        ) from error


def with_own_weights(model: str, labels: Sequence[str] = ()) -> Any:
    """The model with its pre-trained weights, or random ones for a model type. `model` is as in `skeleton`.

    `labels` are as in `skeleton`. What is made anew is the same each time.
    """
    import torch

    from ..train.quiet import quiet

    torch.manual_seed(0)

    config = _labelled(read_model_config(model), labels)
    if is_type(model):
        return _model_class(config)._from_config(config).eval()
    place = DEMO_BACKBONE if model == DEMO else model
    try:
        with quiet():  # a head for other labels is made anew
            loaded = _model_class(config).from_pretrained(place, config=config, ignore_mismatched_sizes=bool(labels))
    except Exception as error:  # the Hub's client and the readers of weights raise errors of many kinds
        fault = first_line(error) if Path(place).exists() else absent(error)
        raise SiteError(
            f"A model to measure must have weights; got `{fault}` for `{model}`. Leave `--measure` out to "
            "judge its architecture alone."
        ) from error
    if model == DEMO:
        # As adapters are to remember it, and not the place where it lies here.
        loaded.config._name_or_path = DEMO  # noqa: SLF001  where transformers keeps a model's name
    return loaded.eval()


def _labelled(config: Any, labels: Sequence[str]) -> Any:
    """The configuration, for a task head with these labels if there are any."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    return config


def is_type(model: str) -> bool:
    """Whether a name is that of a model type, which has no weights."""
    from transformers import CONFIG_MAPPING

    return model in CONFIG_MAPPING and not Path(model).exists()


def read_model_config(model: str) -> Any:
    """The transformers configuration that a name stands for."""
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(model).expanduser()
    if is_path(model) and not path.is_dir():
        raise SiteError(no_model(model, types=CONFIG_MAPPING))
    if model not in CONFIG_MAPPING and model != DEMO and not path.exists():
        watch(f"Looking for `{model}` in the local cache and on the Hub")
    try:
        if model in CONFIG_MAPPING and not path.exists():
            return CONFIG_MAPPING[model]()
        place = DEMO_BACKBONE if model == DEMO else path if path.exists() else model
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # the Hub's client raises errors of several libraries
        raise SiteError(no_model(model, error, types=CONFIG_MAPPING)) from error


def _model_class(config: Any) -> Any:
    """The class that the configuration names, or the one that is trained by default."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (getattr(transformers, name) for name in AUTO_CLASSES):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise SiteError(
        f"A model type must have a model of its own; got `{config.model_type}`, a part of others. "
        "Name the model that it is a part of."
    )
