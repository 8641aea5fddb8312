"""`Monitor`: the rule on made-up series, and every verdict on little trainings of each kind."""

import copy
import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from little_runs import Killed, RandomImages, StopAt, same, save_model, save_pictures, weights
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import inarch
from inarch.core.errors import ConfigError, SetupError
from inarch.core.records import MonitorRecord, RunRecord, read_record
from inarch.data import load_data
from inarch.testing import tiny
from inarch.train.monitor import frequencies, prior_entropy
from inarch.train.prognosis import GAIN, Reading, Signs, judge, reference
from inarch.train.recipe import Recipe
from inarch.train.run import train_run
from inarch.train.trainer import AdapterTrainer

pytestmark = pytest.mark.usefixtures("little_garbage")

STILL = "seq_bn[reduction_factor=4]"


# The rule


def signs(losses, **others):
    readings = [Reading(step, 1, float(loss)) for step, loss in enumerate(losses, 1)]
    return Signs(
        readings=readings, **{"entropy": math.log(10), "num_places": 6, "update": 0.02, "drift": 0.0, **others}
    )


def noisy(*levels, spread):
    return np.array(levels) + np.random.default_rng(0).normal(0, spread, len(levels))


FALLING, FLAT, RISING = np.linspace(2.4, 1.5, 12), [2.35, 2.36, 2.34] * 4, np.geomspace(2.4, 30, 12)


@pytest.mark.parametrize(
    ("losses", "others", "verdict", "words"),
    [
        (FALLING, {}, "learning", "1.62 against 2.3 of what the labels' frequencies alone give"),
        (FLAT, {}, "stalled", "look at the labels and at what the model is shown"),
        (FLAT, {"update": 1e-5}, "undecided", "1e-05 of its weights: raise the learning rate"),
        (FLAT, {"update": 0.5}, "stalled", "0.5 of its weights: lower the learning rate"),
        (FLAT, {"drift": 1.06}, "stalled", "1.1 of its size: check its wiring with `inarch check`"),
        (FLAT, {"update": 5e-3}, "undecided", "against 2.3"),
        (FLAT, {"has_head": False}, "undecided", "against 2.3"),
        (RISING, {}, "diverging", ", after 2.7"),
        ([2.4, 2.3, math.nan], {}, "diverging", "the loss is no number by step 3"),
        (FALLING, {"silent": "abcdef"}, "dead adapter", "no gradient reaches the adapter"),
        (FALLING, {"silent": "ab"}, "learning", "no gradient reaches 2 of 6 places"),
        (FALLING, {"still": True}, "dead adapter", "does not move the adapter"),
        ([2.4, 2.3], {}, "undecided", "too few steps"),
    ],
)
def test_a_series_gets_its_verdict_and_the_reason(losses, others, verdict, words):
    found = judge(signs(losses, **others), is_due=True, is_last=False)
    assert found.verdict == verdict
    assert words in found.reason


def test_a_slow_training_is_waited_for_and_then_told_that_its_steps_are_small():
    found = judge(signs(FLAT, update=1e-5), is_due=True, is_last=True)
    assert found.verdict == "stalled"
    assert "1e-05 of its weights: raise the learning rate" in found.reason


def test_a_loss_that_scatters_too_much_to_tell_is_waited_for():
    """The mean of the last four is 2.53, above the reference, with an error of 0.28."""
    wild = [2.4, 3.2, 2.0, 2.9, 1.7, 2.6, 3.4, 2.1, 3.0, 1.9, 3.1, 2.1]
    assert judge(signs(wild), is_due=True, is_last=False).verdict == "undecided"
    assert judge(signs(wild), is_due=True, is_last=True).verdict == "stalled"
    calm = [2.525 + (loss - 2.525) / 10 for loss in wild]
    assert judge(signs(calm), is_due=True, is_last=False).verdict == "stalled"


def test_a_loss_that_falls_too_little_is_waited_for_until_the_first_epoch_ends():
    slow = noisy(*np.linspace(2.50, 2.31, 12), spread=0.005)
    assert judge(signs(slow), is_due=False, is_last=False).verdict == "undecided"
    assert judge(signs(slow), is_due=True, is_last=False).verdict == "undecided"
    assert judge(signs(slow), is_due=True, is_last=True).verdict == "stalled"


def test_the_limit_is_a_share_of_the_reference_beyond_doubt():
    """By the formula: the mean of the last four of twelve, less two standard errors, from neighbours' differences."""
    series = np.array([1.9, 1.9, 1.8, 1.6, 1.5, 1.2, 1.4, 1.3, 1.0, 1.2, 1.1, 1.3])
    error = math.sqrt((np.diff(series) ** 2).mean() / 2) / 2
    edge = (series[-4:].mean() + 2 * error) / (1 - GAIN)
    assert judge(signs(series, entropy=edge * 1.001), is_due=False, is_last=False).verdict == "learning"
    assert judge(signs(series, entropy=edge * 0.999), is_due=False, is_last=False).verdict != "learning"


def test_a_head_that_is_lucky_before_it_has_learnt_is_not_learning():
    """Of two classes a head that knows nothing may score better than their frequencies do."""
    lucky = [0.68, 0.55, 0.56, 0.43, 0.56, 0.55, 0.55, 0.43, 0.68, 0.68, 0.43, 0.43, 0.68, 0.56]
    for steps in range(8, 15):
        found = judge(signs(lucky[:steps], entropy=math.log(2)), is_due=True, is_last=steps == 14)
        assert found.verdict == ("stalled" if steps == 14 else "undecided")


def test_without_known_frequencies_the_first_losses_are_the_reference():
    falling = np.linspace(0.9, 0.5, 12)
    found = judge(signs(falling, entropy=None), is_due=True, is_last=False)
    assert reference(signs(falling, entropy=None)) == (pytest.approx((falling[0] + falling[1]) / 2), "initial loss")
    assert found.verdict == "learning"
    assert found.reason.endswith("of the first steps")
    # A head that knows the task already begins below what frequencies give: then they say nothing.
    assert reference(signs(falling))[1] == "initial loss"
    assert judge(signs(noisy(*[0.9] * 12, spread=0.01)), is_due=True, is_last=True).verdict == "stalled"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_reference_is_the_least_loss_that_no_input_is_needed_for(smoothing):
    """Against torch: the loss of a constant prediction, minimised."""
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(bias.expand(10, 3), labels, label_smoothing=smoothing)
        value.backward()
        return value

    optimizer.step(loss)
    prior, several = frequencies(labels)
    assert (prior, several) == ([0.5, 0.3, 0.2], False)
    assert prior_entropy(prior, label_smoothing=smoothing) == pytest.approx(float(loss().detach()), abs=1e-6)


def test_the_reference_of_several_labels_is_the_mean_over_them():
    rows = [[1, 0], [1, 1], [1, 0], [0, 1]]
    prior, several = frequencies(rows)
    assert (prior, several) == ([0.75, 0.5], True)
    logits = torch.logit(torch.tensor(prior)).expand(4, 2)
    wanted = nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(rows).float())
    assert prior_entropy(prior, several) == pytest.approx(float(wanted))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_prior": [0.5, 0.6]}, r"numbers from 0 to 1 whose sum is 1; got \[0.5, 0.6\]"),
        ({"label_prior": [1.5], "multi_label": True}, r"numbers from 0 to 1; got \[1.5\]"),
        ({"labels": []}, "Labels are those of the training data; got none"),
        ({"labels": [0.5, 1.5]}, r"an id for each sample, or a row of 0 and 1; got torch.float32 of shape \(2,\)"),
        ({"labels": [0], "label_prior": [1.0]}, "Labels or their frequencies are given; got both"),
    ],
)
def test_labels_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        inarch.Monitor(**options)


# On real trainings


@pytest.fixture(scope="module")
def trials():
    path = Path(__file__).parent.parent / "scripts" / "monitor_trials.py"
    spec = importlib.util.spec_from_file_location("monitor_trials", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["monitor_trials"] = script
    spec.loader.exec_module(script)
    return script


def test_the_page_is_what_the_rule_says_of_the_trainings_that_were_kept(trials):
    page = Path(__file__).parent.parent / "docs" / "monitor.md"
    assert trials.page(trials.read_table()) == page.read_text(encoding="utf-8")


def test_the_rule_is_right_on_trainings_that_had_no_part_in_it(trials):
    """Counted anew, from the verdicts of single trainings."""
    table = trials.read_table()
    assert len(table) >= 60
    assert sum(trial.broken for trial in table) >= len(table) / 2
    ends = list(zip(table, trials.endings(table), strict=True))
    left_out = [(trial, end) for trial, end in ends if trial.family not in trials.DESIGN]
    second = [(trial, end) for trial, end in ends if trial.round == trials.ROUND]
    assert len(left_out) >= 60 and len(second) >= 30
    for some, step in itertools.product((left_out, second), ("due", "last_call")):
        said = [(trial.verdict(getattr(trial, step)), end) for trial, end in some]
        stopped = [end for verdict, end in said if verdict in ("stalled", "diverging", "dead adapter")]
        praised = [end for verdict, end in said if verdict == "learning"]
        assert sum(end != "learning" for end in stopped) >= 0.9 * len(stopped) > 0
        assert sum(end == "learning" for end in praised) >= 0.9 * len(praised) > 0


def test_a_recorded_training_is_told_apart_as_a_monitor_does(trials):
    """The replay of the table against a monitor that watches: the same series, the same verdicts."""
    model = grafted()
    recorder = trials.Recorder(model, num_steps=60, steps_per_epoch=30, labels=batch()["labels"])
    loop(model, recorder, rate=1e-2, steps=30)
    losses = recorder.losses
    updates = [
        max(change / size for place, (change, size) in sample["values"].items() if place != "head")
        for sample in recorder.samples
        if sample["kind"] == "update"
    ]
    trial = trials.Trial(
        family="seq_bn", way="as it should be", seed=0, round=1, broken=False, num_steps=60,
        steps_per_epoch=30,
        entropy=recorder.entropy, chance=0.2, score=1.0, first_loss=losses[0], last_loss=losses[-1], change=1.0,
        places=2, has_head=True, drift=0.0, losses=tuple(losses), silent=(0,) * 5, updates=tuple(updates),
    )  # fmt: skip
    decided = recorder.decided_at
    assert (trial.verdict(decided), trial.verdict(decided - 1)) == (recorder.verdict, "undecided")


# In a loop of one's own


def grafted(config=STILL):
    model = tiny("vit-classifier")
    adapters = inarch.attach(model)
    adapters.add("a", config, unsound="allow")
    adapters.train("a")
    return model


def batch(number=16, classes=5):
    data = RandomImages(number, classes)
    rows = [data[index] for index in range(number)]
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def loop(model, monitor, rate=1e-2, steps=60, tensors=None):
    """Trains on one batch, over and over."""
    inputs = batch()
    optimizer = torch.optim.AdamW(tensors or [p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        monitor.step(loss)
        optimizer.step()
        optimizer.zero_grad()
        if monitor.should_stop:
            break
    return monitor


def watch(model, **options):
    return inarch.Monitor(model, num_steps=60, labels=batch()["labels"], stop=True, **options)


def zeroed(model):
    for parameter in inarch.attach(model)["a"].values():
        nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize(
    ("make", "rate", "verdict", "words"),
    [
        (grafted, 1e-2, "learning", "against 1.6 of what the labels' frequencies alone give"),
        (grafted, 1e-7, "stalled", "raise the learning rate"),
        (grafted, 300.0, "diverging", "lower the learning rate"),
        (lambda: grafted("seq_bn[reduction_factor=4,scaling=0.0]"), 1e-2, "dead adapter", "no gradient"),
        (lambda: zeroed(grafted("lora")), 1e-2, "dead adapter", "no gradient"),
    ],
)
def test_a_loop_is_told_what_becomes_of_it(make, rate, verdict, words):
    model = make()
    monitor = loop(model, watch(model), rate)
    assert (monitor.verdict, monitor.should_stop) == (verdict, verdict != "learning")
    assert words in monitor.reason
    assert monitor.decided_at <= 20
    assert str(monitor).startswith(f"{verdict} at step {monitor.decided_at} of 60: ")
    record = monitor.record()
    assert record.stopped == (verdict != "learning")
    assert MonitorRecord.from_dict(json.loads(json.dumps(record_data(record)))) == record


def record_data(record):
    return RunRecord(name="a", trains="adapter", adapter=None, seed=0, job={}, monitor=record).to_dict()["monitor"]


def test_an_optimiser_that_does_not_hold_the_adapter_is_found():
    """It has gradients and never moves."""
    model = grafted()
    head = list(model.classifier.parameters())
    monitor = loop(model, watch(model), tensors=head)
    assert monitor.verdict == "dead adapter"
    assert "the optimiser does not move the adapter" in monitor.reason


def test_the_evidence_is_what_the_formulas_give():
    """Norms of one site in float64, in a step of plain gradient descent."""
    model, inputs = grafted().train(), batch()
    site = [p for key, p in inarch.attach(model)["a"].items() if key.startswith("image0.1.mlp.")]
    monitor = inarch.Monitor(model, num_steps=10)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def backward():
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss

    def norm(tensors):
        return math.sqrt(sum(float((tensor.double() ** 2).sum()) for tensor in tensors))

    loss = backward()
    before, gradient = [p.detach().clone() for p in site], norm([p.grad for p in site])
    monitor.step(loss, rate=0.5)
    optimizer.step()
    change = norm([now.detach() - then for now, then in zip(site, before, strict=True)])
    monitor.step(backward())
    assert monitor.memory["gradients"]["image0.1.mlp"] != pytest.approx(gradient, rel=1e-4)  # that of the second step
    assert monitor.memory["updates"]["image0.1.mlp"] == pytest.approx(change / norm(before) / 0.5, rel=1e-4)
    fresh = inarch.Monitor(model, num_steps=10)
    fresh.step(loss := backward())
    assert fresh.memory["gradients"]["image0.1.mlp"] == pytest.approx(norm([p.grad for p in site]), rel=1e-5)
    assert fresh.record().losses == ((1, pytest.approx(float(loss.detach()))),)


def test_a_verdict_keeps_the_numbers_that_it_was_decided_on():
    """Judged anew on the losses up to that step; what came later is in `losses`."""
    model = grafted()
    monitor = loop(model, watch(model))
    record = monitor.record()
    assert record.verdict == "learning"
    readings = [Reading(step, 1, loss) for step, loss in record.losses if step <= record.step]
    then = judge(Signs(readings=readings, entropy=record.reference), is_due=True, is_last=False)
    assert record.reason == then.reason
    assert {key: record.evidence[key] for key in then.evidence} == then.evidence
    assert record.losses[-1][0] > record.step
    assert record.losses[-1][1] < record.evidence["recent"] / 2  # else this could not tell the two apart


def test_the_drift_is_that_of_the_stream():
    model, inputs = grafted(), batch()
    handle = inarch.attach(model)
    last = model.get_submodule(list(handle.sites)[-1].layer_path)
    seen = []
    hook = last.register_forward_hook(lambda *call: seen.append(call[-1]))
    first_two = inputs["pixel_values"][:2]
    with torch.no_grad():
        model.eval()(first_two)
        with handle.using(None):
            model(first_two)
    hook.remove()
    adapted, plain = [(one[0] if isinstance(one, tuple) else one).double() for one in seen]
    monitor = inarch.Monitor(model, num_steps=10)
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    monitor.step(loss)
    wanted = float((adapted - plain).norm() / plain.norm())
    assert monitor.memory["drift_at_start"] == pytest.approx(wanted, rel=1e-4)
    assert model.training


def test_being_watched_changes_no_weight():
    config = "adapter_plus[reduction_factor=4,dropout=0.2]"
    torch.manual_seed(1)
    model = grafted(config)
    twin = copy.deepcopy(model)

    class Silent:
        should_stop = False

        def step(self, loss):
            pass

    torch.manual_seed(2)
    loop(model, watch(model), steps=9)
    torch.manual_seed(2)
    loop(twin, Silent(), steps=9)
    assert same(weights(model), weights(twin))


def test_a_step_out_of_its_place_is_refused():
    model = grafted()
    with pytest.raises(
        SetupError, match=r"between `backward\(\)` and `zero_grad\(\)`; got step 1 without any gradient"
    ):
        watch(model).step(1.0)
    with pytest.raises(ConfigError, match="the model and the number of steps; got no `num_steps`"):
        inarch.Monitor(model).step(1.0)
    with pytest.raises(ConfigError, match="got no model"):
        inarch.Monitor(num_steps=3).step(1.0)
    model.requires_grad_(False)
    with pytest.raises(SetupError, match="A monitor watches what is trained; got .* with nothing trainable"):
        inarch.Monitor(model)


def test_a_regression_is_watched_without_labels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    y = x.sum(dim=1, keepdim=True)
    monitor = inarch.Monitor(model, num_steps=100)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        monitor.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert monitor.verdict == "learning"
    assert monitor.record().reference_kind == "initial loss"
    assert monitor.reason.endswith("of the first steps")


# As a callback


def arguments(folder, **changes):
    options = {"per_device_train_batch_size": 8, "num_train_epochs": 20, "learning_rate": 1e-2, "use_cpu": True,
               "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}  # fmt: skip
    return TrainingArguments(**{"output_dir": str(folder), **options, **changes})


def train(model, folder, monitor, kind=Trainer, extra=(), **changes):
    trainer = kind(model, arguments(folder, **changes), train_dataset=RandomImages(), callbacks=[monitor, *extra])
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", [Trainer, AdapterTrainer])
def test_any_trainer_is_stopped_where_nothing_comes_of_it(tmp_path, kind):
    monitor = inarch.Monitor(labels=[row % 5 for row in range(24)], stop=True)
    trainer = train(grafted(), tmp_path, monitor, kind, learning_rate=1e-7)
    assert monitor.verdict == "stalled"
    assert trainer.state.global_step == monitor.decided_at <= 8
    assert monitor.num_steps == 60


@pytest.mark.parametrize("kind", [Trainer, AdapterTrainer])
def test_the_parts_of_a_batch_make_one_loss(tmp_path, kind):
    whole, parts = inarch.Monitor(), inarch.Monitor()
    model = grafted()
    twin = copy.deepcopy(model)
    train(model, tmp_path, whole, kind, max_steps=6)
    train(twin, tmp_path, parts, kind, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    first, second = [[loss for _, loss in one.record().losses] for one in (whole, parts)]
    assert len(first) == 6
    assert second == pytest.approx(first, rel=1e-4)


def test_half_precision_is_watched_too(tmp_path):
    monitor = inarch.Monitor(labels=[row % 5 for row in range(24)])
    train(grafted(), tmp_path, monitor, bf16=True)
    assert monitor.verdict == "learning"
    assert monitor.record().evidence["drift_at_start"] < 0.2


def outside(outputs, labels, **_):
    return nn.functional.cross_entropy(outputs["logits"], labels)


def test_a_loss_from_outside_of_the_model_is_asked_for(tmp_path):
    trainer = Trainer(
        grafted(), arguments(tmp_path), train_dataset=RandomImages(), callbacks=[inarch.Monitor()],
        compute_loss_func=outside,
    )  # fmt: skip
    with pytest.raises(SetupError, match="must be told the loss of each step; got none"):
        trainer.train()


@pytest.mark.parametrize("restores", [False, True])
def test_a_resumed_training_goes_on_with_what_was_seen(tmp_path, restores):
    options = {"max_steps": 30, "save_strategy": "steps", "save_steps": 7}
    model = grafted()
    twin = copy.deepcopy(model)
    labels = [row % 5 for row in range(24)]
    whole = inarch.Monitor(labels=labels)
    train(model, tmp_path / "whole", whole, AdapterTrainer, **options)
    with pytest.raises(Killed):
        train(twin, tmp_path / "parts", inarch.Monitor(labels=labels), AdapterTrainer, [StopAt(9)], **options)
    changes = {"restore_callback_states_from_checkpoint": restores}
    trainer = AdapterTrainer(
        twin, arguments(tmp_path / "parts", **options, **changes), train_dataset=RandomImages(),
        callbacks=[inarch.Monitor(labels=labels)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    resumed = next(one for one in trainer.callback_handler.callbacks if isinstance(one, inarch.Monitor))
    assert same(weights(model), weights(twin))
    assert resumed.record().losses == whole.record().losses
    assert resumed.record().history == whole.record().history
    assert resumed.entropy == whole.entropy


# In a run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    (root / "model").mkdir()
    return save_model(root / "model"), save_pictures(root / "pictures", count=9)


SLOW = Recipe(epochs=4, batch_size=2, learning_rate=1e-7, device="cpu")


class Verdicts(TrainerCallback):
    def __init__(self):
        self.told = []

    def on_verdict(self, monitor):
        self.told.append(str(monitor))


def test_a_run_is_stopped_early_and_says_why(inputs, tmp_path):
    told = Verdicts()
    record = train_run(SLOW.replace(stop_early=True), *inputs, STILL, tmp_path, callbacks=[told])
    assert record.status == "stopped"
    assert (record.monitor.verdict, record.monitor.stopped) == ("stalled", True)
    assert record.epochs[-1].step == record.monitor.step <= 12
    assert "raise the learning rate" in record.monitor.reason
    assert told.told == [str(record.monitor)]
    assert read_record(tmp_path) == record
    assert "accuracy" in record.results  # it was evaluated where it stopped
    again = train_run(SLOW.replace(stop_early=True), *inputs, STILL, tmp_path, resume=True)
    assert again == record


def test_a_run_that_was_stopped_goes_on_where_that_is_asked_for(inputs, tmp_path):
    train_run(SLOW.replace(stop_early=True), *inputs, STILL, tmp_path / "stopped")
    on = train_run(SLOW, *inputs, STILL, tmp_path / "stopped", resume=True)
    whole = train_run(SLOW, *inputs, STILL, tmp_path / "whole")
    assert (on.status, on.monitor.stopped, on.monitor.verdict) == ("finished", False, "stalled")
    assert on.epochs[-1].step == whole.epochs[-1].step
    assert on.epochs[-1].metrics == whole.epochs[-1].metrics
    assert on.monitor.losses == whole.monitor.losses


def test_a_run_of_several_labels_is_watched(inputs, tmp_path):
    rows = ["image,red,bright"]
    for number, path in enumerate(sorted(Path(inputs[1]).rglob("*.png"))):
        rows.append(f"{path.relative_to(inputs[1])},{int('red' in str(path))},{number % 3 and 1}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    images = load_data(inputs[1], labels=str(tmp_path / "labels.csv"), validation=0.3)
    record = train_run(SLOW.replace(learning_rate=1e-2), inputs[0], images, STILL, tmp_path / "run")
    assert record.monitor.reference_kind == "label entropy"
    shares = np.array([images.train.label(index) for index in range(len(images.train))]).mean(axis=0)
    wanted = -np.mean(shares * np.log(shares) + (1 - shares) * np.log(1 - shares))
    assert record.monitor.reference == pytest.approx(wanted)


def test_a_record_from_before_there_was_a_monitor_is_read(tmp_path):
    record = RunRecord(name="a", trains="adapter", adapter=None, seed=0, job={})
    data = record.to_dict()
    del data["monitor"]
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert read_record(tmp_path) == record
    assert read_record(tmp_path).monitor is None
