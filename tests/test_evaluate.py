"""Evaluation: the scores, and whether the labels of data and adapter agree."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from inarch.core.errors import DataError
from inarch.data.examples import Examples, ImageData
from inarch.train.evaluate import check_labels, evaluate, score

LABELS = ["cat", "dog", "owl"]


class Bright:
    """A predictor that tells images apart by the brightness of their first pixel: 0 cat, 100 dog, 200 owl."""

    labels = ("owl", "cat", "dog")
    task = "single_label"

    def batches(self, images, *, batch_size):
        for start in range(0, len(images), batch_size):
            sources = [images[index] for index in range(start, min(start + batch_size, len(images)))]
            seen = [("cat", "dog", "owl")[int(source[0, 0, 0]) // 100] for source in sources]
            yield sources, np.eye(3, dtype=np.float32)[[self.labels.index(name) for name in seen]]


def make_data(shown, labels=LABELS, brightness=None, task="single_label"):
    """Images of these labels, as bright as a predictor expects unless told otherwise."""
    levels = brightness or [{"cat": 0, "dog": 100, "owl": 200}[name] for name in shown]
    images = [np.full((4, 4, 3), level, dtype=np.uint8) for level in levels]
    examples = Examples(images, [labels.index(name) for name in shown], len(labels))
    return ImageData(name="zoo", task=task, labels=list(labels), train=examples, validation=examples)


def test_scores_are_those_of_the_library():
    """Accuracy, F1 and the confusion matrix of random predictions."""
    rng = np.random.default_rng(0)
    targets, probabilities = rng.integers(0, 3, 50), rng.random((50, 3), dtype=np.float32)
    found = score("zoo", "single_label", LABELS, targets, probabilities)
    chosen = probabilities.argmax(axis=1)
    assert found.accuracy == pytest.approx(accuracy_score(targets, chosen))
    assert found.macro_f1 == pytest.approx(f1_score(targets, chosen, average="macro"))
    assert [row.f1 for row in found.labels] == pytest.approx(list(f1_score(targets, chosen, average=None)))
    assert np.array(found.confusion).sum() == 50
    assert np.trace(np.array(found.confusion)) == round(found.accuracy * 50)
    assert [row.support for row in found.labels] == [int((targets == index).sum()) for index in range(3)]


def test_a_label_that_is_never_shown_has_no_part_in_the_mean():
    """Scores of nothing are 0 and do not pull the mean down."""
    found = score("zoo", "single_label", LABELS, np.array([0, 1]), np.eye(3, dtype=np.float32)[[0, 1]])
    assert (found.labels[2].support, found.labels[2].f1) == (0, 0.0)
    assert found.macro_f1 == 1.0


def test_several_labels_an_image():
    """An image is right if all its labels are; there is no confusion matrix."""
    targets = np.array([[1, 0, 1], [0, 1, 0]])
    probabilities = np.array([[0.9, 0.1, 0.6], [0.2, 0.7, 0.5]], dtype=np.float32)
    found = score("zoo", "multi_label", LABELS, targets, probabilities)
    assert found.accuracy == 0.5
    assert found.confusion is None
    assert [row.support for row in found.labels] == [1, 1, 1]
    assert found.labels[2].precision == 0.5
    assert score("zoo", "multi_label", LABELS, targets, probabilities, threshold=0.55).accuracy == 1.0


def test_one_label_that_an_image_may_have():
    """A single column is scored for the images that have the label."""
    targets, probabilities = np.array([[1], [0], [1]]), np.array([[0.9], [0.8], [0.1]], dtype=np.float32)
    found = score("zoo", "multi_label", ["cat"], targets, probabilities)
    assert [(row.label, row.support, row.precision, row.recall) for row in found.labels] == [("cat", 2, 0.5, 0.5)]


def test_labels_agree_by_name_whatever_their_order():
    """The adapter and two data sets have the labels in different orders."""
    for labels in (LABELS, LABELS[::-1]):
        found = evaluate(Bright(), make_data(["cat", "dog", "owl", "dog"], labels), batch_size=3)
        assert found.accuracy == 1.0
        assert [row.label for row in found.labels] == ["owl", "cat", "dog"]
    wrong = evaluate(Bright(), make_data(["cat", "dog"], brightness=[0, 200]))
    assert wrong.accuracy == 0.5
    assert wrong.confusion == ((0, 0, 0), (0, 1, 0), (1, 0, 0))


def test_progress_reaches_the_end():
    """The number of images done grows to the number of all."""
    seen = []
    evaluate(Bright(), make_data(["cat"] * 5), batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_labels_that_the_adapter_does_not_know_are_named():
    """No image is predicted then."""
    with pytest.raises(DataError, match=r"must be one of the adapter; got `yak` in `zoo`"):
        evaluate(Bright(), make_data(["cat"], [*LABELS, "yak"]))


def test_labels_that_the_data_lack_are_named_unless_allowed():
    """A subset of the labels is scored on demand."""
    data = make_data(["cat", "dog"], ["cat", "dog"])
    with pytest.raises(DataError, match=r"must be in the data; got none for `owl`"):
        evaluate(Bright(), data)
    assert evaluate(Bright(), data, subset=True).accuracy == 1.0


def test_all_disagreements_are_named_at_once():
    """Renamed labels are missing on one side and unknown on the other."""
    with pytest.raises(DataError, match=r"(?s)`kitten`.*`cat`"):
        check_labels(LABELS, make_data(["dog"], ["kitten", "dog", "owl"]))


def test_another_task_is_refused():
    """Several labels an image are not for an adapter that chooses one."""
    data = make_data(["cat", "dog", "owl"])
    with pytest.raises(DataError, match="must be of the adapter's task"):
        evaluate(Bright(), dataclasses.replace(data, task="multi_label"))


def test_nothing_to_evaluate_on_is_refused():
    """Data whose validation part is empty."""
    data = make_data(["cat", "dog", "owl"])
    with pytest.raises(DataError, match="needs an image; got none"):
        evaluate(Bright(), dataclasses.replace(data, validation=data.validation.pick([])))


def test_an_evaluation_is_json_data():
    """Nothing of numpy or torch is left in it."""
    found = evaluate(Bright(), make_data(["cat", "dog", "owl"]))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["accuracy"] == 1.0
    assert data["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert data["labels"][0]["label"] == "owl"
    assert data["num_images"] == 3
