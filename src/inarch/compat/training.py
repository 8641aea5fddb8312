"""The arguments of its example scripts, and what they do with them."""

from dataclasses import dataclass, field
from typing import Any

from ..core.errors import SetupError
from .composition import Stack as Stack
from .configuration import AdapterConfig as AdapterConfig


@dataclass
class AdapterArguments:
    """Arguments of a command line, for `HfArgumentParser`."""

    train_adapter: bool = field(default=False, metadata={"help": "Train an adapter instead of the full model."})
    load_adapter: str | None = field(default="", metadata={"help": "Adapter to start from: a folder or a repository."})
    adapter_config: str | None = field(default="seq_bn", metadata={"help": "Configuration of a new adapter."})
    load_lang_adapter: str | None = field(
        default=None, metadata={"help": "Language adapter below it: a folder or a repository."}
    )
    lang_adapter_config: str | None = field(default=None, metadata={"help": "Not needed: the folder says it."})


def setup_adapter_training(
    model: Any,
    adapter_args: AdapterArguments,
    adapter_name: str,
    adapter_config_kwargs: dict[str, Any] | None = None,
    adapter_load_kwargs: dict[str, Any] | None = None,
) -> tuple[str | None, str | None]:
    """`adapters.add` or `load`, `train`, `activate`; returns the names of the adapter and of its language adapter"""
    if not adapter_args.train_adapter:
        if adapter_args.load_adapter or adapter_args.load_lang_adapter:
            raise SetupError(
                "Adapters are loaded to be trained; got one to load and `train_adapter=False`. Set "
                "`train_adapter=True`."
            )
        return None, None
    more = adapter_load_kwargs or {}
    if adapter_args.load_adapter:
        model.load_adapter(adapter_args.load_adapter, load_as=adapter_name, **more)
    elif adapter_name not in model.adapters_config:
        config = AdapterConfig.load(adapter_args.adapter_config, **(adapter_config_kwargs or {}))
        model.add_adapter(adapter_name, config=config)
    language = model.load_adapter(adapter_args.load_lang_adapter, **more) if adapter_args.load_lang_adapter else None
    model.train_adapter(adapter_name)
    if language is not None:
        model.set_active_adapters(Stack(language, adapter_name))
    return adapter_name, language
