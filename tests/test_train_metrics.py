"""The loss and the metrics of a classification, against those of torch, transformers and scikit-learn."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score

from inarch.testing import tiny
from inarch.train.metrics import loss_function, metrics_function, only_logits
from inarch.train.order import IGNORED


@pytest.fixture
def logits():
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def several(logits):
    return (torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) < 0.4).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_one_label_is_cross_entropy(logits, smoothing):
    labels = torch.arange(12) % 5
    found = loss_function("single_label", smoothing)({"logits": logits}, labels)
    assert torch.allclose(found, F.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_the_loss_is_that_of_the_model_itself():
    model = tiny("vit-classifier")
    pixels, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    with torch.no_grad():
        outputs = model(pixel_values=pixels, labels=labels)
    assert torch.allclose(loss_function("single_label")(outputs, labels), outputs.loss)


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_the_losses_of_parts_add_up_to_that_of_the_whole(logits, several, task):
    labels = torch.arange(12) % 5 if task == "single_label" else several
    loss = loss_function(task, 0.1 if task == "single_label" else 0.0)
    whole = loss(logits, labels)
    parts = [loss(logits[part], labels[part], labels.numel()) for part in (slice(0, 7), slice(7, 8), slice(8, 12))]
    assert torch.allclose(sum(parts), whole)
    assert torch.allclose(whole, F.binary_cross_entropy_with_logits(logits, several)) or task == "single_label"


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_a_blank_adds_nothing_to_loss_or_gradient(logits, several, task):
    labels = torch.arange(12) % 5 if task == "single_label" else several.clone()
    logits.requires_grad_(True)
    labels[5] = IGNORED
    kept = [index for index in range(12) if index != 5]
    loss = loss_function(task)
    found = loss(logits, labels)
    found.backward()
    assert torch.allclose(found, loss(logits[kept], labels[kept]))
    assert logits.grad[5].abs().sum() == 0
    assert loss(logits[5:6], labels[5:6], 10) == 0


def measure(task, logits, labels):
    return metrics_function(task)(types.SimpleNamespace(predictions=logits.numpy(), label_ids=labels.numpy()))


def test_accuracy_and_loss_of_one_label(logits):
    labels = torch.arange(12) % 5
    found = measure("single_label", logits, labels)
    assert found == {
        "loss": pytest.approx(float(F.cross_entropy(logits, labels))),
        "accuracy": pytest.approx(float((logits.argmax(1) == labels).float().mean())),
    }


def test_scores_of_several_labels_are_those_of_scikit_learn(logits, several):
    found = measure("multi_label", logits, several)
    chosen = logits.sigmoid().numpy() >= 0.5
    truth = several.numpy().astype(int)
    assert found["micro_f1"] == pytest.approx(f1_score(truth, chosen, average="micro"))
    assert found["mean_average_precision"] == pytest.approx(
        average_precision_score(truth, logits.numpy(), average="macro")
    )
    assert found["accuracy"] == pytest.approx(np.mean((truth == chosen).all(axis=1)))
    assert found["loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, several)))


def test_a_label_that_no_image_has_is_left_out_of_the_mean(logits, several):
    several[:, 2] = 0
    found = measure("multi_label", logits, several)
    rest = [0, 1, 3, 4]
    assert found["mean_average_precision"] == pytest.approx(
        average_precision_score(several[:, rest].numpy(), logits[:, rest].numpy(), average="macro")
    )
    assert measure("multi_label", logits, torch.zeros_like(several))["mean_average_precision"] == 0


def test_models_that_return_more_than_logits_are_measured_by_their_logits(logits):
    assert only_logits((logits, None), None) is logits
    assert only_logits(logits, None) is logits
