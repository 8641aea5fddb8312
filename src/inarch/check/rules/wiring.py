"""Rules about how an adapter meets the layer's sum."""

from collections.abc import Iterator

from ...plan import sublayer_part
from ..facts import Facts, SiteReport, places
from ..findings import Finding, rule
from ..repair import Repair, wiring_repairs

_SCALED_REASONS = {
    "skip connection lost": "the stream x is taken out again, at the scale that the layer gives its branch",
    "skip connection doubled": "the stream x is added again, at the scale that the layer gives its branch",
}
"""Where the layer scales what the adapter hands it."""

_REASONS = {
    "skip connection lost": "the stream x does not reach the next layer, so everything below this site is lost",
    "skip connection doubled": "the stream x is added twice, so it doubles at every layer",
    "branch lost": "the layer goes on without what one of its branches computes",
    "scale lost": "the branch is added without the scale that the layer gives it",
    "norm lost": "the layer's own norm is skipped, so the next layer receives values it never saw",
    "norm applied twice": "the stream passes one norm more than it was trained with",
}


@rule("unsound-wiring", "error")
def unsound_wiring(facts: Facts) -> Iterator[Finding]:
    """With a zero adapter branch the site no longer computes what it was pre-trained to compute.

    The function that runs in the forward pass is run on symbols, the adapter's branch A is set to zero, and the result
    is compared with the layer's own sum. Training starts from a broken model then, shows no error and, where the skip
    connection is lost, does not converge. On a pre-norm model such as ViT, `original_ln_after=False` with
    `residual_before_ln=True` is such a case: `y = h + A(x + h)` has no `x` of its own.
    """
    alike: dict[tuple[str, tuple[Repair, ...]], list[SiteReport]] = {}
    for group in facts.groups:
        if not group.proof.sound:
            alike.setdefault((_message(group), _repairs(facts, group)), []).append(group)
    for (message, found), groups in alike.items():
        yield Finding("unsound-wiring", "error", places(groups), message, found, _compared(found))


def _message(group: SiteReport) -> str:
    proof = group.proof
    is_scaled = group.sites[0].post_norm is None and not group.sites[0].exact
    reason = (is_scaled and _SCALED_REASONS.get(proof.verdict)) or _REASONS[proof.verdict]
    formula = proof.formula
    becomes = f"with a zero adapter branch `y = {formula.adapted}` becomes `y = {formula.at_zero}`"
    if str(formula.adapted) == str(formula.at_zero):  # there is no branch in it
        becomes = f"with the adapter the site computes `y = {formula.at_zero}`"
    return f"{proof.verdict}; {becomes}, the base model computes `y = {formula.pretrained}`: {reason}"


def _repairs(facts: Facts, group: SiteReport) -> tuple[Repair, ...]:
    """Of a composition none: which of its adapters to change is the user's choice."""
    config = facts.configs[facts.setup] if isinstance(facts.setup, str) else None
    part = sublayer_part(config, group.sites[0]) if config is not None else None
    if config is None or part is None:
        return ()
    return tuple(
        wiring_repairs([one.sites[0] for one in facts.groups if sublayer_part(config, one.sites[0]) == part], part)
    )


def _compared(found: tuple[Repair, ...]) -> str:
    """Whether repairs that are equally small do the same."""
    if len(found) < 2:
        return ""
    formulas = dict.fromkeys(repair.formula for repair in found)
    if len(formulas) == 1:
        return f"They compute the same function, `y = {next(iter(formulas))}`."
    listed = "; ".join(f"`{repair}` gives `y = {repair.formula}`" for repair in found)
    return f"Each is sound, and they are different functions: {listed}."
