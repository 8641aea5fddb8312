"""What a model takes: the names of adapters, the setups that can be activated, and none that loses what it computes."""

import re
from collections.abc import Collection, Mapping

from .attach import check_stream
from .check import Report, outline, report
from .compose import Block, Setup, fusions, leaves, names
from .core.config import Config
from .core.errors import SetupError, nearest
from .core.site import Sites
from .methods import AdapterConfig, method_of

_NAME = re.compile(r"[^./,|\[\]\s\0](?:[^./,|\[\]\n\0]*[^./,|\[\]\s\0])?")


def check_name(name: object, kind: str = "An adapter") -> None:
    """Raise `SetupError` for what cannot be a folder, a key or a part of a configuration."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SetupError(
            f"{kind}'s name is text without `.`, `/`, `,`, `|`, brackets, line breaks or null bytes; got "
            f"{name!r}. Use letters, digits, `-` and `_`."
        )


def check_present(name: str, known: Collection[str]) -> None:
    """Raise `SetupError` for an adapter that the model does not have."""
    if not isinstance(name, str) or name not in known:
        raise SetupError(f"An adapter must be added before it is used; got `{name}`. {nearest(str(name), known)}")


def check_word(argument: str, value: object, known: Collection[str]) -> None:
    """Raise `SetupError` for a word that an argument does not have, which would else be as good as none."""
    if value not in known:
        raise SetupError(
            f"`{argument}` is {' or '.join(f'`{word}`' for word in known)}; got {value!r}. {nearest(str(value), known)}"
        )


def check_no_fusion(config: AdapterConfig) -> None:
    """Raise `SetupError` for fusion layers, which act on the outputs of adapters that nobody named."""
    if any(_is_fusion(part) for part in config.parts):
        raise SetupError(
            f"Fusion layers are made for the adapters that they combine; got `{config}` by itself. Add these, and call "
            "`add_fusion(Fuse('a', 'b'), ...)`."
        )


def check_setup(setup: object, sites: Sites, configs: Mapping[str, AdapterConfig], unsound: Collection[str]) -> None:
    """Raise `SetupError` for what is no setup of these adapters, or one that cannot run or is not to be trusted.

    `unsound` are the adapters that were added although they do not keep the pre-trained function.
    """
    if not isinstance(setup, str | Block):
        raise SetupError(
            f"A setup is the name of an adapter or a block of names; got {setup!r}. Write `Stack('a', 'b')`."
        )
    for block in fusions(setup):
        if block.name not in configs:
            raise SetupError(
                f"A `Fuse` has fusion layers of its own; got none named `{block.name}` for {block}. Make them with "
                f"`add_fusion({block})`."
            )
    for name in names(setup):
        check_present(name, configs)
    for name in leaves(setup):
        if any(map(_is_fusion, configs[name].parts)):
            raise SetupError(
                f"Fusion layers act where a `Fuse` combines adapters; got `{name}` by itself in {setup!s}. "
                f"Activate `Fuse(..., name={name!r})`."
            )
    check_composition(setup, sites, configs, unsound)


def check_composition(
    setup: Setup, sites: Sites, configs: Mapping[str, AdapterConfig], unsound: Collection[str]
) -> None:
    """Raise for a setup that does not keep the pre-trained function although each of its adapters does."""
    verdict = outline(sites, setup, configs)
    check_streams(verdict)
    if not verdict.sound and not set(unsound) & set(names(setup)):
        raise SetupError(refusal(report(sites, setup, configs)))


def check_streams(verdict: Report) -> None:
    """Raise `SiteError` where an adapter reads a stream that cannot be read."""
    for group in verdict.sites:
        if group.proof.formula.reads_stream:
            for site in group.sites:
                check_stream(site)


def refusal(verdict: Report) -> str:
    """What is said of an unsound configuration."""
    details = "\n".join(f"  {finding}" for finding in verdict.findings if finding.level == "error")
    return (
        f"An adapter must keep the pre-trained function when its branch is zero; got {verdict.subject} for "
        f'{verdict.model_class}.\n{details}\n  For research, pass `unsound="allow"` to `add`.'
    )


def _is_fusion(part: Config) -> bool:
    return method_of(part).name == "fusion"
