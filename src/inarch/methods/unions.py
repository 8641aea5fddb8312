"""Presets of several methods, each written as the configuration string of its parts.

MAD-X (Pfeiffer et al. 2020, arXiv 2005.00052): a language adapter, with an invertible one at the embeddings. MAM (He et
al. 2022, arXiv 2110.04366): prefixes, and bottlenecks beside the MLPs. UniPELT (Mao et al. 2022, arXiv 2110.07577):
prefixes, bottlenecks and LoRA, each with a gate.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.config import Config, shown
from ..core.errors import ConfigError, nearest

UNIONS: dict[str, str] = {
    "seq_bn_inv": "seq_bn|invertible",
    "double_seq_bn_inv": "double_seq_bn|invertible[non_linearity=swish]",
    "mam": "prefix_tuning[bottleneck_size=800]|par_bn",
    "unipelt": "prefix_tuning[prefix_length=10,use_gating=True]|seq_bn[use_gating=True]|lora[alpha=2,use_gating=True]",
}
OLDER_NAMES = {"pfeiffer+inv": "seq_bn_inv", "houlsby+inv": "double_seq_bn_inv"}
"""Names found in existing configurations."""

JOINING = {"inv_adapter": "invertible"}
"""A field of a method by which the preset of another one asks for it too, as in `seq_bn[inv_adapter=nice]`."""


def spread(name: str, parts: Sequence[Config], values: Mapping[str, Any]) -> tuple[Config, ...]:
    """The parts of a preset, each with those values that are fields of its own.

    Raises `ConfigError` for a value that is a field of none.
    """
    fields = [set(part.to_dict()) for part in parts]
    for key, value in values.items():
        if not any(key in known for known in fields):
            raise ConfigError(
                f"`{name}` has no field `{key}`; got {shown(value)}. {nearest(key, sorted(set().union(*fields)))}"
            )
    return tuple(
        part.replace(**{key: value for key, value in values.items() if key in known})
        for part, known in zip(parts, fields, strict=True)
    )
