"""The proof that a wiring keeps the pre-trained function.

At each site the code that runs in the forward is run on symbols (`plan.formula`). With the adapter's branch set to zero
the result must be what the layer computed before: `LN(x + h)` after a post-norm sum, `x + h` everywhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..compose import Setup
from ..core.site import Site
from ..core.symbols import Applied, Expr, Number
from ..methods import AdapterConfig
from ..plan import SCALE, Formula, formula

Verdict = Literal[
    "preserved",
    "skip connection lost",
    "skip connection doubled",
    "branch lost",
    "norm lost",
    "norm applied twice",
    "scale lost",
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
    norms, usual = _norms(found.at_zero), _norms(found.pretrained)
    if norms > usual:
        return "norm applied twice"
    skip = _skips(_inside(found.at_zero))
    if skip != 1:
        return "skip connection lost" if skip < 1 else "skip connection doubled"
    if any(found.pretrained.mentions(branch) and not found.at_zero.mentions(branch) for branch in ("h", "g")):
        return "branch lost"
    return "norm lost" if norms < usual else "scale lost"


def _norms(expression: Expr) -> int:
    """How many norms, the layer's and the adapter's, are nested or stand side by side."""
    return sum(
        (term.function != SCALE) + _norms(term.argument) for term, _ in expression.terms if isinstance(term, Applied)
    )


def _skips(expression: Expr) -> Number:
    """How often the stream is added, scaled as a branch is or not."""
    scaled = [
        count * term.argument["x"]
        for term, count in expression.terms
        if isinstance(term, Applied) and term.function == SCALE
    ]
    return expression["x"] + sum(scaled)


def _inside(expression: Expr) -> Expr:
    """The sum under the outermost norm."""
    if len(expression.terms) == 1 and isinstance(term := expression.terms[0][0], Applied):
        return term.argument
    return expression
