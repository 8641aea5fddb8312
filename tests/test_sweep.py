"""Studies: what is trained, what is not and why, and that what is cut short goes on."""

import contextlib
import importlib
import json
import math
import multiprocessing
import re
import shlex
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from little_cifar import archive, cifar100
from little_runs import save_model, save_pictures
from throwaway_postgres import find_programs, serve

from inarch.cli import main
from inarch.cli.sweep import _plan
from inarch.core.errors import InarchError, StateError
from inarch.core.records import RunRecord, SeedsRecord, TrialRecord, read_record, read_study
from inarch.methods import read_config
from inarch.sweep.pruning import Hyperband
from inarch.sweep.run import run_study, sampler_of
from inarch.sweep.space import Space
from inarch.sweep.storage import MOST_DEATHS, Board, Claim, Taken, storage_url
from inarch.sweep.study import StudyConfig
from inarch.sweep.trial import Ahead, Audience, Trials
from inarch.train.recipe import Recipe

needs_postgres = pytest.mark.skipif(
    find_programs() is None, reason="no PostgreSQL server: `make venv` installs one, or `apt-get install postgresql`"
)
pytestmark = pytest.mark.usefixtures("little_garbage")

RECIPE = Recipe(epochs=2, batch_size=16, device="cpu", augment=False)
HOST = socket.gethostname()
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
    assert [(site.adapted, site.verdict) for site in lost.sites if site.modules] == [
        ("y = h + A(x + h)", "skip connection lost")
    ]
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


def test_without_a_check_the_unsound_is_trained_and_what_cannot_be_made_holds_nothing_up(given, tmp_path):
    vary = {"adapter": [f"{ADAPTER[:-1]},leave_out=[7]]", f"{ADAPTER[:-1]},original_ln_after=False]"]}
    study = StudyConfig(vary=vary, pruner="none", check=False)
    nowhere, unsound = run_study(study, RECIPE.replace(epochs=1), *given, tmp_path / "study").trials
    assert nowhere.status == "refused" and "leave_out" in nowhere.reason
    assert unsound.status == "finished" and not unsound.verdict.sound


def test_the_same_call_goes_on_where_nothing_is_left(flags, given):
    folder, record = flags
    assert run_study(StudyConfig.from_dict(record.job["study"]), RECIPE, *given, folder).trials == record.trials


def test_another_study_in_the_folder_is_refused_with_the_difference(flags, given):
    folder, record = flags
    study = StudyConfig.from_dict(record.job["study"]).replace(seeds=2)
    with pytest.raises(StateError, match="study.seeds 2 instead of 1"):
        run_study(study, RECIPE, *given, folder)


def test_what_no_model_can_be_trained_with_ends_one_trial_and_no_study(given, tmp_path, monkeypatch):
    """As an error of torch that every attempt would meet again; but not one of the disk."""
    train = Trials._train_seed

    def sometimes(self, watch, place, config, recipe):
        if recipe.learning_rate == 1e-3:
            raise errors.pop()
        return train(self, watch, place, config, recipe)

    monkeypatch.setattr(Trials, "_train_seed", sometimes)
    errors = [TypeError("no such thing\nas this")]
    record = run_study(study_of(1e-3, 1e-2), RECIPE, *given, tmp_path / "study")
    assert [one.status for one in record.trials] == ["failed", "finished"]
    assert record.trials[0].reason == "TypeError: no such thing"
    assert record.best == 1
    errors = [OSError("no room")]
    with pytest.raises(OSError, match="no room"):
        run_study(study_of(1e-3), RECIPE, *given, tmp_path / "full")
    assert read_study(tmp_path / "full").trials[0].status == "waiting"


def test_a_study_of_rates_that_are_all_too_low_is_told_so_and_one_with_low_ones_is_not(given, tmp_path, caplog):
    wide = study_of(2e-5, 1e-2)
    low = wide.replace(vary={"learning_rate": "1e-6..2e-5:log"}, sampler="random", trials=1)
    run_study(wide, RECIPE.replace(epochs=1), *given, tmp_path / "wide")
    assert "small-rate" not in caplog.text
    record = run_study(low, RECIPE.replace(epochs=1), *given, tmp_path / "low")
    assert "a study of learning rates from 1e-06 to 2e-05" in caplog.text
    assert "adapters want about 50 times more. Search from 0.0001 to 0.01." in caplog.text
    assert "small-rate" in record.trials[0].verdict.findings[0]


def test_a_trial_waits_for_its_like_that_another_worker_trains(given, tmp_path):
    """It is put back, passed over meanwhile, and has the result in the end."""
    adapter = f"{ADAPTER[:-1]},original_ln_before=False,original_ln_after=True]"
    study = StudyConfig(vary={"residual_before_ln": "true,false"}, adapter=adapter, pruner="none")
    seen = []

    class Second(Audience):
        """Another worker, which finds nothing to do."""

        def judged(self, trial):
            raise AssertionError("trained twice")

        def wait(self, running):
            seen.append(running)
            raise KeyboardInterrupt

    class First(Audience):
        def judged(self, trial):
            seen.append(trial.number)
            with pytest.raises(KeyboardInterrupt):
                run_study(study, RECIPE, *given, tmp_path / "study", audience=Second())

    record = run_study(study, RECIPE, *given, tmp_path / "study", audience=First())
    assert seen == [0, 1]  # one begun, and one running while the other worker waited
    assert [(one.status, one.same_as) for one in record.trials] == [("finished", None), ("repeated", 0)]
    assert (record.steps, record.trials[1].attempts) == (STEPS, 2)


# What is cut short


def no_sampler(index):
    """For trials whose values are not asked for."""


def study_of(*rates, **others):
    return StudyConfig(vary={"learning_rate": list(rates)}, adapter=ADAPTER, pruner="none", **others)


LONG = RECIPE.replace(epochs=12)
LONG_STEPS = 2 * 12


def command(given, folder, study, recipe, *flags):
    """The command line of a study."""
    model, data = given
    rates = ",".join(map(str, study.vary["learning_rate"]))
    words = {"model": model, "data": data, "output": folder, "adapter": study.adapter, "vary": f"learning_rate={rates}"}
    words |= {"pruner": study.pruner, "epochs": recipe.epochs, "batch-size": recipe.batch_size, "device": "cpu"}
    return ["sweep", *(str(word) for key, value in words.items() for word in (f"--{key}", value)), "--no-augment",
            "--no-stop-early", "--quiet", *flags]  # fmt: skip


def worker(words):
    """A process that runs a command. It is forked from one that has imported what takes long to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inarch.sweep.run"])
    process = context.Process(target=main, args=(words,))
    process.start()
    return process


def await_running(board, process):
    """Wait until a trial of a worker has been trained for two epochs; its number."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.is_alive()
        with contextlib.suppress(KeyError):  # there is no study yet
            for trial in board.records():
                if trial.status == "running" and len(trial.curve) > 1 and trial.worker == f"{HOST}:{process.pid}":
                    return trial.number
        time.sleep(0.02)
    raise AssertionError("no trial is trained")


def test_a_worker_that_is_killed_leaves_a_study_that_goes_on_where_it_was(given, tmp_path):
    folder, study = tmp_path / "study", study_of(1e-3, 1e-2)
    killed = worker(command(given, folder, study, LONG))
    folder.mkdir()
    board = Board(storage_url(None, folder), "study", grace=60)
    number = await_running(board, killed)
    killed.kill()
    killed.join()
    cut = read_record(folder / f"trials/000{number}")
    assert cut.status == "running" and 0 < cut.epochs[-1].step < LONG_STEPS
    record = run_study(study, LONG, *given, folder)
    assert [(one.status, one.value is not None) for one in record.trials] == [("finished", True)] * 2
    assert [one.attempts for one in record.trials] == [2, 1] if number == 0 else [1, 2]
    # Gone on with, and not begun again: what was trained twice, or not told before the end, is an epoch or two.
    assert abs(record.steps - 2 * LONG_STEPS) <= 4
    whole = read_record(folder / "trials/0000")
    assert [epoch.step for epoch in whole.epochs] == list(range(0, LONG_STEPS + 1, 2))
    board.close()


@needs_postgres
def test_of_two_workers_on_one_database_one_is_killed_and_the_other_does_its_work(given, tmp_path):
    study = study_of(1e-3, 1e-2)
    with serve() as url:
        flags = ("--storage", url, "--name", "shared", "--grace", "60")
        places = [tmp_path / "one", tmp_path / "two"]  # as on two machines: they share nothing but the database
        workers = [worker(command(given, place, study, LONG, *flags)) for place in places]
        board = Board(storage_url(url, tmp_path), "shared", grace=60)
        number = await_running(board, workers[0])
        workers[0].kill()
        workers[0].join()
        workers[1].join(timeout=200)
        assert workers[1].exitcode == 0
        tried = [trial.user_attrs["index"] for trial in board._load().get_trials(deepcopy=False)]
        board.close()
    assert sorted(tried) == sorted([0, 1, number])  # the cut one twice, and nothing else
    record = read_study(places[1])
    assert [one.status for one in record.trials] == ["finished"] * 2
    assert [one.attempts for one in record.trials] == [1 + (one.number == number) for one in record.trials]
    assert {one.worker for one in record.trials if one.number == number} == {f"{HOST}:{workers[1].pid}"}
    for trial in record.trials:
        trained_by_the_other = trial.worker != f"{HOST}:{workers[1].pid}"
        assert (places[0 if trained_by_the_other else 1] / trial.runs[0] / "adapter").is_dir()
        # Of the attempt that was cut, what it had reported counts as spent.
        assert trial.steps == LONG_STEPS or (trial.number == number and LONG_STEPS < trial.steps < 2 * LONG_STEPS)


@needs_postgres
def test_a_claim_that_is_given_back_is_queued_once_though_another_worker_looks_meanwhile(tmp_path, monkeypatch):
    """On a database: between the end of a claim and the new place in the queue it looks like one that was lost."""
    with serve() as url, contextlib.ExitStack() as boards:
        one, two = (Board(storage_url(url, tmp_path), "shared", grace=60) for _ in range(2))
        for board in (one, two):
            boards.callback(board.close)
        one.create({}, [{}])
        claim = one.claim(no_sampler)
        looks = threading.Thread(target=two.bury)
        queue_again = one._queue_again

        def late(trial, *, died):
            looks.start()
            looks.join(timeout=1)
            queue_again(trial, died=died)

        monkeypatch.setattr(one, "_queue_again", late)
        claim.release()
        looks.join()
        states = [trial.state.name for trial in one._load().get_trials(deepcopy=False)]
    assert states == ["FAIL", "WAITING"]


def test_a_worker_that_gives_no_sign_of_life_for_too_long_loses_its_trial(tmp_path, monkeypatch):
    url = storage_url(None, tmp_path)
    far = Board(url, "study", grace=2)
    far.worker = "elsewhere/0:1:1"  # a machine whose processes cannot be looked at from here
    far.create({}, [{}])
    lost = far.claim(no_sampler)
    lost.spend(7, 2.5)
    lost.report(0.5, 1)
    near = Board(url, "study", grace=2)
    assert near.claim(no_sampler) is None
    assert not near.is_over()
    time.sleep(3.5)  # longer than the grace in whole seconds, as SQLite counts
    found = near.claim(no_sampler)
    assert found.index == 0
    with pytest.raises(Taken):
        lost.report(0.6, 2)
    with pytest.raises(Taken):
        lost.finish(TrialRecord(number=0, status="finished", value=0.9))
    found.finish(TrialRecord(number=0, status="finished", value=0.7, steps=4, seconds=1.5))
    (record,) = near.records()
    assert (record.value, record.steps, record.seconds, record.attempts) == (0.7, 7 + 4, 2.5 + 1.5, 2)
    assert near.is_over()


def test_a_configuration_that_takes_its_workers_with_it_is_given_up(tmp_path):
    board = Board(storage_url(None, tmp_path), "study", grace=60)
    board.create({}, [{}, {}])
    for _ in range(MOST_DEATHS):
        board.worker = f"{board.worker.rpartition(':')[0]}:another birth"
        assert board.claim(no_sampler).index == 0
    assert board.claim(no_sampler).index == 1
    record = board.records()[0]
    assert (record.status, record.decided_by) == ("failed", "worker")
    assert record.reason == "3 workers died over it"


def test_ctrl_c_leaves_a_study_that_says_so_and_goes_on(given, tmp_path):
    class Impatient(Audience):
        def step(self, trial, seed, done, total, value):
            if trial.number == 1:
                raise KeyboardInterrupt

    folder, study = tmp_path / "study", study_of(1e-3, 1e-2)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, RECIPE, *given, folder, audience=Impatient())
    record = read_study(folder)
    assert record.status == "interrupted"
    assert [one.status for one in record.trials] == ["finished", "waiting"]
    record = run_study(study, RECIPE, *given, folder)
    assert [(one.status, one.attempts) for one in record.trials] == [("finished", 1), ("finished", 2)]


# Giving up


def test_hyperband_goes_on_with_one_in_three_of_a_bracket(tmp_path):
    board = Board(storage_url(None, tmp_path), "study", grace=60)
    board.create({}, [{} for _ in range(24)])
    pruner = Hyperband(board, first_look=1, factor=3, max_epochs=3)
    assert pruner.shares == [3, 2]  # epochs alike: three trials end after 1 epoch or have 3, two have 3
    seen = []
    for number in range(24):
        claim = board.claim(no_sampler)
        value = number * 7 % 24 / 24
        claim.report(value, 1)
        first = pruner.bracket(number) == 0
        # Successive halving by its definition: on goes who is among the best third of those who came so far.
        seen += [value] if first else []
        best = sorted(seen, reverse=True)[: max(1, len(seen) // 3)]
        assert pruner.gives_up(claim) == (first and value not in best)
        claim.finish(TrialRecord(number=number, status="finished", value=value))
    assert 8 < len(seen) < 20


def test_a_trial_that_is_given_up_says_so_and_so_do_the_steps(given, tmp_path, monkeypatch):
    monkeypatch.setattr(Hyperband, "gives_up", lambda _, claim: claim.index == 0)
    study = study_of(1e-3, 1e-2, seeds=1).replace(pruner="hyperband")
    record = run_study(study, RECIPE, *given, tmp_path / "study")
    behind, best = record.trials
    assert (behind.status, behind.decided_by, behind.steps) == ("pruned", "hyperband", STEPS // 2)
    assert behind.reason == f"behind other trials at epoch 1, with accuracy {behind.value:.4f}"
    run = read_record(tmp_path / "study" / behind.runs[0])
    assert (run.status, len(run.epochs)) == ("stopped", 2)
    assert (best.status, record.best) == ("finished", 1)
    assert (record.steps, record.steps_in_full) == (STEPS // 2 + STEPS, 2 * STEPS)


def test_a_trial_whose_worker_ends_as_it_is_given_up_is_given_up_all_the_same(given, tmp_path, monkeypatch):
    def interrupted(claim, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(Hyperband, "gives_up", lambda _, claim: claim.index == 0)
    study = study_of(1e-3).replace(pruner="hyperband")
    with monkeypatch.context() as patch:
        patch.setattr(Claim, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, RECIPE, *given, tmp_path / "study")
    record = run_study(study, RECIPE, *given, tmp_path / "study")
    assert (record.trials[0].status, record.trials[0].decided_by, record.best) == ("pruned", "hyperband", None)


def test_the_monitor_stops_what_stalls(given, tmp_path):
    recipe = RECIPE.replace(epochs=10, stop_early=True)
    record = run_study(study_of(1e-7, 1e-2), recipe, *given, tmp_path / "study")
    stalled, learning = record.trials
    assert (stalled.status, stalled.decided_by) == ("stopped", "monitor")
    assert stalled.steps < 20
    assert (learning.status, learning.steps) == ("finished", 20)


def test_several_seeds_are_one_trial_with_a_mean(given, tmp_path):
    (trial,) = run_study(study_of(1e-2, seeds=2), RECIPE, *given, tmp_path / "study").trials
    runs = read_record(tmp_path / "study" / trial.runs[0])
    assert isinstance(runs, SeedsRecord) and runs.status == "finished"
    values = [run.results["accuracy"] for run in runs.runs]
    assert list(trial.seeds) == ["0", "1"] and list(trial.seeds.values()) == values
    assert trial.value == pytest.approx(sum(values) / 2)
    assert trial.std == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert trial.steps == 2 * STEPS


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sampler_draws_the_same_for_the_same_seed_and_tpe_finds_the_best(tmp_path, sampler):
    vary = {"learning_rate": "1e-5..1e-1:log", "reduction_factor": "2,4", "adapter": "seq_bn,lora", "r": "1..4"}
    study = StudyConfig(vary=vary, sampler=sampler, trials=22)
    space = Space.of(vary, read_config("seq_bn"), RECIPE)

    def rates(name, number):
        board = Board(storage_url(None, tmp_path), name, grace=60)
        board.create({}, [{} for _ in range(22)])
        found = []
        for _ in range(number):
            claim = board.claim(partial(sampler_of, study))
            values = space.assign(lambda dimension: dimension.suggest(claim.trial))  # noqa: B023  called at once
            assert ("r" in values) == (values["adapter"] == "lora") != ("reduction_factor" in values)
            found.append(values["learning_rate"])
            far = abs(math.log10(found[-1]) + 3)  # best at 1e-3
            claim.finish(TrialRecord(number=claim.index, status="finished", value=1 - far / 4))
        return found

    drawn = rates("one", 22 if sampler == "tpe" else 6)
    assert all(1e-5 <= rate <= 1e-1 for rate in drawn)
    assert rates("two", 6) == drawn[:6]
    assert sampler == "random" or sum(1e-4 < rate < 1e-2 for rate in drawn[10:]) > 8  # by chance half of 12


# The command line


@pytest.fixture
def sweep(given, tmp_path, capsys):
    """Run `inarch sweep` on a short study; gives exit code, output and messages."""

    def run(*flags, **changes):
        model, data = given
        words = {"model": model, "data": data, "output": tmp_path / "study", "adapter": ADAPTER, "device": "cpu"}
        words |= {"epochs": 1, "batch-size": 16} | changes
        with pytest.raises(SystemExit) as left:
            main(["sweep", *(str(w) for k, v in words.items() if v is not None for w in (f"--{k}", v)), *flags])
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    return run


def test_the_table_says_which_did_what(sweep, tmp_path):
    flags = ("--vary", "original_ln_after", "--vary", "residual_before_ln=true,false")
    code, out, err = sweep(*flags)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:4] == ["trial", "original_ln_after", "residual_before_ln", "verdict"]
    assert rows[3] == ["1", "yes", "no", "skip", "connection", "doubled", "refused", "by", "the", "check", "0"]
    assert rows[5][:6] == ["3", "no", "no", "preserved", "repeats", "0"]
    assert "1 finished, 2 refused, 1 repeated" in out
    assert "2 training steps, 25% of the 8 that train every configuration to its end" in out
    assert "best: trial 0, original_ln_after=yes, residual_before_ln=yes: accuracy" in out
    assert re.fullmatch(r"4 trials; \d+ steps of training at most\.", err.splitlines()[0])
    assert "trial 2  original_ln_after=no, residual_before_ln=yes  refused by the check" in err
    # Going on with what is over prints the same; so does the record.
    none = {"model": None, "data": None, "adapter": None, "device": None, "epochs": None, "batch-size": None}
    assert sweep("--resume", "--quiet", **none) == (0, out, "")
    code, printed, err = sweep("--resume", "--json", **none)
    assert (code, err) == (0, "")
    assert json.loads(printed) == read_study(tmp_path / "study").to_dict()


def test_a_study_says_what_is_ahead():
    ahead = Ahead(seeds=3, steps=3168, unsound=True)
    assert _plan(8, 0, ahead) == (
        "8 trials, each with 3 seeds; 3,168 steps of training at most. What is proved unsound is trained too: this "
        "study asks for it, to show what becomes of it."
    )
    assert _plan(1, 1, Ahead(seeds=1, steps=0, unsound=False)) == "1 trial, 1 of them over."


def pasted(page):
    """The words of the command that a page gives for a large model and CIFAR-100."""
    commands = re.findall(r"^inarch sweep --study norm-flags (?:\\\n|.)*", page.read_text("utf-8"), re.MULTILINE)
    (command,) = (one for one in commands if "in21k" in one)
    return shlex.split(command.replace("\\\n", " "))[2:]


def test_the_command_for_a_large_model_and_cifar_100_is_one(given, tmp_path, capsys):
    """As the pages have it, with a tiny model, an archive of CIFAR's form, and fewer images, epochs and seeds."""
    docs = Path(__file__).parent.parent / "docs"
    words = pasted(docs / "norm-flags.md")
    assert words == pasted(docs / "sweep.md")
    assert words[words.index("--num-train") + 1] == "10000"
    data = archive(tmp_path / "cifar-100-python.tar.gz", cifar100(), "cifar-100-python")
    changes = {"--model": given[0], "--data": data, "--output": tmp_path / "study", "--num-train": 4, "--epochs": 1}
    for flag, value in changes.items():
        words[words.index(flag) + 1] = str(value)
    with pytest.raises(SystemExit) as left:
        main(["sweep", *words, "--seeds", "1", "--batch-size", "4", "--device", "cpu", "--adapter", ADAPTER])
    assert left.value.code == 0
    record = read_study(tmp_path / "study")
    assert [one.status for one in record.trials] == ["finished"] * 8
    assert [one.steps for one in record.trials] == [1] * 8  # four images of the six
    assert "skip connection doubled" in capsys.readouterr().out
    run = read_record(tmp_path / "study" / record.trials[0].runs[0])
    assert (run.data["train"], run.data["validation"]) == (4, 6)  # the archive's own test images


def test_ctrl_c_says_how_to_go_on_with_this_very_study(sweep, tmp_path, monkeypatch):
    def interrupted(options, *, is_quiet):
        (tmp_path / "my study").mkdir()
        (tmp_path / "my study/study.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("inarch.cli.sweep._run", interrupted)
    changes = {"output": tmp_path / "my study", "storage": "postgresql://me:x@host/db", "name": "mine"}
    _, _, err = sweep("--vary", "scaling=1", **changes)
    assert f"--output '{tmp_path}/my study' --resume --storage postgresql://me:***@host/db --name mine`" in err.replace(
        "\n", " "
    )


def test_a_study_without_an_end_is_an_error(sweep):
    code, out, err = sweep("--vary", "original_ln_after=false")
    assert code == 1
    assert "1 refused" in out
    assert err.endswith("No trial came to its end.\n")


@pytest.mark.parametrize(
    ("flags", "changes", "expected"),
    [
        ((), {}, (2, "got no `--vary`. Give a field and its values")),
        (("--vary", "r=1"), {"model": None}, (2, "got no `--model`. Give `demo`")),
        (("--vary", "rank=1"), {}, (1, "got `rank` with `seq_bn[reduction_factor=4]`")),
        (("--vary", "batch_sze=1"), {}, (1, "Did you mean `batch_size`?")),
        (("--vary", "scaling=1", "--vary", "scaling=2"), {}, (1, "A field is varied once; got `scaling` twice")),
        (("--vary", "scaling=1", "--sampler", "tpe"), {}, (1, "`--trials` is how many configurations")),
        (("--vary", "scaling=1"), {"validation": 0}, (1, "Give a `--validation` above 0")),
        (("--vary", "scaling=1"), {"study": "norm-flag"}, (1, "Did you mean `norm-flags`?")),
        (("--vary", "scaling=1"), {"storage": "elsewhere"}, (1, "A study's storage is a URL; got `elsewhere`")),
        (("--resume",), {}, (1, "To resume there must be a study")),
    ],
)
def test_what_cannot_be_studied_gets_one_message(sweep, tmp_path, flags, changes, expected):
    code, message = expected
    got, out, err = sweep(*flags, **changes)
    assert (got, out) == (code, "")
    assert message in err
    assert not (tmp_path / "study/study.json").exists()


def test_a_password_is_shown_nowhere(sweep, tmp_path):
    code, _, err = sweep("--vary", "scaling=1", storage="postgresql://me:secret@127.0.0.1:9/x")
    assert code == 1
    assert "got `postgresql+psycopg://me:***@127.0.0.1:9/x`" in err and "secret" not in err


def test_a_folder_of_something_else_is_left_alone(given, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StateError, match=r"holds `thesis.tex`"):
        run_study(study_of(1e-3), RECIPE, *given, tmp_path)


@pytest.mark.parametrize("module", ["storage", "pruning", "run"])
def test_without_optuna_the_extra_is_named(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("storage", "pruning", "run", "trial"):
        monkeypatch.delitem(sys.modules, f"inarch.sweep.{name}")
    with pytest.raises(InarchError, match=r'A sweep needs the optional package `optuna`.*"inarch\[sweep\]"'):
        importlib.import_module(f"inarch.sweep.{module}")
