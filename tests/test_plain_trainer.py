"""`transformers.Trainer`, unchanged, with a model that has adapters: saving, resuming, the best checkpoint."""

import pytest
import torch
from little_runs import Killed, RandomImages, StopAt, same, weights
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

import inarch
from inarch.core.errors import StateError
from inarch.handle import attached
from inarch.testing import tiny

pytestmark = pytest.mark.usefixtures("little_garbage")


def grafted():
    model = tiny("vit-classifier")
    adapters = inarch.attach(model)
    torch.manual_seed(1)
    adapters.add("a", "adapter_plus[reduction_factor=4,dropout=0.2]")
    adapters.train("a")
    return model


def trainer_of(model, folder, callbacks=(), **changes):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "epoch",
        "logging_strategy": "no",
    }
    args = TrainingArguments(**options | changes)
    return Trainer(model, args, train_dataset=RandomImages(), eval_dataset=RandomImages(), callbacks=list(callbacks))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole training: its folder and its model."""
    folder, model = tmp_path_factory.mktemp("finished"), grafted()
    trainer_of(model, folder).train()
    return folder, model


def test_training_leaves_the_base_as_it_was(finished):
    _, model = finished
    before, after = weights(grafted()), weights(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_resumed_training_ends_with_the_same_weights_bit_for_bit(finished, tmp_path):
    with pytest.raises(Killed):
        trainer_of(grafted(), tmp_path, callbacks=[StopAt(8)]).train()
    resumed = grafted()
    with torch.no_grad():
        for parameter in (*attached(resumed)["a"].values(), *resumed.classifier.parameters()):
            parameter.zero_()  # so that it matters what the checkpoint brings
    trainer_of(resumed, tmp_path).train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(finished[1]))


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
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the wrong direction, so that the best is not the last
    )
    trainer.train()
    assert trainer.state.best_global_step == 6
    assert not same(seen[6], seen[12])
    assert same(weights(model), seen[6])


def test_a_checkpoint_loads_as_the_base_without_a_word_about_adapters(finished):
    folder, model = finished
    base, info = AutoModelForImageClassification.from_pretrained(folder / "checkpoint-12", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    own = {key: tensor for key, tensor in weights(model).items() if ".inarch." not in key}
    assert same(weights(base), own)


def test_the_adapter_of_a_checkpoint_loads_on_the_original_base(finished):
    folder, model = finished
    other = tiny("vit-classifier")
    adapters = inarch.attach(other)
    adapters.activate(adapters.load(folder / "checkpoint-12/adapters/a"))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(other.eval()(pixels).logits, model.eval()(pixels).logits)


def test_saving_the_model_keeps_the_adapter(finished, tmp_path):
    _, model = finished
    trainer_of(model, tmp_path / "run").save_model(str(tmp_path / "saved"))
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    adapters = inarch.attach(base)
    adapters.activate(adapters.load(tmp_path / "saved/adapters/a"))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(base.eval()(pixels).logits, model.eval()(pixels).logits)


def test_a_checkpoint_without_the_adapter_is_refused(finished, tmp_path):
    plain = tiny("vit-classifier")
    trainer_of(plain, tmp_path, num_train_epochs=1).train()
    with pytest.raises(StateError, match=r"A state dict for a model with adapters holds them all"):
        trainer_of(grafted(), tmp_path).train(resume_from_checkpoint=True)


def test_a_text_model_is_trained_and_resumed(tmp_path):
    class Words(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            words = torch.randint(3, 99, (7,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": words, "labels": index % 3}

    def build():
        model = tiny("bert-classifier")
        adapters = inarch.attach(model)
        torch.manual_seed(1)
        adapters.add("a", "double_seq_bn[dropout=0.2]")
        adapters.train("a")
        return model

    def train(model, folder, resume=False, callbacks=()):
        trainer = trainer_of(model, folder, callbacks=callbacks)
        trainer.train_dataset = trainer.eval_dataset = Words()
        trainer.train(resume_from_checkpoint=resume)

    whole = build()
    train(whole, tmp_path / "whole")
    with pytest.raises(Killed):
        train(build(), tmp_path / "parts", callbacks=[StopAt(3)])
    resumed = build()
    train(resumed, tmp_path / "parts", resume=True)
    assert same(weights(resumed), weights(whole))
