"""`inarch train`: what it prints, and one clear message with a non-zero exit code for whatever is wrong."""

import errno
import io
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from little_cifar import archive, cifar10, cifar100, unpacked
from little_runs import COLOURS, save_model, save_pictures
from PIL import Image
from transformers import BertConfig, BertModel

from inarch.cli import main
from inarch.core.records import nothing_to_resume, read_record
from inarch.train.folder import RunFolder

pytestmark = pytest.mark.usefixtures("little_garbage")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with models: a good one, and some that cannot be used."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "good")
    with torch.random.fork_rng():
        BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=9)
        ).save_pretrained(root / "text")
    shutil.copytree(root / "good", root / "blind")
    (root / "blind/preprocessor_config.json").unlink()
    shutil.copytree(root / "good", root / "weightless")
    (root / "weightless/model.safetensors").write_bytes(b"\0" * 64)
    shutil.copytree(root / "good", root / "other")
    shutil.copy(root / "text/model.safetensors", root / "other/model.safetensors")
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images by class: each class has a colour."""
    return Path(save_pictures(tmp_path_factory.mktemp("pictures"), ("red", "green")))


@pytest.fixture
def train(models, pictures, tmp_path, capsys):
    """Run `inarch train` for two steps; changes replace the options, None takes one away."""

    def run(*flags, **changes):
        options = {
            "model": models / "good",
            "data": pictures,
            "output": tmp_path / "run",
            "adapter": "seq_bn[reduction_factor=4]",
            "max_steps": 2,
            "batch_size": 8,
            "device": "cpu",
        } | changes
        words = [
            word
            for key, value in options.items()
            if value is not None
            for word in (f"--{key.replace('_', '-')}", str(value))
        ]
        with pytest.raises(SystemExit) as left:
            main(["train", *words, *flags])
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    return run


# What is printed


def test_a_run_shows_the_verdict_the_epochs_and_the_result(train, tmp_path):
    code, out, err = train()
    assert code == 0
    assert "y = x + h + A(x + h)  preserved" in out
    assert [line.split("  ")[0] for line in err.splitlines()] == ["epoch 0", "epoch 1"]
    assert "accuracy" in out.splitlines()[-2]
    assert out.splitlines()[-1].endswith(f"adapter in {tmp_path / 'run/adapter'}")


def test_a_training_that_comes_to_nothing_is_told_and_stopped_where_asked(train, tmp_path):
    hopeless = {"max_steps": None, "epochs": 3, "batch_size": 2, "learning_rate": 1e-7}
    code, out, err = train(**hopeless)
    (line,) = [line for line in err.splitlines() if "at step" in line]
    assert line.startswith("stalled at step ")
    assert "raise the learning rate" in line
    assert code == 0
    code, out, err = train("--stop-early", "--overwrite", **hopeless)
    assert code == 1
    assert f"A training with `--stop-early` must learn; got {line}, in `{tmp_path / 'run'}`." in " ".join(err.split())
    assert "--resume --no-stop-early" in err
    assert read_record(tmp_path / "run").status == "stopped"
    code, out, err = train("--stop-early", "--resume", "--json", **hopeless)
    assert (code, json.loads(out)["status"]) == (1, "stopped")
    code, out, err = train("--no-stop-early", "--resume", **hopeless)
    assert code == 0
    assert "ended by its monitor" in err
    assert read_record(tmp_path / "run").status == "finished"


def test_a_quiet_run_prints_the_result_alone(train):
    code, out, err = train("--quiet")
    assert code == 0
    assert len(out.splitlines()) == 2
    assert err == ""


def test_json_is_the_record_and_nothing_else(train, tmp_path):
    code, out, err = train("--json")
    assert code == 0
    assert err == ""
    record = read_record(tmp_path / "run")
    assert json.loads(out) == record.to_dict()
    assert record.command[0] == "inarch"


def test_several_seeds_print_mean_and_deviation_and_are_resumed_with_the_same_words(train):
    code, out, _ = train("--quiet", seeds=2)
    assert code == 0
    assert out.splitlines()[0].split() == ["result", "mean", "standard", "deviation"]
    again = train(
        "--quiet", "--resume", model=None, data=None, adapter=None, max_steps=None, batch_size=None, device=None
    )
    assert again == (0, out, "")


def test_resuming_what_is_finished_says_so(train):
    assert train()[0] == 0
    code, out, err = train("--resume")
    assert code == 0
    assert err == "This run is finished: nothing is left to train.\n"
    code, _, err = train("--resume", max_steps=3)
    assert code == 1
    assert "with recipe.max_steps" not in err and "instead of" in err and "nothing is left" not in err
    assert "adapter in" in out.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--head-only", "--full"])
def test_for_comparison_without_an_adapter(train, tmp_path, flag):
    code, out, _ = train(flag, adapter=None)
    assert code == 0
    assert (tmp_path / "run/model/config.json").is_file()
    assert "preserved" not in out


def test_an_unsound_configuration_says_which_option_allows_it(train):
    unsound = "seq_bn[reduction_factor=4,original_ln_after=False]"
    code, _, err = train(adapter=unsound)
    assert code == 1
    assert "skip connection lost" in err
    assert "pass `--allow-unsound`" in err
    assert train("--allow-unsound", adapter=unsound)[0] == 0


# What goes wrong: one message, an exit code, no traceback, nothing written


def refused(result, tmp_path, code=1):
    """The one message of a refused run."""
    got, out, err = result
    assert got == code, err
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("Error: " if code == 1 else "Usage: ")
    assert err.count("Error: ") == 1
    assert not (tmp_path / "run/run.json").exists()
    return err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nobody/nothing"}, "got `nobody/nothing`: no such folder is here"),
        ({"model": "no such name!"}, "is here, and the Hub gave none: Repo id must use"),
        ({"adapter": "seq_bn[reduction_fctor=4]"}, "Did you mean `reduction_factor`?"),
        ({"adapter": "seq_bnn"}, "Did you mean `seq_bn`?"),
        ({"adapter": "seq_bn[reduction_factor=-1]"}, "must be more than 0; got -1"),
        ({"adapter": "seq_bn[leave_out=[9]]"}, "9"),
        ({"learning_rate": "-1"}, "`--learning-rate` must be more than 0; got -1"),
        ({"batch_size": "0"}, "`--batch-size` must be at least 1; got 0"),
        ({"schedule": "steep"}, "`--schedule` must be `cosine` or `linear` or `constant`; got 'steep'"),
        ({"data": "no/such/folder/at/all"}, "A data source must be one of the forms below"),
        ({"validation": "1.5"}, "`--validation` must be less than 1; got 1.5"),
        ({"name": "a.b"}, "An adapter's name is text without"),
        ({"output": "/dev/null/run"}, "The output folder must be writable; got `/dev/null/run`"),
        ({"report_to": "paperwall"}, "names integrations that are installed; got `paperwall`"),
    ],
)
def test_bad_input_gets_one_clear_message(train, tmp_path, changes, message):
    assert message in refused(train(**changes), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "has a `config.json`"),
        ("text", "transformers can make a classifier of images of; got"),
        ("blind", "must come with the settings of its image processor"),
        ("weightless", "A model is `demo`, a folder with a `config.json`"),
        ("other", "must be those of its architecture"),
    ],
)
def test_a_model_that_cannot_be_used_is_explained(train, models, tmp_path, name, message):
    assert message in refused(train(model=models / name), tmp_path)


def test_a_library_that_lacks_for_the_image_processor_is_named(train, tmp_path, monkeypatch):
    def from_pretrained(*args, **options):
        raise ImportError("AutoImageProcessor requires the Torchvision library")

    monkeypatch.setattr("inarch.train.models.AutoImageProcessor.from_pretrained", from_pretrained)
    err = refused(train(), tmp_path)
    assert "requires the Torchvision library. Install the package" in err


def test_labels_that_disagree_with_the_images_are_explained(train, pictures, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("image,label\nred/0.png,warm\ngreen/0.png,cold\nred/99.png,warm\n")
    err = refused(train(labels=table), tmp_path)
    assert "red/99.png" in err
    assert "must list the same images" in err


# What is trained on


def digits(root):
    return {"data": "digits"}, [str(digit) for digit in range(10)]


def cifar_10(root):
    return {"data": archive(root / "c.tar.gz", cifar10(), "cifar-10-batches-py")}, ["airplane", "automobile", "bird"]


def cifar_100(root):
    path = archive(root / "c.tar.gz", cifar100(), "cifar-100-python")
    return {"data": path, "labels": "coarse"}, ["fruit", "sea"]


def cifar_100_unpacked(root):
    return {"data": unpacked(root / "cifar-100-python", cifar100())}, ["apple", "pear", "whale"]


def saved_data_set(root):
    images = [Image.new("RGB", (9, 7), colour) for colour in ("red", "green") for _ in range(4)]
    features = datasets.Features({"photo": datasets.Image(), "what": datasets.ClassLabel(names=["r", "g"])})
    made = datasets.Dataset.from_dict({"photo": images, "what": [0] * 4 + [1] * 4}, features=features)
    made.save_to_disk(str(root / "set"))
    return {"data": root / "set"}, ["r", "g"]


def several_labels(root):
    save_pictures(root / "images", count=4)
    lines = [
        f"{name}/{number}.png,{name};{'even' if number % 2 == 0 else 'odd'}" for name in COLOURS for number in range(4)
    ]
    (root / "labels.csv").write_text("\n".join(["image,labels", *lines]))
    return {"data": root / "images", "labels": root / "labels.csv"}, sorted([*COLOURS, "even", "odd"])


def odd_images(root):
    """Deep, grey, transparent, indexed, printed, turned, tiny and narrow ones among plain ones."""
    save_pictures(root / "images", ("red", "green"), count=2)
    folder, grey = root / "images/red", np.arange(600, dtype=np.uint8).reshape(20, 30)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(grey).save(folder / "grey.png")
    plain = Image.open(folder / "0.png")
    for mode, name in (("LA", "la.png"), ("RGBA", "rgba.png"), ("P", "p.gif"), ("1", "1.bmp"), ("CMYK", "c.jpg")):
        plain.convert(mode).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    plain.save(folder / "turned.jpg", exif=exif)
    plain.resize((1, 1)).save(folder / "tiny.png")
    plain.resize((1, 200)).save(folder / "narrow.png")
    return {"data": root / "images"}, ["green", "red"]


@pytest.mark.parametrize(
    "source", [digits, cifar_10, cifar_100, cifar_100_unpacked, saved_data_set, several_labels, odd_images]
)
def test_every_kind_of_data_is_trained_on(train, tmp_path, capsys, source):
    options, labels = source(tmp_path)
    capsys.readouterr()  # saving a data set shows a bar
    code, _, err = train("--quiet", max_steps=1, **options)
    assert (code, err) == (0, "")
    record = read_record(tmp_path / "run")
    assert record.data["labels"] == labels
    assert record.data["task"] == ("multi_label" if source is several_labels else "single_label")
    assert record.data["validation"] > 0


def test_damaged_images_are_named_and_left_out_only_on_request(train, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "images")
    (tmp_path / "images/red/empty.png").touch()
    whole = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(whole, "JPEG")
    (tmp_path / "images/red/cut.jpg").write_bytes(whole.getvalue()[:-99])
    err = refused(train(data=tmp_path / "images"), tmp_path)
    assert "cut.jpg" in err and "empty.png" in err and "pass `--skip-bad`" in err
    code, _, err = train("--quiet", "--skip-bad", data=tmp_path / "images")
    assert code == 0
    assert "Left out 2 images, because of `--skip-bad`" in err and "cut.jpg" in err
    assert read_record(tmp_path / "run").data["train"] + read_record(tmp_path / "run").data["validation"] == 16


def test_folders_that_are_no_data_are_explained(train, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "name their labels in a CSV with `--labels`" in refused(train(data=tmp_path / "empty"), tmp_path)
    shutil.copytree(pictures / "red", tmp_path / "one/red")
    assert "at least 2 classes to be told apart; got only `red`" in refused(train(data=tmp_path / "one"), tmp_path)
    (tmp_path / "hollow/blue").mkdir(parents=True)
    assert "Every class must have an image" in refused(train(data=tmp_path / "hollow"), tmp_path)


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ((), {"model": None}, "got no `--model`. Give `demo`, a folder"),
        ((), {"data": None}, "got no `--data`. Give `digits`, a folder"),
        ((), {"epochs": "many"}, "Invalid value for '--epochs'"),
        (("--no-such-option",), {}, "No such option: --no-such-option"),
    ],
)
def test_a_wrong_use_of_the_command_line_is_a_usage_error(train, tmp_path, flags, changes, message):
    assert message in refused(train(*flags, **changes), tmp_path, code=2)


def test_comparisons_exclude_each_other(train, tmp_path):
    assert "exclude each other" in refused(train("--full", "--head-only", adapter=None), tmp_path)
    assert "Leave one of them out" in refused(train("--head-only"), tmp_path)


def test_a_folder_with_a_run_is_not_touched_unasked(train, tmp_path):
    assert train()[0] == 0
    before = (tmp_path / "run/run.json").read_bytes()
    code, _, err = train()
    assert code == 1
    assert "`--resume`" in err
    assert "`--overwrite`" in err
    assert (tmp_path / "run/run.json").read_bytes() == before
    assert train("--overwrite")[0] == 0


def test_resuming_where_there_is_nothing_is_explained(train, tmp_path):
    told = refused(train("--resume", model=None, data=None), tmp_path)
    assert "To resume there must be a run; got nothing at" in told and "or begin one: `inarch train`" in told
    (tmp_path / "study.json").write_text("{}")
    assert "got a study at" in nothing_to_resume(tmp_path, "run.json")
    (tmp_path / "first").mkdir()
    (tmp_path / "first/run.json").write_text("{}")
    assert "Did you mean `" in nothing_to_resume(tmp_path / "frst", "run.json")


def test_resuming_with_other_options_is_explained(train):
    assert train()[0] == 0
    code, _, err = train("--resume", learning_rate=0.5)
    assert code == 1
    assert "with --learning-rate 0.5 instead of None. Leave" in err


def test_a_folder_that_may_not_be_written_is_explained(train, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write everywhere
    assert "is not yours to write" in refused(train(), tmp_path)


def test_a_folder_that_cannot_be_made_is_explained(train, tmp_path, monkeypatch):
    def mkdir(self, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(type(tmp_path), "mkdir", mkdir)
    assert "Read-only file system" in refused(train(), tmp_path)


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on(train, tmp_path, monkeypatch):
    whole = train("--json", max_steps=None, epochs=3, output=tmp_path / "whole")
    from inarch.train import resume

    real = resume.commit

    def commit(folder):
        if folder.name == "checkpoint-4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        real(folder)

    monkeypatch.setattr(resume, "commit", commit)
    code, _, err = train(max_steps=None, epochs=3)
    assert code == 1
    assert err.splitlines()[-1].startswith(
        "Error: A checkpoint must be writable as a whole; got `No space left on device`"
    )
    monkeypatch.undo()
    resumed = train("--json", "--resume", max_steps=None)
    assert resumed[0] == 0
    assert json.loads(resumed[1])["results"] == json.loads(whole[1])["results"]
    one, other = [(tmp_path / name / "adapter/adapter.safetensors").read_bytes() for name in ("whole", "run")]
    assert one == other


def test_a_disk_too_full_for_the_record_is_explained(train, tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    assert "The record of a run must be writable" in refused(train(), tmp_path)
    assert not list((tmp_path / "run").glob(".run.json*"))


def test_ctrl_c_says_how_to_go_on(train, tmp_path, monkeypatch):
    from inarch.train.callbacks import Report

    real = Report.on_save

    def on_save(self, args, state, control, **rest):
        real(self, args, state, control, **rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "on_save", on_save)
    code, _, err = train(max_steps=None, epochs=2)
    assert code == 130
    assert f"The newest checkpoint is kept. Go on with `inarch train --output {tmp_path / 'run'} --resume`." in err
    assert "Traceback" not in err
    monkeypatch.undo()
    assert read_record(tmp_path / "run").status == "interrupted"
    assert train("--resume", "--quiet", max_steps=None)[0] == 0


def test_ctrl_c_before_the_first_checkpoint_says_so(train, tmp_path, monkeypatch):
    def make(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "make", make)
    code, _, err = train()
    assert code == 130
    assert "Nothing was written." in err


def test_a_loss_that_is_no_number_is_an_error(train, tmp_path):
    code, _, err = train(max_steps=6, learning_rate=1e30, max_grad_norm=0, warmup=0, adapter="seq_bn")
    assert code == 1
    assert "The loss of a training must stay a number" in err.splitlines()[-1]
    assert "--learning-rate" in err.splitlines()[-1]
    assert read_record(tmp_path / "run").status == "diverged"


def test_what_was_understood_of_the_data_and_a_rate_that_seldom_trains_are_said(tmp_path, capsys):
    options = ["--model", "demo", "--data", "digits", "--adapter", "seq_bn", "--max-steps", "2"]
    with pytest.raises(SystemExit) as left:
        main(["train", *options, "--learning-rate", "0.5", "--output", str(tmp_path / "run")])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1,397 images to train on; 10 labels: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in said
    assert "warning large-step" in said
