"""The verdict on a configuration: what every group of equal sites computes, and what to change."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..compose import Setup, check_runnable, names
from ..core.site import Site, Sites
from ..core.table import ranges, render
from ..methods import AdapterConfig
from ..plan import plan, sublayer_part, sublayer_sites
from .proof import Proof, fixes, prove

_REASONS = {
    "skip connection lost": "the stream x does not reach the next layer, so everything below this site is lost",
    "skip connection doubled": "the stream x is added twice, so it doubles at every layer",
    "norm lost": "the layer's own norm is skipped, so the next layer receives values it never saw",
    "norm applied twice": "the stream passes one norm more than it was trained with",
}


@dataclass(frozen=True, slots=True)
class SiteReport:
    """Equal sites, and the one proof that holds for all of them."""

    sites: tuple[Site, ...]
    proof: Proof

    @property
    def place(self) -> str:
        """The sites in words: stack, role and layers."""
        first = self.sites[0]
        return f"{first.stack} {first.role}, layers {ranges([site.layer for site in self.sites])}"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that will go wrong in training, and how to mend it."""

    code: str
    level: str
    place: str
    message: str
    fixes: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.level} {self.code} at {self.place}: {self.message}."
        return text + (f" Set {' or '.join(f'`{fix}`' for fix in self.fixes)}." if self.fixes else "")


@dataclass(frozen=True, slots=True)
class Report:
    """What `inarch.check` found. `sound` says whether every site keeps the pre-trained function."""

    subject: str
    model_class: str
    sites: tuple[SiteReport, ...]
    findings: tuple[Finding, ...]
    num_parameters: int

    @property
    def sound(self) -> bool:
        """Whether the pre-trained function is preserved at every site."""
        return all(group.proof.sound for group in self.sites)

    def __str__(self) -> str:
        rows = [
            (
                group.place,
                group.sites[0].arrangement,
                f"y = {group.proof.formula.pretrained}",
                f"y = {group.proof.formula.adapted}",
                group.proof.verdict,
            )
            for group in self.sites
        ]
        head = f"{self.subject} on {self.model_class}: {self.num_parameters:,} parameters"
        body = render(("sites", "norm", "pre-trained", "with the adapter", "verdict"), rows) if rows else ""
        if not rows:
            head += ", no sum of the model is changed"
        return "\n".join(part for part in (head, body, *map(str, self.findings)) if part)


def report(sites: Sites, setup: Setup, configs: Mapping[str, AdapterConfig]) -> Report:
    """Prove a setup of adapters at every site of a model.

    Raises `ConfigError` if a configuration asks for what the model does not have, `SetupError` for a composition that
    cannot run.
    """
    check_runnable(setup)
    chosen = {name: configs[name] for name in names(setup)}
    planned = plan(sites, chosen)
    touched = sublayer_sites(list(planned.modules))
    groups: dict[tuple[object, ...], list[tuple[Site, Proof]]] = {}
    for site in sites:
        present = {name: config for name, config in chosen.items() if site.key in touched.get(name, ())}
        proof = prove(site, setup, present)
        if proof is not None:
            groups.setdefault((site.signature(), tuple(present)), []).append((site, proof))
    reports = tuple(SiteReport(tuple(site for site, _ in group), group[0][1]) for group in groups.values())
    findings = tuple(_finding(group, chosen, setup) for group in reports if not group.proof.sound)
    subject = str(chosen[setup]) if isinstance(setup, str) else str(setup)
    return Report(subject, sites.model_class, reports, findings, planned.num_parameters)


def _finding(group: SiteReport, configs: Mapping[str, AdapterConfig], setup: Setup) -> Finding:
    proof = group.proof
    message = (
        f"{proof.verdict}; with a zero adapter branch `y = {proof.formula.adapted}` becomes "
        f"`y = {proof.formula.at_zero}`, the base model computes `y = {proof.formula.pretrained}`: "
        f"{_REASONS[proof.verdict]}"
    )
    parts = [part for config in configs.values() if (part := sublayer_part(config)) is not None]
    # Which adapter of a composition to change is the user's choice; a single one has a smallest repair.
    changes = fixes(group.sites[0], parts[0]) if isinstance(setup, str) else []
    texts = tuple(", ".join(f"{key}={value!r}" for key, value in change.items()) for change in changes)
    return Finding("unsound-wiring", "error", group.place, message, texts)
