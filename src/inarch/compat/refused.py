"""What the library `adapters` has and inarch does not, by name, with what to write instead."""

from collections.abc import Mapping
from typing import Any

from ..core.errors import ConfigError, SetupError

_CLASSES = "No class is swapped or subclassed here; use `inarch.attach(model)` and the handle it returns."
_METHOD = "Write a method of your own as one file of `inarch/methods` (see CONTRIBUTING.md)."
_INSIDE = "Models run unchanged and adapters by hooks, so there is nothing to call; use the model itself."
_PLACES = "Read `adapters.sites`: each site has its layer, its role and its projections."
_INVERTIBLE = 'Invertible maps are part of an adapter: `add_adapter(name, "seq_bn_inv")`, or `"invertible"` alone.'
_HUB = "Search with `huggingface_hub.list_models`; `load_adapter(repository)` reads one."

METHODS: dict[str, str] = {
    "add_custom_head": "Give `add_prediction_head` a head of `inarch.compat.heads`, or register a kind of your own: "
    "`inarch.heads.register(config, module)`, then `adapters.add_head(name, kind)`.",
    "add_invertible_adapter": _INVERTIBLE,
    "apply_to_adapter_layers": "Go through `adapters.modules(name)`.",
    "apply_to_basemodel_childs": "Go through `model.base_model.children()`.",
    "delete_invertible_adapter": "Remove the adapter that it is part of: `delete_adapter(name)`.",
    "enable_invertible_adapters": "`train_adapter(name)` trains them with their adapter.",
    "forward_context": _INSIDE,
    "forward_head": "Call the model with `head=name`.",
    "get_invertible_adapter": "Read `adapters.modules(name)`.",
    "get_prediction_heads_config": "Read `adapters.flexible_heads`: configurations by name.",
    "head_type": "Register a kind of your own: `inarch.heads.register(config, module)`.",
    "init_adapters": "Call `inarch.compat.init(model)`.",
    "invertible_adapters_forward": _INSIDE,
    "iter_attentions": _PLACES,
    "iter_layer_ffns": _PLACES,
    "post_embedding_forward": _INSIDE,
    "push_adapter_setup_to_hub": "Write it with `save_adapter_setup(folder, setup)` and upload the folder: "
    "`huggingface_hub.upload_folder`.",
    "register_custom_head": "Register a kind of your own: `inarch.heads.register(config, module)`, then "
    "`adapters.add_head(name, kind)`.",
    "set_shared_parameters": _INSIDE,
}
"""Methods of models."""

NAMES: dict[str, str] = {
    "ADAPTER_CACHE": "Set `HF_HOME`, where the Hub's client keeps what it loads.",
    "ADAPTER_MODEL_MAPPING": "Use `AutoAdapterModel`, which takes every model type.",
    "AdapterFusionConfig": "Use `StaticAdapterFusionConfig` or `DynamicAdapterFusionConfig`.",
    "AdapterInfo": _HUB,
    "AdapterLayerBase": _METHOD,
    "AdapterMethod": _METHOD,
    "AdapterModelInterface": "Places are found by tracing; else give `inarch.attach(model, layout=...)`.",
    "AdapterTrainerCallback": "`AdapterTrainer` adds the penalty of fusion layers by itself.",
    "AdapterType": _HUB,
    "Biaffine": _CLASSES,
    "Activation_Function_Class": "Use `inarch.methods.activation(name)`.",
    "ComposableAdapterLayerBase": _METHOD,
    "DependencyParsingOutput": "Outputs are `inarch.heads.HeadOutput`.",
    "DvoRAConfig": "Use `DoRAConfig` or `VeraConfig`; folders of it are read, as the DoRA that they are.",
    "EmbeddingAdaptersMixin": _CLASSES,
    "ForwardContext": _INSIDE,
    "InvertibleAdaptersMixin": _CLASSES,
    "InvertibleAdaptersWrapperMixin": _CLASSES,
    "ModelAdaptersConfig": "Add adapters with `model.add_adapter`; `adapters.config(name)` is a configuration.",
    "ModelAdaptersMixin": _CLASSES,
    "ModelWithFlexibleHeadsAdaptersMixin": _CLASSES,
    "ModelWithHeadsAdaptersMixin": _CLASSES,
    "MultiTaskConfig": "Use `MTLLoRAConfig`.",
    "ReftConfig": "Use `LoReftConfig`, `NoReftConfig` or `DiReftConfig`.",
    "adjust_tensors_for_parallel": _INSIDE,
    "adjust_tensors_for_parallel_": _INSIDE,
    "build_full_config": "Use `inarch.compat.AdapterConfig.load`.",
    "get_adapter_config_hash": "Compare configurations: two that say the same are equal.",
    "get_adapter_info": _HUB,
    "init_adapters_config": "Call `init(model)`.",
    "list_adapters": _HUB,
    "match_attn_matrices_for_parallel": _INSIDE,
    "parse_heads_from_composition": "Read `adapters.heads_of(setup)`.",
    "resolve_adapter_config": "Use `inarch.compat.AdapterConfig.load`.",
    "validate_composition": "`model.set_active_adapters(setup)` refuses a setup that cannot run.",
    "ALLOWED_NESTINGS": "Read `allowed` of a block, such as `Stack.allowed`.",
    "SUPPORTED_MODELS": "Every block runs on every model.",
    "CONFIG_NAME": "Folders hold `adapter.safetensors` and `inarch.json`.",
    "WEIGHTS_NAME": "Folders hold `adapter.safetensors` and `inarch.json`.",
}
"""Names of its modules."""

KEYWORDS: dict[str, str] = {
    "adapter_card_kwargs": "Push with `adapters.push`, and edit the card on the Hub.",
    "custom_weights_loaders": "Heads and embeddings are read without; load anything else with torch.",
    "embedding_dim": "A table is as wide as the model's own.",
    "head_setup": "Heads are saved with their adapters; `save_head` writes one alone.",
    "leave_out": "Leave layers out when it is activated: `set_active_adapters(setup, skip_layers=[...])`.",
    "local_path": "Save the folder with `save_adapter`; what is pushed is written to a temporary one.",
    "meta_dict": "Write what is to be kept beside the folder in a file of your own.",
    "version": "Fetch the folder at its revision with `huggingface_hub.snapshot_download`, and give its place.",
    "name": "Parameters are shared by the adapters that are named; leave it out.",
}
"""Arguments of methods that are there."""


class NotHereError(SetupError, ImportError):
    """Something of the library `adapters` that is not here."""


def not_here(name: str, instead: str) -> NotHereError:
    """The error for a name."""
    return NotHereError(f"inarch.compat has what programs call; got `{name}` of the library `adapters`. {instead}")


def refuse(method: str, **given: Any) -> None:
    """Raise `SetupError` for an argument, other than its default, that means nothing here."""
    for keyword, value in given.items():
        if value is not None and value is not False:
            raise SetupError(
                f"`{method}` takes what inarch has a meaning for; got `{keyword}={value!r}`. {KEYWORDS[keyword]}"
            )


def refuse_kwargs(method: str, given: Mapping[str, Any]) -> None:
    """Raise `SetupError` for further arguments, which are those of the Hub's client there."""
    if given:
        raise SetupError(
            f"`{method}` takes what inarch has a meaning for; got `{next(iter(given))}`. The Hub's client reads its "
            "settings from the environment (`HF_TOKEN`, `HF_HOME`); fetch the folder with "
            "`huggingface_hub.snapshot_download` for anything else."
        )


def refused_field(config: str, field: str, value: Any, instead: str) -> ConfigError:
    """The error for a field of a configuration."""
    return ConfigError(f"`{config}` takes what inarch has a meaning for; got `{field}={value!r}`. {instead}")
