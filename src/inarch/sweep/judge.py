"""What is known of a configuration before it is trained: the verdict of the checker, and which others are the same."""

import contextlib
import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

from ..check import Report, Training
from ..core.config import Config
from ..core.errors import ConfigError
from ..core.records import SiteRecord, VerdictRecord
from ..data.examples import ImageData
from ..handle import Adapters, attach
from ..methods import AdapterConfig, SublayerMethod, method_of
from ..train.folder import NEUTRAL
from ..train.known import known_data, sample_batch
from ..train.ledger import describe_model, describe_sites, describe_verdict
from ..train.models import load_model, load_processor
from ..train.recipe import Recipe

logger = logging.getLogger(__name__)

WIRED = ("original_ln_before", "original_ln_after", "residual_before_ln", "adapter_residual_before_ln")
"""Fields that decide a formula and nothing else: where two configurations have the same formulas, these may differ."""

NUM_IMAGES = 8
"""Of the batch that shows which tensors are dead."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is known of one configuration."""

    verdict: VerdictRecord | None
    parameters: int | None
    refusal: str
    """Why it is not trained; empty where it is."""
    signature: str
    """Equal for configurations that are proved to compute the same, and are trained alike."""
    sites: tuple[SiteRecord, ...]
    """The model's sites with what is grafted there."""


class Bench:
    """The model that configurations are judged on, without any of them being trained."""

    def __init__(
        self, model: str, images: ImageData, *, allow_unsound: bool, search: tuple[float, float] | None = None
    ) -> None:
        """**Arguments**: `search` is the lowest and the highest learning rate of the study, where it varies that."""
        self.allow_unsound, self.search = allow_unsound, search
        network = load_model(model, images.labels, task=images.task)
        self.handle: Adapters = attach(network)
        self.model = describe_model(model, network, None)
        processor = load_processor(model)
        self.batch = sample_batch(images.train, processor, NUM_IMAGES)
        self.data = known_data(sample_batch(images.train, processor), processor, images.labels)

    def warn(self, config: AdapterConfig, recipe: Recipe) -> None:
        """Say what is wrong with the study as a whole, whatever configuration it tries."""
        with contextlib.suppress(ConfigError):  # the study is told of its trials one by one
            report = self.handle.check(config, training=self._training(recipe), measure=False)
            for finding in report.findings:
                if finding.code == "small-rate":
                    logger.warning("%s", finding)

    def _training(self, recipe: Recipe) -> Training:
        return Training(learning_rate=recipe.rate("adapter"), search=self.search)

    def judge(self, config: AdapterConfig, recipe: Recipe) -> Judgement:
        """Prove it, and run one small batch."""
        training = self._training(recipe)
        inputs = {"pixel_values": self.batch["pixel_values"]}
        try:
            report = self.handle.check(config, example_inputs=inputs, training=training, data=self.data)
        except ConfigError as error:
            return Judgement(None, None, str(error), "", ())
        errors = [
            finding
            for finding in report.findings
            if finding.level == "error" and not (self.allow_unsound and finding.code == "unsound-wiring")
        ]
        refusal = "; ".join(f"{one.code} at {one.place}: {one.message}" for one in errors)
        return Judgement(
            verdict=describe_verdict(report),
            parameters=report.num_parameters,
            refusal=refusal,
            signature=_signature(report, config, recipe),
            sites=describe_sites(self.handle.sites, report),
        )


def _signature(report: Report, config: AdapterConfig, recipe: Recipe) -> str:
    """The formula at every site, with all that is not in the formulas."""
    formulas = {site.key: str(group.proof.formula.adapted) for group in report.sites for site in group.sites}
    neutral = {name.removeprefix("recipe.") for name in NEUTRAL}
    rest = {key: value for key, value in recipe.to_dict().items() if key not in neutral}
    rest["learning_rate"] = recipe.rate("adapter")
    data: dict[str, Any] = {"formulas": formulas, "methods": [_unwired(part) for part in config.parts], "recipe": rest}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _unwired(part: Config) -> dict[str, Any]:
    method = method_of(part)
    dropped = WIRED if issubclass(method, SublayerMethod) else ()
    return {"method": method.name, **{key: value for key, value in part.to_dict().items() if key not in dropped}}
