"""The demonstration backbones beside the ViT, and the script that makes all of them."""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.cli import main
from backbones.recipes import RECIPES
from backbones.training import lr_multiplier
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

import inarch
from backbones import language, letters

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "backbones"
FOLDERS = {"vit": ROOT / "src" / "inarch" / "assets" / "demo_backbone"} | {
    name: SHIPPED / name for name in ("dinov2", "swinv2", "bert")
}
OTHERS = [name for name in FOLDERS if name != "vit"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few held-out examples and bitmaps; gives torch's thread count and random state back."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    monkeypatch.setattr(letters, "TRAINING_FONTS", letters.TRAINING_FONTS[:1])
    monkeypatch.setattr(letters, "HELD_OUT_COPIES", 1)
    monkeypatch.setattr(language, "NUM_HELD_OUT", 20)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def load(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A backbone with a new head of ten classes, and what loading it reported."""
    kind = AutoModelForSequenceClassification if name == "bert" else AutoModelForImageClassification
    return kind.from_pretrained(folder, num_labels=10, output_loading_info=True)


def describe(folder: Path) -> dict[str, Any]:
    """The configuration, without by which version of transformers it was written."""
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key != "transformers_version"}


# ----------------------------------------------------------------------------------------------------------------------
# The files


def test_there_is_a_folder_for_each_recipe():
    assert set(RECIPES) == set(FOLDERS)
    assert {path.name for path in SHIPPED.iterdir()} == {*OTHERS, "README.md"}


@pytest.mark.parametrize("name", OTHERS)
def test_files_are_few_and_small(name):
    settings = "vocab.txt" if name == "bert" else "preprocessor_config.json"
    files = {path.name: path.stat().st_size for path in FOLDERS[name].iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "training_log.csv", settings}
    assert sum(files.values()) < 3_000_000
    weights = load_file(FOLDERS[name] / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert all(key.startswith(RECIPES[name].trunk) and weight.isfinite().all() for key, weight in weights.items())


@pytest.mark.parametrize("name", OTHERS)
def test_the_readme_is_true(name):
    """It calls the folder what it is, names the licence, and has the command, size and hash of what is there."""
    text = " ".join((FOLDERS[name] / "README.md").read_text().split())
    size = sum(weight.numel() for weight in load_file(FOLDERS[name] / "model.safetensors").values())
    assert "Demonstration backbone" in text and "Apache-2.0" in text and "Not for use" in text
    command = re.search(rf"python scripts/backbones {name} --steps (\d+) --batch-size \d+ --threads 1 --seed 0", text)
    assert f"{size:,} parameters" in text and f"{size:,}" in (SHIPPED / "README.md").read_text()
    assert hashlib.sha256((FOLDERS[name] / "model.safetensors").read_bytes()).hexdigest() in text
    with (FOLDERS[name] / "training_log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["step"] == command[1]
    assert f"{100 * float(rows[-1]['held_out_accuracy']):.1f} %" in text
    assert float(rows[-1]["held_out_accuracy"]) > 0.5 > float(rows[0]["held_out_accuracy"])


@pytest.mark.parametrize("name", OTHERS)
def test_loads_with_a_fresh_head(name):
    model, info = load(name, FOLDERS[name])
    assert info.pop("missing_keys") == {"classifier.weight", "classifier.bias"}
    assert not any(info.values())
    assert type(model).__name__ == RECIPES[name].used_as
    assert model.dtype == torch.float32


ARRANGEMENTS = {"vit": "pre", "dinov2": "pre", "swinv2": "branch", "bert": "post"}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_arrangement_is_the_one_that_is_claimed(name):
    model, _ = load(name, FOLDERS[name])
    sites = inarch.probe(model)
    assert {site.arrangement for site in sites} == {ARRANGEMENTS[name]}
    assert [site.key.split(".")[-1] for site in sites].count("mlp") == 6


def test_layer_scales_are_learned_and_scale():
    scales = [w for key, w in load_file(FOLDERS["dinov2"] / "model.safetensors").items() if "layer_scale" in key]
    assert len(scales) == 12
    for scale in scales:
        assert scale.float().std() > 0.01 and scale.float().mean() < 0.5


def test_the_vocabulary_is_the_languages():
    assert tuple((FOLDERS["bert"] / "vocab.txt").read_text().split("\n")[:-1]) == language.WORDS
    assert len(language.WORDS) == AutoConfig.from_pretrained(FOLDERS["bert"]).vocab_size


# ----------------------------------------------------------------------------------------------------------------------
# Letters


def test_letters_only():
    """No digit is ever drawn or named, and every letter has a class."""
    assert all(name.isascii() and name.isalpha() and len(name) == 1 for name in letters.CLASSES)
    assert all(letter.isascii() and letter.isalpha() for letter in letters.LETTERS)
    assert len(letters.LETTERS) == 52
    assert {letters.class_name(letter) for letter in letters.LETTERS} == set(letters.CLASSES)


def test_held_out_font_is_held_out():
    """The font that measures held-out accuracy is never trained on."""
    assert letters.HELD_OUT_FONT in letters.FONTS
    assert letters.HELD_OUT_FONT not in letters.TRAINING_FONTS


def test_rendering():
    """Every letter gives one bitmap per stroke width, within 0..1, inked, labelled, and the same every time."""
    bitmaps, labels = letters.render_letters([letters.HELD_OUT_FONT])
    assert bitmaps.shape == (3 * 52, 1, letters.CANVAS, letters.CANVAS)
    assert labels.shape == (3 * 52,)
    assert set(labels.tolist()) == set(range(len(letters.CLASSES)))
    assert bitmaps.min() == 0 and bitmaps.max() <= 1
    ink = bitmaps.sum(dim=(1, 2, 3)).view(3, 52)
    assert (ink[0] > 0).all()
    assert (ink.diff(dim=0) > 0).all()  # the three blocks go from thin to thick
    assert torch.equal(letters.render_letters([letters.HELD_OUT_FONT])[0], bitmaps)


def test_distortion():
    """Images have the model's shape and range, three equal channels, and depend on nothing but the seed."""
    bitmaps, _ = letters.render_letters([letters.HELD_OUT_FONT])
    images = letters.Distortion(seed=3)(bitmaps)
    assert images.shape == (len(bitmaps), 3, letters.IMAGE, letters.IMAGE)
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert torch.equal(letters.Distortion(seed=3)(bitmaps), images)
    assert not torch.equal(letters.Distortion(seed=4)(bitmaps), images)


# ----------------------------------------------------------------------------------------------------------------------
# The made language


def test_words_are_distinct_and_no_digits():
    assert len(set(language.WORDS)) == len(language.WORDS) == 5 + 7 + 16 * 160
    assert not any(character.isdigit() for word in language.WORDS for character in word)


def test_the_new_titles_are_new():
    assert len(language.NEW_TITLES) == 10
    assert not set(language.NEW_TITLES) & set(language.TRAINING_TITLES)


def test_documents_are_of_their_title():
    """Each is [CLS], three sentences with a full stop, [SEP]; 70 % + 30 % x 3/16 of the words are of its themes."""
    documents, labels = language.labelled_documents(2_000, seed=5)
    assert documents.shape == (2_000, language.LENGTH)
    assert (documents[:, 0] == language.CLS).all() and (documents[:, -1] == language.SEP).all()
    stop = language.WORDS.index(".")
    assert (documents == stop).sum(dim=1).tolist() == [3] * 2_000
    assert labels.bincount().tolist() == [200] * 10
    theme = (documents - language.FIRST_CONTENT_WORD) // 160
    own = (theme.unsqueeze(-1) == torch.tensor(language.NEW_TITLES)[labels].unsqueeze(1)).any(-1)
    share = own[documents >= language.FIRST_CONTENT_WORD].float().mean().item()
    assert share == pytest.approx(0.7 + 0.3 * 3 / 16, abs=0.01)
    assert torch.equal(language.labelled_documents(2_000, seed=5)[0], documents)
    assert not torch.equal(language.labelled_documents(2_000, seed=6)[0], documents)


# ----------------------------------------------------------------------------------------------------------------------
# The script


def test_learning_rate_warms_up_and_decays():
    """Linear up to 1 over the warm-up, then down to nearly 0."""
    rates = [lr_multiplier(step, steps=100, warmup_ratio=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(1) and rates[-1] < 0.001


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_write_a_loadable_checkpoint(name, tmp_path):
    """A tiny run writes what ships (README aside) and loads without a missing weight."""
    main([name, "--steps", "2", "--batch-size", "4", "--threads", "1", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in FOLDERS[name].iterdir()} - {"README.md"}
    assert describe(tmp_path) == describe(FOLDERS[name])
    _, info = load(name, tmp_path)
    assert info.pop("missing_keys") == {"classifier.weight", "classifier.bias"}
    assert not any(info.values())
    if name != "bert":
        assert AutoImageProcessor.from_pretrained(tmp_path).size == {"height": 32, "width": 32}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["dinov2", "bert"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(name, tmp_path, monkeypatch):
    options = [name, "--steps", "3", "--batch-size", "4", "--seed", "7", "--threads", "1", "--log-every", "1"]
    main([*options, "--out", str(tmp_path / "whole")])
    task, calls = RECIPES[name].task, []
    kept = task.loss

    def stops(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return kept(*given)

    with monkeypatch.context() as patch:
        patch.setattr(task, "loss", stops)
        with pytest.raises(KeyboardInterrupt):
            main([*options, "--out", str(tmp_path / "stopped")])
    assert (tmp_path / "stopped" / "checkpoint.pt").exists()
    main([*options, "--out", str(tmp_path / "stopped")])
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()
    assert not (tmp_path / "stopped" / "checkpoint.pt").exists()
