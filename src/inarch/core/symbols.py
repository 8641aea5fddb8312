"""Sums of named tensors, just enough algebra to prove what a wiring computes.

An `Expr` is kept in normal form, a sum of terms with whole or rational coefficients; a term is a symbol or a function
applied to an `Expr`. Wiring code written for tensors (`+`, `-`, `*` by a number, calls) runs on it unchanged.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Applied:
    """A function of an expression, such as `LN(x + h)`."""

    function: str
    argument: "Expr"

    def __str__(self) -> str:
        return f"{self.function}({self.argument})"


Term: TypeAlias = str | Applied
Number: TypeAlias = int | Fraction


@dataclass(frozen=True, slots=True)
class Expr:
    """A sum; two expressions are equal when they have the same terms with the same coefficients, in any order."""

    terms: tuple[tuple[Term, Number], ...] = field(default=())

    def __add__(self, other: "Expr") -> "Expr":
        total = dict(self.terms)
        for term, count in other.terms:
            total[term] = total.get(term, 0) + count
        return Expr(tuple((term, count) for term, count in total.items() if count))

    def __mul__(self, factor: Number) -> "Expr":
        return Expr(tuple((term, count * factor) for term, count in self.terms if count * factor))

    def __sub__(self, other: "Expr") -> "Expr":
        return self + other * -1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and dict(self.terms) == dict(other.terms)

    def __hash__(self) -> int:
        return hash(frozenset(self.terms))

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __str__(self) -> str:
        text = ""
        for term, count in sorted(self.terms, key=_reading_order):
            sign = " - " if count < 0 else " + "
            size = f"{abs(count)}·" if isinstance(count, Fraction) and count.denominator != 1 else f"{abs(count)}"
            text += (sign if text else sign.strip(" +")) + (str(term) if abs(count) == 1 else f"{size}{term}")
        return text or "0"

    def __getitem__(self, term: Term) -> Number:
        """The coefficient of a term."""
        return dict(self.terms).get(term, 0)

    def applied(self, function: str) -> "Expr":
        """`function(self)` as an expression."""
        return Expr(((Applied(function, self), 1),))

    def mentions(self, name: str) -> bool:
        """Whether a symbol or a function of that name occurs anywhere."""
        return any(
            term == name if isinstance(term, str) else term.function == name or term.argument.mentions(name)
            for term, _ in self.terms
        )

    def vanish(self, function: str) -> "Expr":
        """The expression with `function` zero everywhere. What is applied to nothing is nothing."""
        total = Expr()
        for term, count in self.terms:
            if isinstance(term, str):
                total += Expr(((term, count),))
            elif term.function != function and (argument := term.argument.vanish(function)):
                total += argument.applied(term.function) * count
        return total


def _reading_order(item: tuple[Term, Number]) -> tuple[bool, bool]:
    """The stream first, then other tensors, then functions."""
    return isinstance(item[0], Applied), item[0] != "x"


def symbol(name: str) -> Expr:
    """A named tensor."""
    return Expr(((name, 1),))
