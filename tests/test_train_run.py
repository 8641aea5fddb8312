"""`train_run` and `train_seeds`: the folder they leave, the record in it, and what they refuse."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from little_runs import same, save_model, save_pictures
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerCallback

import inarch
from inarch.core.errors import ConfigError, DataError, StateError
from inarch.core.records import RunRecord, SeedsRecord, read_record
from inarch.data import load_data
from inarch.train.known import known_data, sample_batch
from inarch.train.models import load_model, load_processor
from inarch.train.predict import load_predictor
from inarch.train.recipe import DataConfig, Recipe
from inarch.train.resume import latest
from inarch.train.run import train_run, train_seeds

pytestmark = pytest.mark.usefixtures("little_garbage")

CONFIG, STILL = "seq_bn[reduction_factor=4,dropout=0.1]", "seq_bn[reduction_factor=4]"
"""With random numbers in every step of training, and without."""
QUICK = Recipe(epochs=2, batch_size=8, learning_rate=1e-2, device="cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random model in a folder, with the settings of its image processor, for two classes of its own."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images by class: each class has a colour."""
    return save_pictures(tmp_path_factory.mktemp("pictures"), count=9)


def tensors(folder):
    return load_file(folder / "adapter/adapter.safetensors")


# What a run leaves


def test_a_run_leaves_an_adapter_that_predicts_what_was_measured(tmp_path, model, pictures):
    data = DataConfig(data=pictures, validation=0.3)
    record = train_run(QUICK.replace(epochs=4), model, data, CONFIG, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter", "checkpoints", "run.json"]
    predictor = load_predictor(tmp_path / "run")
    images = load_data(pictures, validation=0.3)
    rows = np.concatenate([rows for _, rows in predictor.batches(images.validation.images)])
    targets = [images.validation.label(index) for index in range(len(images.validation))]
    assert predictor.labels == ("blue", "green", "red")
    assert record.results["accuracy"] == pytest.approx((rows.argmax(axis=1) == targets).mean())
    losses = -np.log(rows[np.arange(len(targets)), targets])
    assert record.results["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert record.results["accuracy"] > 0.6


def test_images_are_looked_at_once_and_what_is_known_of_them_is_told(tmp_path, model, pictures, monkeypatch):
    taken = []

    def counted(examples, processor, number=None):
        taken.append(number)
        return sample_batch(examples, processor, number)

    class Listener(TrainerCallback):
        known = None

        def on_known(self, data):
            self.known = data

    monkeypatch.setattr("inarch.train.run.sample_batch", counted)
    listener, processor = Listener(), load_processor(str(model))
    train_run(QUICK.replace(epochs=1), model, pictures, CONFIG, tmp_path / "run", callbacks=[listener])
    images = load_data(pictures)
    assert listener.known == known_data(sample_batch(images.train, processor), processor, images.labels)
    train_run(QUICK.replace(epochs=1), model, pictures, None, tmp_path / "head", trains="head")
    assert taken == [None, 1]


def test_the_record_says_what_was_done(tmp_path, model, pictures):
    record = train_run(QUICK, model, pictures, CONFIG, tmp_path, command=("inarch", "train"))
    assert read_record(tmp_path) == record
    assert RunRecord.from_dict(json.loads((tmp_path / "run.json").read_text())) == record
    assert record.status == "finished"
    assert record.adapter == CONFIG
    assert record.command == ("inarch", "train")
    assert record.data["labels"] == ["blue", "green", "red"]
    assert record.data["train"] + record.data["validation"] == 27
    assert record.verdict.sound
    assert record.verdict.groups[0].adapted == "y = x + h + A(x + h)"
    assert [(one.role, one.layers, one.adapted) for one in record.sites] == [
        ("self_attention", (0, 1), ""),
        ("mlp", (0, 1), "y = x + h + A(x + h)"),
    ]
    assert (
        sum(len(one.layers) * part.parameters for one in record.sites for part in one.modules)
        == (record.model["adapter_parameters"])
    )
    assert [epoch.epoch for epoch in record.epochs] == [0, 1, 2]
    assert record.epochs[0].train_loss is None
    assert all(epoch.train_loss > 0 and epoch.gradient_norm > 0 for epoch in record.epochs[1:])
    assert all(epoch.metrics.keys() == {"loss", "accuracy"} for epoch in record.epochs)
    assert record.job["recipe"] == QUICK.to_dict()
    assert record.environment["versions"]["torch"] == torch.__version__
    handle = inarch.attach(load_model(model, ["a", "b", "c"]))
    handle.add("x", CONFIG)
    assert record.model["adapter_parameters"] == sum(p.numel() for p in handle["x"].values())
    assert record.model["trainable"] == record.model["adapter_parameters"] + 32 * 3 + 3
    assert record.seconds > 0
    assert record.images_per_second > 0
    assert record.peak_memory > 1e7


def test_the_best_epoch_is_what_is_kept(tmp_path, model, pictures):
    record = train_run(QUICK.replace(epochs=3), model, pictures, CONFIG, tmp_path)
    accuracies = [epoch.metrics["accuracy"] for epoch in record.epochs[1:]]
    assert record.best_epoch == 1 + accuracies.index(max(accuracies))
    assert record.results == record.epochs[int(record.best_epoch)].metrics
    step = record.epochs[int(record.best_epoch)].step
    stored = load_file(tmp_path / f"checkpoints/checkpoint-{step}/adapters/adapter/adapter.safetensors")
    assert same(tensors(tmp_path), stored)


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(tmp_path, model, pictures):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train_run(QUICK.replace(seed=seed), model, pictures, CONFIG, tmp_path / name)
    one, two, three = [
        (tmp_path / name / "adapter/adapter.safetensors").read_bytes() for name in ("one", "two", "three")
    ]
    assert one == two != three


def test_workers_and_accumulation_change_nothing_that_matters(tmp_path, pictures, model):
    train_run(QUICK, model, pictures, STILL, tmp_path / "plain")
    train_run(QUICK.replace(workers=2), model, pictures, STILL, tmp_path / "workers")
    train_run(QUICK.replace(accumulation=4), model, pictures, STILL, tmp_path / "parts")
    plain, workers, parts = [
        load_file(latest(tmp_path / name / "checkpoints") / "adapters/adapter/adapter.safetensors")
        for name in ("plain", "workers", "parts")
    ]
    assert same(workers, plain)
    assert all(torch.allclose(parts[key], plain[key], rtol=0, atol=1e-6) for key in plain)


def test_every_epoch_has_an_order_and_crops_of_its_own(tmp_path, pictures, model):
    seen = []

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, train_dataloader=None, **rest):
            dataset = train_dataloader.dataset
            train_dataloader.set_epoch(int(state.epoch or 0))
            seen.append((next(iter(train_dataloader.batch_sampler)), dataset[0]["pixel_values"]))

    train_run(QUICK.replace(epochs=3), model, pictures, STILL, tmp_path, callbacks=[Watch()])
    assert len({tuple(order) for order, _ in seen}) == 3
    assert len({tuple(pixels.flatten().tolist()) for _, pixels in seen}) == 3


@pytest.mark.parametrize(("trains", "changed"), [("head", {"classifier.weight", "classifier.bias"}), ("full", None)])
def test_for_comparison_a_head_or_the_whole_model_is_trained(tmp_path, model, pictures, trains, changed):
    record = train_run(QUICK, model, pictures, None, tmp_path, trains=trains)
    assert record.adapter is None
    assert not (tmp_path / "adapter").exists()
    trained = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    before = load_model(model, trained.config.id2label.values()).state_dict()
    moved = {key for key, tensor in trained.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == (changed or before.keys())
    assert (tmp_path / "model/preprocessor_config.json").is_file()


@pytest.fixture
def bars(monkeypatch):
    """The bars of the libraries, switched on as they are for a user."""
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)


@pytest.mark.usefixtures("bars")
def test_nothing_is_printed(tmp_path, model, pictures, capsys):
    train_run(QUICK.replace(max_steps=1), model, pictures, CONFIG, tmp_path / "adapter")
    train_run(QUICK.replace(max_steps=1), model, pictures, None, tmp_path / "head", trains="head")
    assert capsys.readouterr() == ("", "")


def test_data_may_come_as_an_object(tmp_path, model):
    record = train_run(QUICK.replace(max_steps=3, batch_size=32), model, load_data("digits"), CONFIG, tmp_path)
    assert record.job["data"] == {"object": "digits"}
    assert [epoch.step for epoch in record.epochs] == [0, 3]


def test_without_validation_the_last_epoch_is_kept(tmp_path, model, pictures):
    record = train_run(QUICK, model, DataConfig(data=pictures, validation=0), CONFIG, tmp_path)
    assert record.metric is None
    assert record.results == {"train_loss": record.epochs[-1].train_loss}
    assert (tmp_path / "adapter/adapter.safetensors").is_file()


def test_several_labels_an_image_are_trained_from_a_table(tmp_path, model, pictures):
    lines = ["image,labels"]
    for number in range(9):
        lines += [f"red/{number}.png,warm", f"green/{number}.png,cold;calm", f"blue/{number}.png,cold"]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(lines))
    data = DataConfig(data=pictures, labels=str(table), validation=0.3)
    record = train_run(QUICK.replace(epochs=6), model, data, CONFIG, tmp_path / "run")
    assert record.metric == "mean_average_precision"
    assert record.results.keys() == {"loss", "accuracy", "micro_f1", "mean_average_precision"}
    assert record.results["mean_average_precision"] > 0.9
    assert load_predictor(tmp_path / "run").task == "multi_label"


def test_tensorboard_is_written_where_it_is_asked_for(tmp_path, model, pictures):
    train_run(QUICK.replace(report_to="tensorboard"), model, pictures, CONFIG, tmp_path)
    assert len(list((tmp_path / "logs").glob("events.out.tfevents.*"))) == 1


def test_mixed_precision_trains_too(tmp_path, model, pictures):
    record = train_run(QUICK.replace(precision="bf16"), model, pictures, CONFIG, tmp_path)
    assert record.environment["precision"] == "bf16"
    assert all(tensor.dtype == torch.float32 for tensor in tensors(tmp_path).values())


@pytest.mark.parametrize("checkpointing", ["on", "reentrant"])
def test_checkpointing_of_activations_changes_no_weight(tmp_path, model, pictures, checkpointing):
    train_run(QUICK, model, pictures, CONFIG, tmp_path / "plain")
    train_run(QUICK.replace(checkpointing=checkpointing), model, pictures, CONFIG, tmp_path / "spared")
    assert same(tensors(tmp_path / "spared"), tensors(tmp_path / "plain"))


def test_an_unsound_configuration_is_trained_only_when_allowed(tmp_path, model, pictures):
    unsound = "seq_bn[reduction_factor=4,original_ln_after=False]"
    with pytest.raises(ConfigError, match=r"skip connection lost"):
        train_run(QUICK, model, pictures, unsound, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    record = train_run(QUICK, model, pictures, unsound, tmp_path / "run", unsound="allow")
    assert not record.verdict.sound
    assert "skip connection lost" in record.verdict.findings[0]
    assert record.verdict.details[0].code == "unsound-wiring"
    assert "residual_before_ln=False" in record.verdict.details[0].fixes
    assert record.sites[-1].verdict == "skip connection lost"


def test_a_checkpoint_at_the_end_of_an_epoch_comes_after_its_evaluation(tmp_path, model, pictures):
    seen = {}

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **rest):
            seen.setdefault(state.global_step, {entry["step"] for entry in state.log_history if "eval_loss" in entry})

    train_run(QUICK.replace(save_steps=1), model, pictures, STILL, tmp_path, callbacks=[Watch()])
    assert seen == {1: {0}, 2: {0}, 3: {0, 3}, 4: {0, 3}, 5: {0, 3}, 6: {0, 3, 6}}


# Stopping


def test_patience_ends_a_run_that_gets_no_better(tmp_path, model, pictures):
    record = train_run(QUICK.replace(epochs=30, learning_rate=1e-9, patience=2), model, pictures, CONFIG, tmp_path)
    assert [epoch.epoch for epoch in record.epochs] == [0, 1, 2, 3]
    assert record.best_epoch == 1


def test_a_run_that_stopped_early_resumes_to_the_same_end(tmp_path, model, pictures, monkeypatch):
    recipe = QUICK.replace(epochs=30, learning_rate=1e-9, patience=1)
    whole = train_run(recipe, model, pictures, CONFIG, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def die(*args, **options):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("inarch.train.run._write_result", die)
        with pytest.raises(Killed):
            train_run(recipe, model, pictures, CONFIG, tmp_path / "parts")
    resumed = train_run(recipe, model, pictures, CONFIG, tmp_path / "parts", resume=True)
    assert resumed.epochs == whole.epochs
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_best(tmp_path, model, pictures, caplog):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **rest):
            if state.global_step == 4:
                with torch.no_grad():
                    model.classifier.weight.fill_(math.nan)

    record = train_run(QUICK.replace(epochs=9), model, pictures, CONFIG, tmp_path, callbacks=[Spoil()])
    assert record.status == "diverged"
    assert record.epochs[-1].epoch == 2
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path).values())
    assert "The loss of a training must stay a number" in caplog.text
    assert read_record(tmp_path).epochs[-1].train_loss is None


def test_ctrl_c_keeps_the_checkpoint_and_the_run_goes_on(tmp_path, model, pictures):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            if state.global_step == 4:
                raise KeyboardInterrupt

    whole = train_run(QUICK, model, pictures, CONFIG, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_run(QUICK, model, pictures, CONFIG, tmp_path / "parts", callbacks=[Interrupt()])
    assert read_record(tmp_path / "parts").status == "interrupted"
    resumed = train_run(QUICK, model, pictures, CONFIG, tmp_path / "parts", resume=True)
    assert resumed.status == "finished"
    assert resumed.epochs == whole.epochs
    assert resumed.started <= resumed.finished
    logs = [
        json.loads((latest(tmp_path / name / "checkpoints") / "trainer_state.json").read_text())
        for name in ("whole", "parts")
    ]
    assert [[entry["step"] for entry in log["log_history"]] for log in logs] == [[0, 3, 3, 6, 6]] * 2
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


# Several seeds


def test_several_seeds_give_mean_and_standard_deviation(tmp_path, model, pictures):
    record = train_seeds(QUICK.replace(seed=5), model, pictures, CONFIG, tmp_path, num_seeds=3)
    assert read_record(tmp_path) == record
    assert [run.seed for run in record.runs] == [5, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "seed-5", "seed-6", "seed-7"]
    assert [read_record(tmp_path / f"seed-{seed}") for seed in (5, 6, 7)] == list(record.runs)
    losses = [run.results["loss"] for run in record.runs]
    assert len(set(losses)) == 3
    assert record.mean["loss"] == pytest.approx(np.mean(losses))
    assert record.std["loss"] == pytest.approx(np.std(losses, ddof=1))
    alone = train_run(QUICK.replace(seed=6), model, pictures, CONFIG, tmp_path.parent / "alone")
    assert alone.results == record.runs[1].results


def test_several_seeds_are_resumed_where_they_stopped(tmp_path, model, pictures):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            if args.seed == 1 and state.global_step == 4:
                raise KeyboardInterrupt

    whole = train_seeds(QUICK, model, pictures, CONFIG, tmp_path / "whole", num_seeds=2)
    with pytest.raises(KeyboardInterrupt):
        train_seeds(QUICK, model, pictures, CONFIG, tmp_path / "parts", num_seeds=2, callbacks=[Interrupt()])
    begun = read_record(tmp_path / "parts")
    assert isinstance(begun, SeedsRecord)
    assert (begun.status, len(begun.runs)) == ("running", 1)
    resumed = train_seeds(QUICK, model, pictures, CONFIG, tmp_path / "parts", num_seeds=2, resume=True)
    assert (resumed.mean, resumed.std) == (whole.mean, whole.std)
    assert same(tensors(tmp_path / "parts/seed-1"), tensors(tmp_path / "whole/seed-1"))


def test_several_seeds_are_several(tmp_path, model, pictures):
    with pytest.raises(ConfigError, match=r"Several seeds are at least 2; got 1"):
        train_seeds(QUICK, model, pictures, CONFIG, tmp_path, num_seeds=1)
    train_seeds(QUICK.replace(max_steps=1), model, pictures, CONFIG, tmp_path / "run", num_seeds=2)
    with pytest.raises(StateError, match=r"got .* with seeds None instead of 2"):
        train_run(QUICK.replace(max_steps=1), model, pictures, CONFIG, tmp_path / "run", resume=True)


# Output folders


def test_a_run_is_not_overwritten_unasked(tmp_path, model, pictures):
    quick = QUICK.replace(max_steps=1)
    train_run(quick, model, pictures, CONFIG, tmp_path)
    with pytest.raises(StateError, match=r"holds a run of adapter `adapter` \(finished\)\. Go on with it"):
        train_run(quick, model, pictures, CONFIG, tmp_path)
    train_run(quick.replace(seed=3), model, pictures, None, tmp_path, trains="head", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "model", "run.json"]


def test_a_folder_of_other_things_is_never_touched(tmp_path, model, pictures):
    (tmp_path / "thesis.tex").write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(StateError, match=r"holds other things, such as `thesis.tex`"):
            train_run(QUICK, model, pictures, CONFIG, tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_finished_run_resumed_is_left_alone(tmp_path, model, pictures):
    record = train_run(QUICK, model, pictures, CONFIG, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train_run(QUICK, model, pictures, CONFIG, tmp_path, resume=True) == record
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_is_resumed_with_its_own_options_and_data(tmp_path, model, pictures):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(QUICK, model, pictures, CONFIG, tmp_path, callbacks=[Interrupt()])
    with pytest.raises(StateError, match=r"with recipe.learning_rate 0.5 instead of 0.01"):
        train_run(QUICK.replace(learning_rate=0.5), model, pictures, CONFIG, tmp_path, resume=True)
    with pytest.raises(StateError, match=r"with adapter.methods"):
        train_run(QUICK, model, pictures, "lora", tmp_path, resume=True)
    extra = tmp_path.parent / "pictures-more"
    (extra / "red").mkdir(parents=True)
    record = read_record(tmp_path)
    fewer = {**record.data, "labels": ["red"]}
    (tmp_path / "run.json").write_text(json.dumps({**record.to_dict(), "data": fewer}))
    with pytest.raises(DataError, match=r"got other `labels` in .*: 3 labels, .* instead of 1 label,"):
        train_run(QUICK, model, pictures, CONFIG, tmp_path, resume=True)


def test_another_number_of_processes_is_announced(tmp_path, model, pictures, caplog):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(QUICK, model, pictures, CONFIG, tmp_path, callbacks=[Interrupt()])
    data = json.loads((tmp_path / "run.json").read_text())
    data["environment"]["processes"] = 3
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert train_run(QUICK, model, pictures, CONFIG, tmp_path, resume=True).status == "finished"
    assert "this run, begun on 3, goes on with 1" in caplog.text


def test_neutral_options_may_change_when_a_run_is_resumed(tmp_path, model, pictures):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(QUICK, model, pictures, CONFIG, tmp_path, callbacks=[Interrupt()])
    changed = QUICK.replace(workers=1, keep_checkpoints=3, save_steps=2)
    record = train_run(changed, model, pictures, CONFIG, tmp_path, resume=True)
    assert record.job["recipe"] == changed.to_dict()


# What is refused before anything is written


@pytest.mark.parametrize(
    ("changes", "what", "message"),
    [
        ({"patience": 2}, ("adapter", CONFIG), r"`Recipe.patience` needs images to validate on; got none in"),
        ({"precision": "fp16"}, ("adapter", CONFIG), r"got `fp16` on `cpu`"),
        ({"report_to": "paperwall"}, ("adapter", CONFIG), r"integrations that are installed; got `paperwall`"),
        ({}, ("head", CONFIG), r"given where an adapter is trained, and only there; got `seq_bn.*Leave it out"),
        ({}, ("adapter", None), r"only there; got none to train the adapter\. Give one"),
        ({}, ("adapter", "seq_bn[rduction_factor=2]"), r"Did you mean `reduction_factor`"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, request, changes, what, message):
    trains, adapter = what
    model, data = (request.getfixturevalue(name) for name in ("model", "pictures"))
    images = DataConfig(data=data, validation=0)
    with pytest.raises(ConfigError, match=message):
        train_run(QUICK.replace(**changes), model, images, adapter, tmp_path / "run", trains=trains)
    assert not (tmp_path / "run").exists()


def test_label_smoothing_is_for_one_label(tmp_path, model, pictures):
    table = tmp_path / "labels.csv"
    names = [f"{colour}/{number}.png" for colour in ("red", "green", "blue") for number in range(9)]
    table.write_text(
        "image,warm,cold\n" + "\n".join(f"{name},{int('red' in name)},{int('blue' in name)}" for name in names)
    )
    with pytest.raises(ConfigError, match=r"`Recipe.label_smoothing` is for one label an image"):
        train_run(
            QUICK.replace(label_smoothing=0.1),
            model,
            DataConfig(data=pictures, labels=str(table)),
            CONFIG,
            tmp_path / "r",
        )
