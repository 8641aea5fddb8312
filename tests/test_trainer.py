"""`AdapterTrainer`: what it refuses, what its checkpoints hold, and that resuming changes nothing."""

import errno
import json
import os
import shutil
import types
from pathlib import Path

import pytest
import torch
from little_runs import Killed, RandomImages, StopAt, same, weights
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import inarch
from inarch.core.errors import SetupError, StateError
from inarch.handle import attached
from inarch.testing import PlainTransformer, tiny, tiny_inputs
from inarch.train import resume
from inarch.train.trainer import AdapterTrainer

pytestmark = pytest.mark.usefixtures("little_garbage")

DROPPING = "adapter_plus[reduction_factor=4,dropout=0.2]"
"""An adapter that draws random numbers in each step of training."""


class Words(Dataset):
    """Random sentences."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(3, 99, (7,), generator=generator), "labels": index % 3}


def grafted(name="vit-classifier", config=DROPPING):
    model = tiny(name)
    adapters = inarch.attach(model)
    torch.manual_seed(1)
    adapters.add("a", config)
    adapters.train("a")
    return model


def arguments(folder, **changes):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "epoch",
            "logging_strategy": "no",
            **changes,
        }
    )


def trainer_of(model, folder, data=None, callbacks=(), trains="adapter", **changes):
    data = data or RandomImages()
    return AdapterTrainer(
        model,
        arguments(folder, **changes),
        trains=trains,
        train_dataset=data,
        eval_dataset=data,
        callbacks=list(callbacks),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


# What is refused


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r"trains a model with adapters; got ViTForImageClassification without any"):
        AdapterTrainer(tiny("vit-classifier"), arguments(tmp_path))


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    model = grafted()
    model.requires_grad_(False)
    with pytest.raises(SetupError, match=r"Something must be trainable; .* `a` frozen\. Call `adapters.train\('a'\)`"):
        AdapterTrainer(model, arguments(tmp_path))


def test_a_trainable_base_is_refused_unless_it_is_asked_for(tmp_path):
    model = grafted()
    model.vit.layernorm.requires_grad_(True)
    with pytest.raises(
        SetupError, match=r"The base model must be frozen; got 2 trainable .* first `vit.layernorm.weight"
    ):
        AdapterTrainer(model, arguments(tmp_path))
    AdapterTrainer(model, arguments(tmp_path), trains="full")


def test_a_trained_adapter_that_no_forward_uses_is_refused(tmp_path):
    model = grafted()
    attached(model).deactivate()
    with pytest.raises(SetupError, match=r"What is trained must be active; got `a`"):
        AdapterTrainer(model, arguments(tmp_path))


def test_every_problem_is_told_at_once(tmp_path):
    model = grafted()
    attached(model).deactivate()
    model.requires_grad_(True)
    with pytest.raises(SetupError, match=r"(?s)2 problems.*must be active.*must be frozen"):
        AdapterTrainer(model, arguments(tmp_path))


def test_a_head_alone_is_trained_without_adapters(tmp_path):
    model = tiny("vit-classifier").requires_grad_(False)
    model.classifier.requires_grad_(True)
    before = weights(model)
    trainer_of(model, tmp_path, trains="head").train()
    after = weights(model)
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        "classifier.weight",
        "classifier.bias",
    }


# What training changes, and what a checkpoint holds


def test_training_leaves_the_base_as_it_was_bit_for_bit(tmp_path):
    model = grafted()
    before = weights(model)
    trainer_of(model, tmp_path).train()
    after = weights(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".inarch." in key for key in changed)
    assert {"classifier.weight", "classifier.bias"} < changed


def test_a_checkpoint_holds_the_adapter_and_its_head_but_no_base(tmp_path):
    model = grafted()
    trainer_of(model, tmp_path, num_train_epochs=1).train()
    folder = tmp_path / "checkpoint-6"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "adapters/a/adapter.safetensors",
        "adapters/a/inarch.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    adapters = attached(model)
    stored = load_file(folder / "adapters/a/adapter.safetensors")
    assert stored.keys() == adapters["a"].keys() | adapters.head("a").keys()


def test_the_adapter_in_a_checkpoint_is_an_adapter_folder(tmp_path):
    model = grafted()
    trainer_of(model, tmp_path).train()
    other = tiny("vit-classifier")
    adapters = inarch.attach(other)
    adapters.activate(adapters.load(tmp_path / "checkpoint-12/adapters/a"))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(other.eval()(pixels).logits, model.eval()(pixels).logits)


def test_what_else_is_trained_is_in_the_checkpoint_too(tmp_path):
    model = tiny("vit-classifier")
    trainer_of(model, tmp_path, trains="full", num_train_epochs=1).train()
    stored = load_file(tmp_path / "checkpoint-6/trainable.safetensors")
    assert same(stored, weights(model))
    assert not (tmp_path / "checkpoint-6/adapters").exists()


def test_weight_decay_spares_biases_norms_and_scales(tmp_path):
    model = grafted(config="seq_bn[reduction_factor=4,ln_before=True,scaling=channel]")
    optimizer = trainer_of(model, tmp_path, weight_decay=0.1).create_optimizer()
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[key].split(".")[-2] + "." + names[key].split(".")[-1] for key in groups[0.1]}
    assert decayed == {"down.weight", "up.weight", "classifier.weight"}
    assert {names[key].rsplit(".", 1)[1] for key in groups[0.0]} == {"weight", "bias", "scale"}


def test_running_statistics_of_a_frozen_base_do_not_move(tmp_path):
    model = grafted()
    model.vit.layernorm = nn.Sequential(model.vit.layernorm, TokenNorm(32)).requires_grad_(False)
    before = weights(model)
    trainer_of(model, tmp_path, num_train_epochs=1).train()
    assert torch.equal(model.vit.layernorm[1].norm.running_mean, before["vit.layernorm.1.norm.running_mean"])
    trainer_of(model.requires_grad_(True), tmp_path, trains="full", num_train_epochs=1).train()
    assert not torch.equal(model.vit.layernorm[1].norm.running_mean, before["vit.layernorm.1.norm.running_mean"])


class TokenNorm(nn.Module):
    """A batch norm over tokens."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


# Resuming


@pytest.mark.parametrize(
    ("name", "data", "step"),
    [("vit-classifier", RandomImages, 9), ("vit-classifier", RandomImages, 7), ("bert-classifier", Words, 5)],
    ids=["epoch's end", "within an epoch", "text"],
)
def test_a_resumed_training_ends_with_the_same_weights_bit_for_bit(tmp_path, name, data, step):
    config = DROPPING if name.startswith("vit") else "seq_bn[dropout=0.2]"
    options = {"save_strategy": "steps", "save_steps": 3, "data": data()}
    whole = grafted(name, config)
    trainer_of(whole, tmp_path / "whole", **options).train()

    killed = grafted(name, config)
    with pytest.raises(Killed):
        trainer_of(killed, tmp_path / "parts", callbacks=[StopAt(step)], **options).train()
    resumed = grafted(name, config)
    with torch.no_grad():
        for parameter in attached(resumed)["a"].values():
            parameter.zero_()  # so that it matters what the checkpoint brings
    trainer_of(resumed, tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(whole))
    assert not same(weights(killed), weights(whole))


def test_several_adapters_and_shared_heads_are_resumed(tmp_path):
    def build():
        model = grafted(config="seq_bn[reduction_factor=4]")
        adapters = attached(model)
        adapters.add("b", "seq_bn[reduction_factor=8]")
        adapters.train(inarch.Stack("a", "b"))
        return model

    model = build()
    trainer_of(model, tmp_path, num_train_epochs=1).train()
    assert sorted(path.name for path in (tmp_path / "checkpoint-6/adapters").iterdir()) == ["a", "b"]
    other = build()
    trainer_of(other, tmp_path, num_train_epochs=1).train(resume_from_checkpoint=True)
    assert same(weights(other), weights(model))


def test_a_whole_model_with_an_adapter_is_resumed(tmp_path):
    def build():
        model = grafted(config="seq_bn[reduction_factor=4]")
        return model.requires_grad_()

    model, other = build(), build()
    trainer_of(model, tmp_path, trains="full", num_train_epochs=1).train()
    trainer_of(other, tmp_path, trains="full", num_train_epochs=1).train(resume_from_checkpoint=True)
    assert same(weights(other), weights(model))
    assert not same(weights(other), weights(build()))


def test_the_best_checkpoint_comes_back_with_adapter_and_head(tmp_path):
    seen = {}

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, model=None, **rest):
            seen[state.global_step] = weights(model)

    model = grafted()
    trainer = trainer_of(
        model,
        tmp_path,
        callbacks=[Watch()],
        num_train_epochs=3,
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # of all three the first: a wrong direction, so that the best is not the last
        save_total_limit=1,
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best != 18
    assert same(weights(model), seen[best])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")


def test_rotation_keeps_the_best_and_the_newest(tmp_path):
    model = grafted()
    trainer = trainer_of(
        model,
        tmp_path,
        num_train_epochs=4,
        eval_strategy="epoch",
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_total_limit=2,
    )
    trainer.train()
    assert trainer.state.best_global_step == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-24", "checkpoint-6"]
    written = json.loads((tmp_path / "checkpoint-24/trainer_state.json").read_text())
    assert written["best_model_checkpoint"] == str(tmp_path / "checkpoint-6")


def test_a_run_that_was_moved_finds_its_best_checkpoint(tmp_path):
    options = {
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    model = grafted()
    trainer_of(model, tmp_path / "old", **options).train()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = grafted()
    trainer = trainer_of(moved, tmp_path / "new", **options)
    trainer.train(resume_from_checkpoint=True)  # there is nothing left to do but to load the best
    assert trainer.state.best_model_checkpoint == str(tmp_path / "new/checkpoint-6")
    assert same(weights(moved), weights(model))


def test_partial_checkpoints_are_never_the_newest_and_are_cleaned_up(tmp_path):
    model = grafted()
    trainer_of(model, tmp_path).train()
    (tmp_path / ".checkpoint-18.draft/checkpoint-18").mkdir(parents=True)
    (tmp_path / ".checkpoint-3.old").mkdir()
    (tmp_path / "checkpoint-24").mkdir()
    assert resume.latest(tmp_path) == tmp_path / "checkpoint-12"
    trainer_of(grafted(), tmp_path).train(resume_from_checkpoint=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"To resume there must be a checkpoint; got no whole one"):
        trainer_of(grafted(), tmp_path).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(StateError, match=r"got no `trainer_state.json` in .*checkpoint-1`"):
        trainer_of(grafted(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_resuming_on_another_base_is_refused(tmp_path):
    trainer_of(grafted(), tmp_path, num_train_epochs=1).train()
    other = tiny("vit-classifier", seed=7)
    adapters = inarch.attach(other)
    adapters.add("a", DROPPING)
    adapters.train("a")
    with pytest.raises(StateError, match=r"weights of an adapter's base and of the model must agree"):
        trainer_of(other, tmp_path).train(resume_from_checkpoint=True)


def test_resuming_another_configuration_is_refused(tmp_path):
    trainer_of(grafted(), tmp_path, num_train_epochs=1).train()
    with pytest.raises(StateError, match=r"tensors of an adapter must be those its configuration makes"):
        trainer_of(grafted(config="seq_bn[reduction_factor=2]"), tmp_path).train(resume_from_checkpoint=True)


# A disk that fails


@pytest.mark.parametrize("place", ["optimizer.pt", "adapter.safetensors", "trainer_state.json"])
def test_a_full_disk_costs_one_checkpoint_and_no_more(tmp_path, monkeypatch, place):
    model = grafted()
    trainer_of(model, tmp_path, num_train_epochs=1).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    real = resume.sync

    def sync(path):
        if path.name == place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path)

    monkeypatch.setattr(resume, "sync", sync)
    with pytest.raises(StateError, match=r"A checkpoint must be writable as a whole; got `No space left on device`"):
        trainer_of(grafted(), tmp_path).train(resume_from_checkpoint=True)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_an_error_of_torch_while_writing_is_explained(tmp_path, monkeypatch):
    def save(*args):
        raise RuntimeError("[enforce fail at inline_container.cc:815] . PytorchStreamWriter failed writing file\nmore")

    monkeypatch.setattr(torch, "save", save)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0))
        with pytest.raises(StateError, match=r"got `No space left on device` at"):
            trainer_of(grafted(), tmp_path).train()
    trainer = trainer_of(grafted(), tmp_path)
    with pytest.raises(StateError, match=r"got `\[enforce fail at inline_container.cc:815\] \. PytorchStreamWriter"):
        trainer.train()


# Memory


@pytest.mark.parametrize("config", ["seq_bn[reduction_factor=4]", "par_bn[reduction_factor=4]", "lora", DROPPING])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_activations_gives_the_same_weights(tmp_path, config, reentrant):
    plain = grafted(config=config)
    trainer_of(plain, tmp_path / "plain", max_steps=2, save_strategy="no").train()
    name = "activation_checkpointing"
    if name not in TrainingArguments.__dataclass_fields__:
        name = "gradient_checkpointing"
    options = {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}
    spared = grafted(config=config)
    trainer_of(spared, tmp_path / "spared", max_steps=2, save_strategy="no", **options).train()
    assert same(weights(spared), weights(plain))


# Other models


def test_a_model_of_no_library_is_trained_and_resumed(tmp_path):
    class Points(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"x": torch.randn(6, 32, generator=torch.Generator().manual_seed(index)), "labels": index % 3}

    def build():
        torch.manual_seed(0)
        model = PlainTransformer()
        adapters = inarch.attach(model, example_inputs={"x": torch.zeros(1, 6, 32)})
        adapters.add("a", "seq_bn[reduction_factor=4]")
        adapters.train("a", head="head")
        return model

    def train(model, **options):
        trainer = AdapterTrainer(
            model,
            arguments(tmp_path, remove_unused_columns=False, label_names=["labels"], **options),
            train_dataset=Points(),
            compute_loss_func=lambda outputs, labels, num_items_in_batch: (
                nn.functional.cross_entropy(outputs, labels, reduction="sum") / num_items_in_batch
            ),
        )
        return trainer.train

    model = build()
    train(model)()
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = build()
    train(again)(resume_from_checkpoint=True)
    assert same(weights(again), weights(model))


def test_tasks_are_told_by_a_column_of_the_data(tmp_path):
    """`task_ids` goes through collator and loader as any tensor: an adapter learns from its rows as it does alone."""

    def trained(setup, **more):
        torch.manual_seed(0)
        model = tiny("bert-classifier")
        adapters = inarch.attach(model)
        for name in "ab":
            adapters.add(name, "seq_bn[reduction_factor=4,init_weights_seed=1]")
        adapters.train(setup)
        inputs = tiny_inputs("bert-classifier", batch=4)
        rows = [{key: value[n] for key, value in inputs.items()} | {"labels": n % 2, **more} for n in range(4)]
        AdapterTrainer(model, arguments(tmp_path, remove_unused_columns=False), train_dataset=rows).train()
        return {name: {key: value.detach() for key, value in adapters[name].items()} for name in "ab"}

    alone, told = trained("a"), trained(inarch.MultiTask("a", "b"), task_ids=0)
    assert not all(torch.equal(value, alone["b"][key]) for key, value in alone["a"].items())  # b as it starts
    for key in alone["a"]:
        torch.testing.assert_close(told["a"][key], alone["a"][key], rtol=0, atol=1e-6)
        assert torch.equal(told["b"][key], alone["b"][key])


def test_one_of_several_gpus_is_used_with_a_word(tmp_path, caplog):
    args = arguments(tmp_path)
    args._n_gpu = 2
    AdapterTrainer(grafted(), args, train_dataset=RandomImages())
    assert args.n_gpu == 1
    assert "One GPU of 2 is used" in caplog.text


def test_a_sharded_model_is_refused(tmp_path, monkeypatch):
    def init(self, *args):
        self.is_fsdp_enabled, self.is_deepspeed_enabled = True, False

    monkeypatch.setattr(Trainer, "__init__", init)
    with pytest.raises(SetupError, match=r"whole model each; got FSDP or DeepSpeed"):
        AdapterTrainer(grafted(), arguments(tmp_path))


def test_saving_the_model_writes_adapter_folders(tmp_path):
    model = grafted()
    trainer = trainer_of(model, tmp_path / "run")
    trainer.save_model(str(tmp_path / "saved"))
    assert [str(path.relative_to(tmp_path)) for path in sorted(Path(tmp_path / "saved").rglob("*.safetensors"))] == [
        "saved/adapters/a/adapter.safetensors"
    ]


def test_fusion_layers_are_trained_with_their_penalty_and_kept_in_checkpoints(tmp_path):
    model = tiny("vit-classifier")
    adapters = inarch.attach(model)
    for name in "ab":
        adapters.add(name, "seq_bn")
    block = inarch.Fuse("a", "b")
    adapters.add_fusion(block)
    adapters.train(block)
    adapters["a+b"]["image0.0.mlp.fusion.value.weight"].data += 1.0
    before = {name: [p.detach().clone() for p in adapters[name].values()] for name in ("a", "a+b")}
    trainer = trainer_of(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    assert not any(".fusion." in name for name in trainer.get_decay_parameter_names(model))
    batch = {"pixel_values": RandomImages()[0]["pixel_values"][None], "labels": torch.tensor([0])}
    model.eval()
    plain = trainer.compute_loss(model, dict(batch)).item()
    model.train()
    assert adapters.penalty().item() > 1
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(plain + adapters.penalty().item(), rel=1e-4)
    trainer.train()
    assert all(torch.equal(p, old) for p, old in zip(adapters["a"].values(), before["a"], strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(adapters["a+b"].values(), before["a+b"], strict=True))
    assert [place.name for place in (tmp_path / "checkpoint-2" / resume.ADAPTERS).iterdir()] == ["a+b"]
