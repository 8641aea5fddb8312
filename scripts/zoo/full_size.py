"""The default, full-size configuration of a type, probed on the meta device: no weights, hardly any memory."""

import time
from collections import Counter
from typing import Any

import torch

from inarch.sites import probe_now

from .build import default_config, model_class
from .describe import lines
from .factories import FACTORIES


def full_size(model_type: str) -> dict[str, Any]:
    """The record of one type: sites and layers as the probe finds them, or why it does not."""
    record: dict[str, Any] = {"type": model_type, "verdict": "fails", "stage": "build", "sites": 0, "reason": ""}
    start = time.monotonic()
    try:
        chosen, config = model_class(model_type), default_config(model_type)
        with torch.device("meta"):
            model = chosen(config).eval()
        record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        record["stage"] = "probe"
        factory = FACTORIES.get(model_type)
        sites = probe_now(model, example_inputs=None if factory is None else dict(factory(model).kwargs))
        record |= {
            "verdict": "adapts",
            "stage": "",
            "sites": len(sites),
            "layers": sites.num_layers,
            "kinds": dict(Counter(site.kind for site in sites)),
            "arrangements": sorted({site.arrangement for site in sites}),
            "refused": list(sites.refused),
            "layout": lines(sites),
        }
    except Exception as error:  # noqa: BLE001  whatever goes wrong is the reason
        record["reason"] = f"{type(error).__name__}: {str(error)[:600]}"
    record["seconds"] = round(time.monotonic() - start, 2)
    return record
