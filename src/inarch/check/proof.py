"""The proof that a wiring keeps the pre-trained function.

At each site the code that runs in the forward is run on symbols (`plan.formula`). With the adapter's branch set to zero
the result must be what the layer computed before: `LN(x + h)` after a post-norm sum, `x + h` everywhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..compose import Setup
from ..core.site import Site
from ..core.symbols import Applied, Expr
from ..methods import AdapterConfig
from ..plan import Formula, formula

Verdict = Literal[
    "preserved", "skip connection lost", "skip connection doubled", "branch lost", "norm lost", "norm applied twice"
]


@dataclass(frozen=True, slots=True)
class Proof:
    """A formula and what it means."""

    formula: Formula
    verdict: Verdict

    @property
    def sound(self) -> bool:
        """Whether the pre-trained function is kept."""
        return self.verdict == "preserved"


def prove(site: Site, setup: Setup, configs: Mapping[str, AdapterConfig]) -> Proof | None:
    """The proof for one site with these adapters present; None where none of them touches the sum."""
    found = formula(site, setup, configs)
    return None if found is None else Proof(found, verdict(found))


def verdict(found: Formula) -> Verdict:
    """What becomes of the pre-trained function where every adapter branch is zero."""
    if found.at_zero == found.pretrained:
        return "preserved"
    if _norms(found.at_zero) > _norms(found.pretrained):
        return "norm applied twice"
    skip = _inside(found.at_zero)["x"]
    if skip != 1:
        return "skip connection lost" if skip < 1 else "skip connection doubled"
    if not found.at_zero.mentions("h"):
        return "branch lost"
    return "norm lost"


def _norms(expression: Expr) -> int:
    """How many norms, the layer's and the adapter's, are nested or stand side by side."""
    return sum(1 + _norms(term.argument) for term, _ in expression.terms if isinstance(term, Applied))


def _inside(expression: Expr) -> Expr:
    """The sum under the outermost norm."""
    if len(expression.terms) == 1 and isinstance(term := expression.terms[0][0], Applied):
        return term.argument
    return expression
