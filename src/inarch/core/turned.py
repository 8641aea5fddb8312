"""Whether a layer has turned samples and tokens around for a projection, as Longformer does."""

from typing import Any


def is_turned(inputs: Any) -> bool:
    """Whether a tensor (B, L, D) is a view of one that lies as (L, B, D), or the other way round.

    Nothing but its strides tells such a view: a batch of windows may have the same shape.
    """
    return bool(inputs.dim() == 3 and min(inputs.shape[:2]) > 1 and 0 < inputs.stride(0) < inputs.stride(1))
