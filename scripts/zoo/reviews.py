"""What a person found, type by type: counts where the oracles are wrong, and types that are refused with the reason."""

from collections.abc import Mapping
from typing import Any

REVIEWED: Mapping[str, Mapping[str, Any]] = {}
REFUSED: Mapping[str, str] = {}
