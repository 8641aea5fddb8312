"""The proof against measurement: the verdict on symbols is what a model with a zero branch shows."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "scripts" / "docs_validation.py"
SPEC = importlib.util.spec_from_file_location("docs_validation", PATH)
validation = importlib.util.module_from_spec(SPEC)
sys.modules["docs_validation"] = validation
SPEC.loader.exec_module(validation)


@pytest.mark.parametrize("architecture", validation.ARCHITECTURES)
def test_the_proof_agrees_with_the_measured_drift(architecture):
    trials = list(validation.trials(architecture, validation.sample(300)))
    assert len(trials) == 300
    assert [trial for trial in trials if not trial.agrees] == []
    assert {trial.verdict for trial in trials} > {"preserved", "skip connection lost", "norm applied twice"}


def test_a_wrong_proof_would_be_noticed():
    trial = next(validation.trials("vit", ["seq_bn[original_ln_after=False]"]))
    assert trial.verdict == "skip connection lost" and trial.agrees
    assert not replace(trial, verdict="preserved").agrees
    sound = next(validation.trials("vit", ["seq_bn"]))
    assert sound.agrees and not replace(sound, verdict="skip connection doubled").agrees
