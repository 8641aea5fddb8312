"""What to do where an adapter's base, or what it was trained with, is not what it will be used with."""

import logging

from ..core.errors import StateError

logger = logging.getLogger(__name__)


def consent(
    difference: str, remedy: str, folder: object, other_base: str, *, where: str = "the change is wanted"
) -> str:
    """`difference` as it is, where that is taken: without a word (`tell`), or with a warning (`allow`).

    Raises `StateError` for `refuse`; `remedy` says what to do instead, and `where` when it may be allowed.
    """
    if other_base == "refuse":
        raise StateError(f'{difference[0].upper()}{difference[1:]}. {remedy}, or pass `other_base="allow"` if {where}.')
    if other_base == "allow":
        logger.warning("Loading %s although %s.", folder, difference)
    return difference
