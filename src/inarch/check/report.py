"""The verdict on a configuration: what every group of equal sites computes, what was measured, and what to change."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..compose import Setup, cases, names
from ..core.errors import ConfigError
from ..core.site import Site, Sites
from ..core.table import render
from ..methods import AdapterConfig, OutOfRange, as_asked, method_of
from ..plan import Plan, check_setup, plan, sublayer_sites
from .facts import Data, Evidence, Facts, Memory, ModelFacts, SiteReport, Stored, Training, place
from .findings import LEVELS, Finding, find
from .proof import Proof, prove
from .rules import reach, settings


@dataclass(frozen=True, slots=True)
class Report:
    """What `inarch.check` found. `sound` says whether every site keeps the pre-trained function."""

    subject: str
    model_class: str
    sites: tuple[SiteReport, ...]
    findings: tuple[Finding, ...]
    plan: Plan
    evidence: Evidence | None = None
    """What one small batch showed; None where nothing was run."""
    memory: Memory | None = None
    """What training takes beside the weights; None where no inputs are known."""
    possible: bool = True
    """Whether there can be such an adapter: the model has its places, and its settings take their numbers."""

    @property
    def num_parameters(self) -> int:
        """The parameters of all adapters."""
        return self.plan.num_parameters

    @property
    def sound(self) -> bool:
        """Whether the pre-trained function is preserved at every site."""
        return self.possible and all(group.proof.sound for group in self.sites)

    @property
    def has_errors(self) -> bool:
        """Whether any finding is an error."""
        return any(finding.level == "error" for finding in self.findings)

    def __str__(self) -> str:
        rows = site_rows(self)
        head = headline(self)
        if not rows and self.possible:
            head += ", no sum of the model is changed"
        tables = ((SITE_HEADERS, rows), (PROJECTION_HEADERS, projection_rows(self)))
        body = [render(headers, found) for headers, found in tables if found]
        lines = [*evidence_lines(self.evidence), *memory_lines(self.memory)]
        return "\n".join((head, *body, *lines, *map(str, self.findings)))


def headline(report: Report) -> str:
    """What was judged, on what."""
    size = f"{report.num_parameters:,} parameters" if report.possible else "there can be no such adapter"
    return f"{report.subject} on {report.model_class}: {size}"


SITE_HEADERS = ("sites", "norm", "pre-trained", "with the adapter", "verdict")


def site_rows(report: Report) -> list[tuple[str, ...]]:
    """A row for each group of equal sites."""
    return [
        (
            group.place,
            group.sites[0].arrangement,
            f"y = {group.proof.formula.pretrained}",
            f"y = {group.proof.formula.adapted}",
            group.proof.verdict,
        )
        for group in report.sites
    ]


_NO_BRANCH = ("prefix", "input")
PROJECTION_HEADERS = ("places", "with the adapter")


def projection_rows(report: Report) -> list[tuple[str, ...]]:
    """A row for the places of equal sites, sums apart, that get the same formula."""
    layers: dict[tuple[str, str, str, str, str], list[Site]] = defaultdict(list)
    for module in report.plan.modules:
        found = module.placement
        if found.port in ("linear", "weight", "parameter", "stream", "prefix", "input"):
            layers[
                module.adapter, found.site.stack, found.site.role, module.formula(), found.role or found.port
            ].append(found.site)
    roles: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    sites: dict[tuple[str, tuple[str, ...]], list[Site]] = {}
    for (adapter, _, _, formula, role), reached in layers.items():
        key = (formula, (adapter, *(site.key for site in reached)))
        roles[key].append(role)
        sites[key] = reached
    return [(f"{', '.join(played)} of {place(tuple(sites[key]))}", key[0]) for key, played in roles.items()]


def soundness(report: Report) -> str:
    """What is so of a sound setup, in words: prefixes, prompts and invertible maps are no branch that could be zero."""
    apart = {module.method: module.config for module in report.plan.modules if module.placement.port in _NO_BRANCH}
    said = []
    if any(module.placement.port not in _NO_BRANCH for module in report.plan.modules):
        said.append("with a zero adapter branch the model computes what it was pre-trained to compute")
    for name, config in apart.items():
        start = "the base" if method_of(config).starts_at_base(config) else "another function than the base"
        said.append(f"`{name}` changes no sum and has no branch that could be zero: it starts as {start}")
    return f"Sound: {'; '.join(said)}."


def evidence_lines(evidence: Evidence | None) -> list[str]:
    """What one batch showed, in words."""
    if evidence is None:
        return []
    growth = ", ".join(f"{stack} {value:.3g}x" for stack, value in evidence.growth.items())
    weights = "at the initial weights" if evidence.is_initial else "by the adapter as it is"
    return [
        f"drift of the output {weights}: {evidence.drift:.2g} of its size",
        f"gradients reach {evidence.reached:.0%} of {len(evidence.gradients)} adapter tensors",
        *([f"the stream after the last layer, over the base's: {growth}"] if growth else []),
    ]


def memory_lines(memory: Memory | None) -> list[str]:
    """What training takes, in words."""
    if memory is None:
        return []
    how = "measured" if memory.is_measured else "estimated"
    batch = "one sample" if memory.samples == 1 else f"a batch of {memory.samples}"
    peak = f"; peak on the device {_size(memory.device_peak)}" if memory.device_peak is not None else ""
    line = (
        f"memory beside the weights, {how}: {_size(memory.activations)} kept for the backward pass of {batch}, "
        f"{_size(memory.optimizer)} of gradients and AdamW moments{peak}"
    )
    return [line]


def _size(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"


def outline(sites: Sites, setup: Setup, configs: Mapping[str, AdapterConfig]) -> Report:
    """The plan of a setup, and its proof at every site of a model: a report to which no rule was applied yet.

    Raises `ConfigError` if a configuration asks for what the model does not have, `SetupError` for a composition that
    cannot run.
    """
    chosen = {name: configs[name] for name in names(setup)}
    planned = plan(sites, chosen)
    check_setup(setup, planned.modules)
    subject = str(chosen[setup]) if isinstance(setup, str) else str(setup)
    return Report(subject, sites.model_class, _groups(sites, setup, chosen, planned), (), planned)


def report(
    sites: Sites,
    setup: Setup,
    configs: Mapping[str, AdapterConfig],
    *,
    model: ModelFacts | None = None,
    training: Training | None = None,
    data: Data | None = None,
    evidence: Evidence | None = None,
    memory: Memory | None = None,
    stored: Stored | None = None,
    out_of_range: tuple[OutOfRange, ...] = (),
) -> Report:
    """Prove a setup of adapters at every site of a model, and apply every rule to what is known.

    Raises as `outline` does.
    """
    known = outline(sites, setup, configs)
    facts = Facts(
        sites=sites,
        setup=setup,
        configs={name: configs[name] for name in names(setup)},
        plan=known.plan,
        groups=known.sites,
        model=model,
        training=training,
        data=data,
        evidence=evidence,
        memory=memory,
        stored=stored,
        out_of_range=out_of_range,
    )
    first = find(facts)
    errors = {finding.code for finding in first if finding.level == "error"}
    findings = [_checked(facts, finding, errors) for finding in first]
    ordered = tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level)))
    if out_of_range:  # what was judged in its place is not what was asked for
        subject = as_asked(next(iter(facts.configs.values())), out_of_range)
        return Report(subject, sites.model_class, (), ordered, Plan((), {}), possible=False)
    return replace(known, findings=ordered, evidence=evidence, memory=memory)


def impossible(sites: Sites, config: AdapterConfig, out_of_range: tuple[OutOfRange, ...] = ()) -> Report | None:
    """The report on a configuration that no adapter of this model can have; None for any other.

    **Arguments**: `config` has other numbers in the place of those that are out of range.
    """
    configs, unplaced = {"adapter": config}, ""
    try:
        plan(sites, configs)
    except ConfigError as error:
        unplaced = str(error)
    if not unplaced:
        return report(sites, "adapter", configs, out_of_range=out_of_range) if out_of_range else None
    facts = Facts(
        sites=sites,
        setup="adapter",
        configs=configs,
        plan=Plan((), {}),
        groups=(),
        unplaced=unplaced,
        out_of_range=out_of_range,
    )
    nowhere = [_checked(facts, finding, {finding.code}) for finding in reach.no_such_place.find(facts)]
    findings = (*settings.out_of_range.find(facts), *nowhere)
    return Report(as_asked(config, out_of_range), sites.model_class, (), findings, facts.plan, possible=False)


def _groups(sites: Sites, setup: Setup, chosen: Mapping[str, AdapterConfig], planned: Plan) -> tuple[SiteReport, ...]:
    touched = sublayer_sites(list(planned.modules))
    groups: dict[tuple[int, tuple[Any, ...], tuple[str, ...]], list[tuple[Site, Proof]]] = {}
    different = cases(setup)
    for site in sites:
        present = {name: config for name, config in chosen.items() if site.key in touched.get(name, ())}
        for number, case in enumerate(different):
            proof = prove(site, case, present)
            if proof is not None:
                groups.setdefault((number, site.signature(), tuple(present)), []).append((site, proof))
    named = [f"case {case!s}" if len(different) > 1 else "" for case in different]
    return tuple(
        SiteReport(tuple(site for site, _ in group), group[0][1], named[key[0]]) for key, group in groups.items()
    )


def _checked(facts: Facts, finding: Finding, errors: set[str]) -> Finding:
    """The finding with those of its fixes that clear it and bring no new error, each tried on the whole."""
    if not finding.fixes or not isinstance(facts.setup, str):
        return finding
    kept = []
    for repair in finding.fixes:
        try:
            config = repair.apply(facts.configs[facts.setup])
            configs = {facts.setup: config}
            planned = plan(facts.sites, configs)
        except ConfigError:
            continue
        # What was measured belongs to the old configuration.
        groups = _groups(facts.sites, facts.setup, configs, planned)
        after = {
            other.code: other.level
            for other in find(
                replace(
                    facts, configs=configs, plan=planned, groups=groups, evidence=None, unplaced="", out_of_range=()
                )
            )
        }
        brings = {code for code, level in after.items() if level == "error"} - errors
        if finding.code not in after and not brings:
            kept.append(repair)
    return replace(finding, fixes=tuple(kept))
