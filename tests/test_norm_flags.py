"""The norm-flags study: its page is what its records say, and these say what is proved today."""

import dataclasses

import docs_norm_flags as page
import pytest
import torch
from norm_flags import texts, trials
from norm_flags.analysis import Study, pooled
from norm_flags.cli import LOST, SOUND, combinations, flag_trials, main, practice_trials
from norm_flags.record import Record
from norm_flags.subjects import SUBJECTS
from norm_flags.trials import FIFTHS, HALVES, SEEDS, Judgement, Outcome, Trial, flags_of, judge

STUDIES = {study.backbone: study for study in page.studies()}
FIRST = {study.backbone: study for study in page.studies((None,))}
SECOND = {study.backbone: study for study in page.studies(HALVES)}


def test_the_page_is_what_the_records_say():
    assert page.PAGE.read_text(encoding="utf-8") == page.page()
    assert page.FIGURE.read_bytes().startswith(b"\x89PNG") and f"({page.FIGURE.name})" in page.page()


def test_the_records_are_complete():
    """Each holds every training, and no other."""
    assert STUDIES.keys() == FIRST.keys() == SECOND.keys() == SUBJECTS.keys()
    for name, study in STUDIES.items():
        assert study.seeds == FIRST[name].seeds == SECOND[name].seeds == SEEDS
        assert set(study.record.outcomes) == set(flag_trials(name, study.judgements))
    assert set(practice_trials()) == set(Record.read("practices").outcomes)


@pytest.mark.parametrize("name", STUDIES)
def test_what_was_proved_then_is_proved_now(name):
    assert [judge(name, config) for config in combinations()] == STUDIES[name].judgements


@pytest.mark.parametrize("name", STUDIES)
def test_every_repair_is_one_of_the_eight_and_sound(name):
    study = STUDIES[name]
    assert all(bool(one.fixes) == (one.verdict != "preserved") for one in study.judgements)
    assert {fix for one in study.judgements for fix in one.fixes} <= set(study.sound)


@pytest.mark.parametrize("name", FIRST)
def test_one_formula_is_one_function_whatever_the_flags(name):
    """Bit for bit, through three epochs of training."""
    assert len(list(FIRST[name].twins())) >= 2
    for one, other in FIRST[name].twins():
        for run, again in zip(FIRST[name].runs(one.adapter), FIRST[name].runs(other.adapter), strict=True):
            assert dataclasses.replace(run, trial=again.trial) == again


@pytest.mark.parametrize("folds", [HALVES, FIFTHS])
def test_every_example_is_held_out_once_and_never_trained_on(folds):
    seen, written = [], []
    for fold in folds:
        digits = trials._digits(fold)
        assert len(digits.train) + len(digits.validation) == texts.NUM_ALL
        trained, held_out = ({i.tobytes() for i in part.images} for part in (digits.train, digits.validation))
        assert not trained & held_out  # no two scans are alike
        seen += held_out
        documents, kept = texts.split(fold)
        assert len(documents) + len(kept) == texts.NUM_ALL
        trained, held_out = ({tuple(row) for row in part.words.tolist()} for part in (documents, kept))
        assert not trained & held_out
        written += held_out
        for of_part, of_rest in (
            (torch.tensor(digits.validation.targets), torch.tensor(digits.train.targets)),
            (kept.labels, documents.labels),
        ):
            counts, others = torch.bincount(of_part, minlength=10), torch.bincount(of_rest, minlength=10)
            assert (counts - (counts + others) / len(folds)).abs().max() <= 1
    assert len(seen) == len(set(seen)) == len(written) == len(set(written)) == texts.NUM_ALL


def test_parts_are_one_measurement_of_all_examples():
    """Right answers are counted: 3 of 4 and 2 of 6 are 5 of 10, as are 1 of 4 and 4 of 6."""

    def halves(first, second, loss):
        rows = [(first, 4, 1.0), (second, 6, loss)]
        return [
            Outcome(
                trial=Trial(backbone="vit", adapter=None, seed=0, fold=fold),
                num_held_out=number,
                accuracies=(0.0, right / number),
                losses=(value,),
                training_losses=(),
            )
            for fold, (right, number, value) in zip(HALVES, rows, strict=True)
        ]

    one, other = pooled(halves(3, 2, 2.0)), pooled(halves(1, 4, 2.5))
    assert (one.accuracy, one.num_held_out) == (other.accuracy, other.num_held_out) == (0.5, 10)
    assert (one.losses, other.losses) == ((pytest.approx(1.6),), (pytest.approx(1.9),))


def study_of(accuracies):
    """A study of five configurations with these accuracies, the same for every seed but a list's own."""
    verdicts = ["preserved", "preserved", "skip connection lost", "skip connection doubled", "norm applied twice"]
    judgements, outcomes = [], {}
    for verdict, config, values in zip(verdicts, combinations()[:5], accuracies, strict=True):
        fixes = () if verdict == "preserved" else (combinations()[0],)
        formula = "y" if verdict == "preserved" else verdict
        proved = {"formula": formula, "verdict": verdict, "fixes": fixes}
        judgements.append(Judgement(backbone="vit", adapter=config, parameters=1, **proved))
        for seed in SEEDS:
            trial = Trial(backbone="vit", adapter=config, seed=seed)
            value = values[seed] if isinstance(values, list) else values
            rows = {"accuracies": (0.1, value), "losses": (2.0, 1 - value), "training_losses": (), "num_held_out": 400}
            outcomes[trial] = Outcome(trial=trial, **rows)
    for seed in SEEDS:
        head = Trial(backbone="vit", adapter=None, seed=seed)
        rows = {"accuracies": (0.1, 0.9), "losses": (2.0, 1.0), "training_losses": (), "num_held_out": 400}
        outcomes[head] = Outcome(trial=head, **rows)
    return Study("vit", Record(page.PAGE, judgements, outcomes), (None,))


def agreements(accuracies):
    study = study_of(accuracies)
    return [study.agrees(one) for one in study.judgements]


def test_the_criteria_can_fail():
    assert agreements([0.97, 0.95, 0.79, 0.96, 0.96]) == [True] * 5
    assert agreements([0.97, 0.93, 0.70, 0.96, 0.96])[:2] == [True, False]  # 4 points apart
    assert not agreements([0.97, 0.97, 0.83, 0.96, 0.96])[2]  # 14 points behind
    assert not agreements([0.97, 0.97, 0.70, [0.9, 0.9, 0.97], 0.96])[3]  # not behind in one seed
    assert not agreements([0.97, 0.97, 0.70, 0.96, [0.9, 0.98, 0.9]])[4]


def test_twins_that_differ_are_told():
    same, apart = study_of([0.97, 0.97, 0.7, 0.9, 0.9]), study_of([0.97, 0.95, 0.7, 0.9, 0.9])
    assert same.twin_difference() == (0, 0)
    assert apart.twin_difference() == pytest.approx((2, 0.02))


def test_flags_are_read_back():
    assert flags_of(SOUND) == (True, True, True) and flags_of(LOST) == (True, False, True)
    assert len({flags_of(config) for config in combinations()}) == 8


@pytest.fixture
def one_thread():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.mark.usefixtures("one_thread")
def test_a_training_is_recorded_and_not_repeated(monkeypatch, tmp_path, capsys):
    """A few made documents: the loss falls, all is written down, and a second call has nothing to do."""
    monkeypatch.setattr(texts, "NUM_TRAINING", 128)
    monkeypatch.setattr(texts, "NUM_HELD_OUT", 100)
    options = ["bert", "--folder", str(tmp_path)]
    main([*options, "--limit", "1"])
    (outcome,) = Record.read("bert", tmp_path).outcomes.values()
    assert outcome.trial == Trial(backbone="bert", adapter=SOUND, seed=0)
    assert [len(row) for row in (outcome.accuracies, outcome.losses, outcome.training_losses)] == [4, 4, 3]
    assert outcome.losses[-1] < outcome.losses[0] and f"{outcome.accuracy:.4f}" in capsys.readouterr().out
    before = (tmp_path / "bert.json").read_bytes()
    main([*options, "--limit", "0"])
    assert (tmp_path / "bert.json").read_bytes() == before
