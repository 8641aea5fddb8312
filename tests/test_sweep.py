"""Studies: what is trained, what is not and why, and that what is cut short goes on."""

import pytest
from little_runs import save_model, save_pictures

from inarch.core.errors import StateError
from inarch.core.records import RunRecord, read_record, read_study
from inarch.sweep.run import run_study
from inarch.sweep.study import StudyConfig
from inarch.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("little_garbage")

RECIPE = Recipe(epochs=2, batch_size=16, device="cpu", augment=False)
ADAPTER = "seq_bn[reduction_factor=4]"
STEPS = 2 * 2  # 22 of 24 pictures, 16 at a time, twice


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model and pictures."""
    root = tmp_path_factory.mktemp("given")
    return save_model(root / "model"), save_pictures(root / "pictures")


@pytest.fixture(scope="module")
def flags(given, tmp_path_factory):
    """A study of three flags, with everything that spares training."""
    vary = {"original_ln_before": "", "original_ln_after": "", "residual_before_ln": "true,false"}
    folder = tmp_path_factory.mktemp("study") / "flags"
    return folder, run_study(StudyConfig(vary=vary, adapter=ADAPTER, pruner="none"), RECIPE, *given, folder)


def test_a_study_trains_neither_what_is_unsound_nor_what_computes_the_same(flags):
    _, record = flags
    outcomes = {tuple(one.values.values()): (one.status, one.decided_by, one.steps) for one in record.trials}
    refused, trained, repeated = ("refused", "check", 0), ("finished", "training", STEPS), ("repeated", "proof", 0)
    assert outcomes == {  # of a pre-norm model, as in section 1.4 of the wiring's table: (before, after, residual)
        (True, True, True): trained,
        (True, True, False): refused,
        (True, False, True): refused,
        (True, False, False): repeated,
        (False, True, True): trained,
        (False, True, False): repeated,
        (False, False, True): refused,
        (False, False, False): refused,
    }
    assert record.status == "finished"
    assert (record.steps, record.steps_in_full) == (2 * STEPS, 8 * STEPS)


def test_a_refused_trial_says_why_and_a_repeated_one_has_the_result_of_its_twin(flags):
    _, record = flags
    lost = record.trials[2]
    assert "unsound-wiring" in lost.reason and "skip connection lost" in lost.reason
    assert lost.verdict.groups[0].adapted == "y = h + A(x + h)"
    twin = record.trials[3]
    assert twin.same_as == 0
    assert twin.value == record.trials[0].value


def test_each_trained_trial_is_a_run_and_the_record_reads_back(flags):
    folder, record = flags
    assert read_study(folder) == record
    run = read_record(folder / record.trials[0].runs[0])
    assert isinstance(run, RunRecord)
    assert run.results["accuracy"] == record.trials[0].value
    assert run.epochs[-1].step == STEPS
    assert (folder / record.trials[0].runs[0] / "adapter").is_dir()
    assert not (folder / record.trials[0].runs[0] / "checkpoints").exists()


def test_the_same_call_goes_on_where_nothing_is_left(flags, given):
    folder, record = flags
    assert run_study(StudyConfig.from_dict(record.job["study"]), RECIPE, *given, folder).trials == record.trials


def test_another_study_in_the_folder_is_refused_with_the_difference(flags, given):
    folder, record = flags
    study = StudyConfig.from_dict(record.job["study"]).replace(seeds=2)
    with pytest.raises(StateError, match="study.seeds 2 instead of 1"):
        run_study(study, RECIPE, *given, folder)
