"""Command-line options made from configuration classes, so that a field's help line and range are written once.

    @configured(recipe=Recipe)
    def train(*, output: ..., recipe: dict[str, Any]) -> None: ...

gives `train` an option for every field of `Recipe` (`learning_rate` is `--learning-rate`) and hands it those that were
given on the command line. Defaults stay with the configuration class, which also judges the values.
"""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import typer

from ..core.config import Config
from ..core.errors import ConfigError


def configured(
    defaults: Mapping[str, object] = types.MappingProxyType({}), /, **configs: type[Config]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameters of these names by the fields of the classes, each an option.

    A field with the name of a parameter of the command is left to the command. `defaults` are those that the command
    puts in the place of the classes' own; the help tells them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [parameter for parameter in own if parameter.name not in configs]
        taken = {parameter.name for parameter in kept}
        fields = {
            name: [field.name for field in _fields(cls) if field.name not in taken] for name, cls in configs.items()
        }

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {
                name: {key: value for key in keys if (value := values.pop(key)) is not None}
                for name, keys in fields.items()
            }
            command(**values, **given)

        made = [
            option_of(field, annotations[field.name], defaults.get(field.name, field.default))
            for cls in configs.values()
            for annotations in [typing.get_type_hints(cls)]
            for field in _fields(cls)
            if field.name not in taken
        ]
        signature = inspect.Signature([*kept, *made])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *made)} | {"return": None}
        return run

    return decorate


def _fields(cls: type[Config]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)  # type: ignore[arg-type]


def option_of(field: dataclasses.Field[Any], annotation: Any, default: object) -> inspect.Parameter:
    """The option of one field: None where it is not given."""
    flag = _flag(field.name)
    kind, choices = _kind(annotation)
    shown = "" if default is None or default is dataclasses.MISSING else f" [default: {_word(default)}]"
    declared = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    made = typer.Option(
        declared, help=f"{field.metadata['help']}{shown}", show_default=False, metavar="|".join(choices) or None
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, made]
    )


def _kind(annotation: Any) -> tuple[type, list[str]]:
    """The type of an option, and the words it takes where they are few."""
    parts = [part for part in _parts(annotation) if part is not types.NoneType]
    choices = [str(choice) for part in parts if typing.get_origin(part) is Literal for choice in typing.get_args(part)]
    plain = [part for part in parts if typing.get_origin(part) is not Literal]
    if choices and not plain:
        return str, choices
    if len(plain) != 1 or choices or plain[0] not in (bool, int, float, str):
        raise TypeError(f"An option is made of one plain type or of choices; got {annotation}.")
    return plain[0], []


def _parts(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def made_from(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration, where an error names the options instead of the fields."""
    try:
        return cls.from_dict(values)
    except ConfigError as error:
        raise ConfigError(in_options(str(error), cls)) from None


_CHANGED = re.compile(r"\b(?:study|recipe|data)\.(\w+)(?= .* instead of )")
"""How a run or a study that goes on names an option that it was not begun with."""


def in_options(message: str, *classes: type[Config]) -> str:
    """A message about fields of configuration classes as one about options."""
    for cls in classes:
        for field in _fields(cls):
            message = message.replace(f"`{cls.__name__}.{field.name}`", f"`{_flag(field.name)}`")
    return _CHANGED.sub(lambda found: _flag(found[1]), message)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"
