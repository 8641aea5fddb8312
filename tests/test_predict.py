"""Prediction: what is loaded, what comes out, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from little_runs import save_model
from PIL import Image
from transformers import ViTForImageClassification

import inarch
from inarch.core.errors import ConfigError, DataError, StateError
from inarch.train.models import load_model, load_processor
from inarch.train.predict import Predictor, find_adapter, find_device, load_predictor, read_processor

LABELS = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny pre-trained model and its image processor."""
    folder = tmp_path_factory.mktemp("base")
    save_model(folder)
    return folder


def make_adapter(base, folder, *, task="single_label", head=True, processor=True):
    """Save an adapter with random weights, as if it were trained; returns the model that it is active in."""
    torch.manual_seed(2)
    model = load_model(str(base), LABELS, task=task)
    adapters = inarch.attach(model)
    adapters.add("animals", "seq_bn[reduction_factor=4]")
    adapters.train("animals", head=head)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    adapters.save("animals", folder, processor=load_processor(str(base)) if processor else None)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter folder, and the model in memory that it was saved from."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return folder, make_adapter(base, folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven pictures of noise in different sizes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(7):
        size = (10 + number, 20 - number, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def edit(folder, target, **changes):
    """A copy of an adapter folder with another record."""
    shutil.copytree(folder, target)
    record = json.loads((target / "inarch.json").read_text())
    (target / "inarch.json").write_text(json.dumps(record | changes))
    return target


def test_a_loaded_adapter_predicts_what_the_saved_model_predicts(adapter, base, images):
    """Loading from disk changes no probability."""
    folder, model = adapter
    here = Predictor(model, load_processor(str(base)), LABELS)
    there = load_predictor(folder)
    for one, other in zip(here.predict(images), there.predict(images), strict=True):
        assert one == other


def test_a_run_folder_stands_for_its_adapter(adapter):
    """The folder above `adapter/` is understood."""
    folder, _ = adapter
    assert find_adapter(folder.parent) == folder
    assert find_adapter(str(folder)) == folder


def test_probabilities_are_sorted_and_add_up_to_one(adapter, images):
    """All labels are there if asked for, the likeliest first; asking for more gives no more."""
    for prediction in load_predictor(adapter[0]).predict(images, top=99):
        shares = [share for _, share in prediction.top]
        assert {label for label, _ in prediction.top} == set(LABELS)
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert prediction.to_dict()["label"] == prediction.top[0][0]


def test_the_batch_size_does_not_matter(adapter, images):
    """One by one or all at once."""
    predictor = load_predictor(adapter[0])
    one = np.concatenate([rows for _, rows in predictor.batches(images, batch_size=1)])
    every = np.concatenate([rows for _, rows in predictor.batches(images, batch_size=100)])
    assert np.allclose(one, every, atol=1e-6)


def test_predictions_come_as_soon_as_their_batch_is_done(adapter, images):
    """Only the images of the first batch are opened for the first prediction."""

    class Counted(list):
        opened = 0

        def __getitem__(self, index):
            self.opened += 1
            return super().__getitem__(index)

    counted = Counted(images)
    next(load_predictor(adapter[0]).predict(counted, batch_size=2))
    assert counted.opened == 2


def test_several_labels_are_chosen_by_their_probability(base, images, tmp_path):
    """In a multi-label task each label has a probability of its own."""
    model = make_adapter(base, tmp_path / "adapter", task="multi_label")
    predictor = load_predictor(tmp_path / "adapter")
    assert predictor.task == "multi_label"
    pixels = load_processor(str(base))(images=[Image.open(images[0])], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model(pixel_values=pixels).logits[0].sigmoid()
    for threshold in (0.0, 0.5, 1.0):
        prediction = next(predictor.predict(images[:1], threshold=threshold))
        chosen = {label for label, share in zip(LABELS, wanted.tolist(), strict=True) if share >= threshold}
        assert set(prediction.chosen) == chosen == set(prediction.to_dict()["labels"])


def test_a_bad_image_is_refused_or_left_out(adapter, images, tmp_path, caplog):
    """With `skip_bad` the others are predicted, and the bad one is announced."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    predictor = load_predictor(adapter[0])
    with pytest.raises(DataError, match=r"bad\.png"):
        list(predictor.predict([images[0], bad]))
    found = list(predictor.predict([images[0], bad, images[1]], skip_bad=True))
    assert [one.image for one in found] == [str(images[0]), str(images[1])]
    assert "bad.png" in caplog.text


def test_an_adapter_without_what_prediction_needs_is_refused(base, adapter, tmp_path):
    """A head with labels, the preprocessing, and the name of the base model."""
    make_adapter(base, tmp_path / "headless", head=False)
    with pytest.raises(StateError, match="has a task head with labels; got none"):
        load_predictor(tmp_path / "headless")
    make_adapter(base, tmp_path / "raw", processor=False)
    with pytest.raises(StateError, match="keeps its preprocessing; got none"):
        load_predictor(tmp_path / "raw")
    record = json.loads((adapter[0] / "inarch.json").read_text())
    nameless = edit(adapter[0], tmp_path / "nameless", base=record["base"] | {"id": ""})
    with pytest.raises(StateError, match="names its base model"):
        load_predictor(nameless)
    assert load_predictor(nameless, model=str(base)).labels == tuple(LABELS)


def test_labels_that_do_not_fit_the_head_are_refused(adapter, tmp_path):
    """One label more in the record than rows in the head."""
    record = json.loads((adapter[0] / "inarch.json").read_text())
    wrong = edit(adapter[0], tmp_path / "wrong", head=record["head"] | {"labels": [*LABELS, "yak"]})
    with pytest.raises(StateError, match="has shape"):
        load_predictor(wrong)


def test_another_base_model_is_refused(adapter, tmp_path):
    """The same architecture with other weights is not the base that the adapter was trained on."""
    torch.manual_seed(9)
    record = json.loads((adapter[0] / "inarch.json").read_text())
    model = ViTForImageClassification.from_pretrained(record["base"]["id"])
    with torch.no_grad():
        for parameter in model.vit.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(StateError, match="weights of an adapter's base and of the model must agree"):
        load_predictor(adapter[0], model=str(tmp_path / "other"))


@pytest.mark.parametrize("wrong", [None, "text", {}, {"image_processor_type": "NoSuchProcessor"}])
def test_preprocessing_that_is_none_is_refused(wrong):
    """Whatever stands in the record, the error is ours."""
    with pytest.raises(StateError, match="preprocessing"):
        read_processor(wrong, "there")


def test_code_that_the_preprocessing_names_is_not_run(adapter):
    """An `auto_map`, with which a processor brings its own code, is passed over."""
    settings = json.loads((adapter[0] / "inarch.json").read_text())["preprocessing"]
    processor = read_processor(settings | {"auto_map": {"AutoImageProcessor": "evil/repo--evil.Processor"}}, "there")
    assert type(processor).__module__.startswith("transformers.")


def test_outputs_that_are_no_numbers_are_refused(adapter, images):
    """A diverged adapter has nothing to say."""
    predictor = load_predictor(adapter[0])
    with torch.no_grad():
        predictor.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(StateError, match="must be finite"):
        next(predictor.predict(images))


def test_folders_without_an_adapter_are_told_apart(adapter, tmp_path):
    """An error says what a folder is instead, and what to do."""
    empty, seeds, whole, going = (tmp_path / name for name in ("empty", "seeds", "whole", "going"))
    empty.mkdir()
    shutil.copytree(adapter[0], seeds / "seed-0" / "adapter")
    (whole / "model").mkdir(parents=True)
    (whole / "model" / "config.json").touch()
    going.mkdir()
    (going / "run.json").touch()
    for folder, words in (
        (empty, "Give the folder"),
        (seeds, "seed-0/adapter"),
        (whole, "whole model"),
        (going, "--resume"),
    ):
        with pytest.raises(StateError, match=words):
            find_adapter(folder)
    with pytest.raises(StateError, match="is a folder, an archive or a Hub repository"):
        find_adapter("./nowhere")


def test_options_are_checked(adapter, images):
    """An impossible batch size and an unknown device are refused."""
    with pytest.raises(ConfigError, match="`batch_size` must be at least 1"):
        next(load_predictor(adapter[0]).predict(images, batch_size=0))
    for name in ("quantum", "cuda:99"):
        with pytest.raises(ConfigError, match="`device` must name"):
            find_device(name)
    assert find_device("cpu") == torch.device("cpu")
    assert isinstance(find_device("auto"), torch.device)


def test_paths_may_be_text_or_paths(adapter, images):
    """The name in the prediction is the path as it was given."""
    predictor = load_predictor(str(adapter[0]))
    assert next(predictor.predict([str(images[0])])).image == str(images[0])
    assert next(predictor.predict([Path(images[0])])).image == str(images[0])
