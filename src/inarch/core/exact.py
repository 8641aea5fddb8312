"""Numbers as they are written: 0.1 + 0.2 - 0.3 is zero."""

from collections.abc import Iterable
from fractions import Fraction


def exact(number: float) -> Fraction:
    """The number that was written, not the binary one nearest to it."""
    return Fraction(repr(float(number)))


def exact_sum(numbers: Iterable[float]) -> Fraction:
    """The sum of numbers as they are written. Raises `ValueError` for one that is not finite."""
    return sum(map(exact, numbers), start=Fraction(0))
