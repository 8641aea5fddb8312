"""Settings of single model types, where the rules of `shrink` are not enough: data, with the reason beside it.

A key is a setting of the configuration, or of a part of it: `text_config.hidden_size`.
"""

from collections.abc import Mapping
from typing import Any

CONFIGS: Mapping[str, Mapping[str, Any]] = {}
