"""The demonstration, shortened: what it writes, what it compares, and what it leaves alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inarch.cli import demo as command
from inarch.core.errors import InarchError, StateError
from inarch.data import load_data
from inarch.data.examples import ImageData
from inarch.train import demo as demonstration
from inarch.train.demo import NUM_SEEDS, RECIPE, WAYS, Audience, compare, run_demo
from inarch.train.predict import Prediction

ROOT = Path(__file__).parent.parent


def few_digits():
    """A part of the digits: enough to train a few steps on."""
    whole = load_data("digits")
    return ImageData(
        name=whole.name,
        task=whole.task,
        labels=whole.labels,
        train=whole.train.pick(range(64)),
        validation=whole.validation.pick(range(0, 400, 5)),
        mirror_safe=False,
        crop_safe=whole.crop_safe,
    )


# The figures that are told of it


FIGURES = json.loads((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))


def check_promise(found):
    """What the demonstration is made to show: an adapter does better than a head, and unsound wiring far worse."""
    head, sound, unsound = (found[way.key]["accuracy"] for way in WAYS)
    assert 0.95 < head <= sound - 0.005
    assert unsound < sound - 0.1
    assert [found[way.key]["sound"] for way in WAYS] == [True, True, False]


def test_the_figures_on_record_are_those_of_this_demonstration():
    """Made anew by `scripts/demo_figures.py` where it changes."""
    for key, recipe in (("short", RECIPE), ("longer", RECIPE.replace(epochs=12))):
        found = FIGURES[key]
        assert found["recipe"] == recipe.to_dict()
        assert [found[way.key]["configuration"] for way in WAYS] == [way.adapter for way in WAYS]
        assert [len(found[way.key]["seeds"]) for way in WAYS] == [NUM_SEEDS if way.repeats else 1 for way in WAYS]
        assert found["data"] == {"name": "digits", "train": 1397, "validation": 400}
    check_promise(FIGURES["short"])


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_readmes_tell_the_figures_on_record(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[0:1] == "|" and "`y = " in line
    ]
    short, longer = FIGURES["short"], FIGURES["longer"]
    formulas = [short[way.key]["formulas"] or ["y = x + h"] for way in WAYS]
    assert [row[1:] for row in rows] == [
        [f"`{formula}`", f"{short[way.key]['accuracy']:.1%}".replace("%", " %"), f"{size:,}"]
        for way, (formula,) in zip(WAYS, formulas, strict=True)
        for size in [short[way.key]["trainable_parameters"]]
    ]
    assert f"{short['adapter_bytes'] / 1e3:.0f} kB" in text
    after = [f"{longer[way.key]['accuracy'] * 100:.1f}" for way in WAYS]
    assert re.search(r"12 .*?" + r".{1,8}?".join(map(re.escape, after)), text)


@pytest.mark.skipif("INARCH_FULL_DEMO_TEST" not in os.environ, reason="takes minutes; set INARCH_FULL_DEMO_TEST=1")
def test_a_demonstration_that_is_run_now_finds_what_is_on_record(tmp_path):
    found = run_demo(tmp_path / "demo").to_dict()
    check_promise(found)
    for way in WAYS:
        told = FIGURES["short"][way.key]
        assert found[way.key]["accuracy"] == pytest.approx(told["accuracy"], abs=0.015)
        assert found[way.key]["trainable_parameters"] == told["trainable_parameters"]


class Listener(Audience):
    """Remembers what it is told."""

    def __init__(self):
        self.heard = []

    def begin(self, way, report, num_runs):
        self.heard.append((way.key, None if report is None else report.sound, num_runs))

    def step(self, run, done, total, accuracy):
        assert 0 <= done <= total
        self.heard.append(("step", run))

    def finish(self, outcome):
        self.heard.append(("finish", outcome.way.key))

    def reload(self):
        self.heard.append("reload")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A shortened demonstration, over what an earlier one left: its folder, its result, and what was told of it."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "old.png").touch()
    (folder / "results.json").write_text("{}")
    listener = Listener()
    result = run_demo(folder, audience=listener, recipe=RECIPE.replace(epochs=1), num_seeds=2, data=few_digits())
    return folder, result, listener.heard


def test_the_results_are_written(shown):
    """Every number that the demonstration is about is in one file."""
    folder, result, _ = shown
    found = json.loads((folder / "results.json").read_text())
    assert found == json.loads(json.dumps(result.to_dict()))
    for key, seeds in (("head_only", ["0"]), ("seq_bn", ["0", "1"]), ("unsound", ["0"])):
        assert 0 <= found[key]["accuracy"] <= found[key]["best_accuracy"] <= 1
        assert list(found[key]["seeds"]) == seeds
        assert found[key]["seconds"] > 0
    assert found["head_only"]["trainable_parameters"] < found["seq_bn"]["trainable_parameters"]
    assert found["seq_bn"]["trainable_parameters"] == found["unsound"]["trainable_parameters"]
    assert (found["seq_bn"]["sound"], found["unsound"]["sound"]) == (True, False)
    assert found["unsound"]["verdicts"] == ["skip connection lost"]
    assert found["adapter_bytes"] == (folder / "adapter" / "adapter.safetensors").stat().st_size
    assert found["seeds"] == [0, 1]
    assert {"python", "torch", "transformers", "inarch"} <= found["versions"].keys()


def test_a_fresh_process_predicts_the_same(shown):
    """The adapter is all that has to be kept."""
    reload = shown[1].reload
    assert reload.num_images == 10
    assert reload.identical_labels
    assert reload.max_probability_difference < 1e-5


def test_the_pictures_are_not_blank(shown):
    """Each has something on it and is large enough to read."""
    for name in ("digits.png", "curves.png"):
        picture = Image.open(shown[0] / name).convert("L")
        assert min(picture.size) > 600
        assert np.asarray(picture).std() > 5


def test_the_folder_holds_the_demonstration_and_nothing_else(shown):
    """The earlier one is replaced; there are no checkpoints and no drafts."""
    folder = shown[0]
    names = {"results.json", "digits.png", "curves.png", "images", "adapter", "head_only", "seq_bn", "unsound"}
    assert {entry.name for entry in folder.iterdir()} == names
    assert sorted(path.name for path in (folder / "images").iterdir()) == [f"{digit}.png" for digit in range(10)]
    assert list(folder.rglob("checkpoint*")) == []
    assert [entry.name for entry in folder.parent.iterdir()] == ["demo"]


def test_the_images_are_the_held_out_ones_to_the_pixel(shown):
    """Predicting the files is predicting the data."""
    held = few_digits().validation
    for digit in range(10):
        first = next(held[index][0] for index in range(len(held)) if held.label(index) == digit)
        assert np.array_equal(np.asarray(Image.open(shown[0] / "images" / f"{digit}.png")), first)


def test_the_audience_hears_the_verdicts_before_the_training(shown):
    """In the order of the ways, each judged, trained and finished."""
    heard = shown[2]
    main = [event for event in heard if event[0] != "step"]
    assert main == [
        ("head_only", None, 1),
        ("finish", "head_only"),
        ("seq_bn", True, 2),
        ("finish", "seq_bn"),
        ("unsound", False, 1),
        ("finish", "unsound"),
        "reload",
    ]
    assert ("step", 2) in heard


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    """Nothing is deleted that no demonstration has written."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StateError, match=r"holds `thesis\.tex`"):
        run_demo(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_interrupted_demonstration_leaves_the_earlier_one(tmp_path, monkeypatch):
    """The folder is replaced in one step, at the end."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "results.json").write_text("{}")

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demonstration, "train_run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(folder, data=few_digits())
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]
    assert [entry.name for entry in folder.iterdir()] == ["results.json"]


def test_predictions_are_compared_label_by_label():
    """The largest difference of any probability, whatever the order."""
    ours = [Prediction("a", (("x", 0.75), ("y", 0.25)))]
    theirs = [Prediction("a", (("y", 0.5), ("x", 0.5)))]
    found = compare(ours, theirs)
    assert (found.num_images, found.identical_labels, found.max_probability_difference) == (1, False, 0.25)
    assert compare(ours, ours).identical_labels


def test_a_failure_of_the_fresh_process_is_told(tmp_path, monkeypatch):
    """With what it said."""
    done = subprocess.CompletedProcess([sys.executable], 1, "", "Error: it broke")
    monkeypatch.setattr(demonstration.subprocess, "run", lambda *_args, **_options: done)
    with pytest.raises(InarchError, match="exit code 1: Error: it broke"):
        demonstration._predict_in_fresh_process(tmp_path, [], 10)


def test_what_to_try_next_begins_with_a_program_that_is_there(shown, monkeypatch, capsys):
    for found, started, words in (
        ("/usr/bin/inarch", "inarch", "  inarch predict"),
        (None, ".venv/bin/inarch", "  .venv/bin/inarch predict"),
        (None, "/x/inarch/__main__.py", f"  {sys.executable} -m inarch predict"),
    ):
        monkeypatch.setattr("shutil.which", lambda _, found=found: found)
        monkeypatch.setattr(sys, "argv", [started])
        command._say_result(shown[1], has_page=False)
        told = capsys.readouterr().out
        assert words in told
    assert "best epoch" in told and "chosen on the same held-out digits" in " ".join(told.split())


def test_the_page_of_the_demonstration(shown, tmp_path, monkeypatch, capsys):
    """Made of what is in its folder, and no obstacle to the next one; without its packages it is left out."""
    folder = tmp_path / "demo"
    shutil.copytree(shown[0], folder)
    assert command._write_page(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in ("head_only", "seq_bn", "unsound", "skip connection lost", "residual_before_ln=False", "image0.5.mlp"):
        assert words in page
    demonstration._check_replaceable(folder)
    (folder / "report.html").unlink()
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    assert not command._write_page(folder)
    assert not (folder / "report.html").exists()
    assert 'pip install "inarch[report]"' in capsys.readouterr().err
