"""Gradient checkpointing, reentrant or not, changes no gradient of an adapter."""

import copy

import pytest
import torch
from little_adapters import awake
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import inarch
from inarch import SetupError
from inarch.testing import tiny, tiny_inputs

CONFIG = "double_seq_bn[original_ln_before=True,dropout=0.2]|lora[init_weights=bert,dropout=0.2]"


def trainable(name):
    """A tiny model in training with an awake adapter: all dropouts are on."""
    model = tiny(name)
    adapters = inarch.attach(model)
    adapters.add("a", CONFIG)
    awake(adapters, "a")
    adapters.train("a")
    return model.train(), adapters


def gradients(model, adapters, name):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    found = model(**tiny_inputs(name))
    last = found.logits if "logits" in found else found.last_hidden_state
    (last * torch.linspace(-1, 1, last.shape[-1])).sum().backward()
    return {key: p.grad for key, p in adapters["a"].items()}


def checkpoint(model, **options):
    is_renamed = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if is_renamed else model.gradient_checkpointing_enable)(options)


# Stages of layers are checkpoints around checkpoints, whose inputs require gradients in the second pass only.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["without reentry", "reentrant"])
@pytest.mark.parametrize("name", ["vit-classifier", "swin", "whisper"])  # the contract has others, without dropout
def test_gradients_are_those_without_checkpointing(name, reentrant):
    model, adapters = trainable(name)
    expected = gradients(model, adapters, name)
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    checkpoint(model, use_reentrant=reentrant)
    found = gradients(model, adapters, name)
    for key, gradient in expected.items():
        # An encoder's output gets the gradients of the decoder's layers in another order.
        assert torch.allclose(found[key], gradient, rtol=1e-5, atol=1e-6), key


def test_every_layer_runs_twice_under_checkpointing():
    """The test above would pass if checkpointing were not on."""
    calls = []
    for checkpointed in (False, True):
        model, adapters = trainable("vit-classifier")
        if checkpointed:
            checkpoint(model, use_reentrant=True)
        model.vit.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        gradients(model, adapters, "vit-classifier")
    assert len(calls) == 1 + 2


def test_without_our_answer_reentrant_checkpointing_trains_no_adapter():
    model, adapters = trainable("vit-classifier")
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        vars(model).pop(name, None)
    checkpoint(model, use_reentrant=True)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        found = gradients(model, adapters, "vit-classifier")
    assert all(gradient is None for gradient in found.values())


def test_checkpointing_that_was_on_before_attaching_trains_adapters():
    model = tiny("vit-classifier")
    checkpoint(model, use_reentrant=True)
    adapters = inarch.attach(model)
    adapters.add("a", CONFIG)
    adapters.train("a")
    model.train()
    assert all(gradient is not None for gradient in gradients(model, adapters, "vit-classifier").values())


def test_detach_and_copies_have_their_own_answer():
    model, adapters = trainable("vit-classifier")
    checkpoint(model, use_reentrant=True)
    other = copy.deepcopy(model)
    adapters.detach()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        assert not model.requires_grad_(False)(**tiny_inputs("vit-classifier")).logits.requires_grad
    assert not any(name.endswith("checkpointing_enable") for name in vars(model))
    found = gradients(other, inarch.attach(other), "vit-classifier")
    assert all(gradient is not None for gradient in found.values())


def test_reentrant_checkpointing_of_a_model_that_names_no_embeddings_is_refused(monkeypatch):
    model, _ = trainable("vit-classifier")
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            monkeypatch.setattr(type(module), "get_input_embeddings", lambda _: None)
    checkpoint(model, use_reentrant=False)
    with pytest.raises(SetupError, match=r"only where the input embeddings are known.*ViTForImageClassification"):
        checkpoint(model, use_reentrant=True)


@pytest.mark.parametrize("reentrant", [False, True], ids=["without reentry", "reentrant"])
def test_layers_do_not_run_again_with_another_setup(reentrant):
    """The second adapter would get the gradients of the first, or none would."""
    model, adapters = trainable("vit-classifier")
    adapters.add("b", CONFIG)
    adapters.add("c", "seq_bn")
    inputs = tiny_inputs("vit-classifier")
    checkpoint(model, use_reentrant=reentrant)

    def loss():
        return model(**inputs).logits.square().sum()

    first = loss()
    adapters.activate("b")
    with pytest.raises(SetupError, match="with the setup of their forward; got `b` after `a` in ViTForImageClassif"):
        first.backward()
    both = first = loss()
    adapters.activate("a")
    both = both + loss()
    with pytest.raises(SetupError, match="got `a` after `b`"):
        both.backward()
    adapters.activate(inarch.Stack("a", "c"))
    with adapters.using("a", skip_layers=[1]):
        first = loss()
    with pytest.raises(SetupError, match=r"got `Stack\('a', 'c'\)` after `a` without layers 1 in"):
        first.backward()
    first = loss()
    adapters.deactivate()
    with pytest.raises(SetupError, match="got no setup after"):
        first.backward()

    adapters.activate("a")
    first = loss()
    with adapters.using("b"):
        loss().backward()
    model.zero_grad(set_to_none=True)
    first.backward()  # that of its forward is active again
    assert all(p.grad is not None for p in adapters["a"].values())


def test_a_detached_model_checkpoints_as_it_did():
    model, adapters = trainable("vit-classifier")
    checkpoint(model, use_reentrant=False)
    other = copy.deepcopy(model)
    adapters.detach()
    own = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    assert any(own) and not any(type(function).__module__.startswith("inarch") for function in own)
    handle = inarch.attach(other)
    handle.add("b", "seq_bn")
    loss = other(**tiny_inputs("vit-classifier")).logits.sum()
    handle.activate("b")
    with pytest.raises(SetupError, match="got `b` after `a`"):
        loss.backward()


class Images(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index)), "labels": 0}


def test_the_plain_trainer_learns_the_same_with_checkpointing(tmp_path):
    found = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        torch.manual_seed(0)
        model, adapters = trainable("vit-classifier")
        start = {key: p.detach().clone() for key, p in adapters["a"].items()}
        word = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
        checkpointing = {f"{word}_checkpointing": True, f"{word}_checkpointing_kwargs": options} if options else {}
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            disable_tqdm=True, save_strategy="no", learning_rate=1e-2, **checkpointing,
        )  # fmt: skip
        Trainer(model, args, train_dataset=Images()).train()
        assert all(not torch.equal(start[key], p) for key, p in adapters["a"].items())
        found.append(dict(adapters["a"]))
    for other in found[1:]:
        assert all(torch.allclose(found[0][key], other[key], atol=1e-6) for key in other)
