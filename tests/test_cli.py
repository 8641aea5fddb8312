"""The command line: what each command prints, its exit codes, and that no traceback ever reaches a user."""

import csv
import errno
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from little_runs import save_model
from PIL import Image
from transformers import ViTForImageClassification
from typer.testing import CliRunner

import inarch
from inarch.cli import COMMANDS, app, main
from inarch.cli.guard import describe
from inarch.cli.output import _fitted
from inarch.core.errors import DataError, StateError
from inarch.methods import read_config
from inarch.train.models import load_model, load_processor

LABELS = ["cat", "dog", "owl"]
UNSOUND = "seq_bn[original_ln_after=False,residual_before_ln=True]"


def run(*arguments, **environment):
    """The result of a command, run in this process; never a traceback."""
    result = CliRunner().invoke(app, [str(word) for word in arguments], env=environment)
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model (`base`), an adapter (`run/adapter`), and images by class (`data`)."""
    root = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    save_model(root / "base")
    adapters = inarch.attach(load_model(str(root / "base"), LABELS))
    adapters.add("animals", "seq_bn")
    adapters.train("animals")
    adapters.save("animals", root / "run" / "adapter", processor=load_processor(str(root / "base")))
    rng = np.random.default_rng(0)
    for label in LABELS:
        for number in range(4):
            path = root / "data" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return root


# ------------------------------------------------------------------------------------------------- the whole of it


def test_the_help_lists_every_command():
    """`inarch`, `inarch --help` and `inarch -h` say what there is."""
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        result = run(*arguments)
        assert result.exit_code == code
        assert all(f"  {name}" in result.output and summary in result.output for name, (_, summary) in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_for_every_option(name):
    """A command's own help is found, and no option is without a line."""
    result = run(name, "--help")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("  --")]
    assert options
    for number in options:
        assert "  " in lines[number].strip() or lines[number + 1].startswith("          "), lines[number]


def test_every_command_is_there():
    """Each module of the table has the function of its name."""
    for module, _ in COMMANDS.values():
        assert callable(getattr(importlib.import_module(f"inarch.cli.{module}"), module))


def test_the_version():
    """One line, for programs too."""
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"inarch {inarch.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["train", "--nonsense"], ["predict"]]
)
def test_help_and_usage_errors_need_nothing_heavy(arguments):
    """They are quick: neither torch nor numpy, nothing of a model or of training is loaded."""
    code = (
        f"import sys\nfrom inarch.cli import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'inarch.handle', 'inarch.train.run') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("given", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_give_up_their_core_unless_the_user_says_otherwise(monkeypatch, given, wanted):
    """Set before torch is loaded, which reads it then (see the test before this one)."""
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == wanted


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["probe"],
        ["probe", "vit", "--nonsense"],
        ["probe", "vit", "more"],
        ["check", "vit"],
        ["predict", "adapter"],
        ["predict", "adapter", "image.png", "--top", "0"],
        ["predict", "adapter", "image.png", "--top", "many"],
        ["predict", "adapter", "image.png", "--batch-size", "0"],
        ["predict", "adapter", "image.png", "--threshold", "2"],
        ["predict", "adapter", "image.png", "--json", "--csv"],
        ["eval", "adapter"],
        ["eval", "adapter", "--data", "digits", "--picture", "confusion.jpg"],
        ["demo", "--output"],
        ["report"],
    ],
)
def test_a_wrong_use_is_told_with_exit_code_2(arguments):
    """The message is on standard error, with the way to the help."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert "Usage: " in result.stderr or arguments == ["demo", "--output"]  # the parser knows no command yet


def bad_inputs(place):
    """Commands that are written rightly and cannot succeed, each with a word that the message must have."""
    adapter, image = place / "run", place / "data" / "cat" / "0.png"
    (place / "text.json").write_text("{]")
    (place / "list.json").write_text("[]")
    (place / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    (place / "empty").mkdir(exist_ok=True)
    (place / "empty.png").mkdir(exist_ok=True)
    (place / "broken").mkdir(exist_ok=True)
    (place / "broken" / "inarch.json").write_text("{}")
    (place / "model").mkdir(exist_ok=True)
    (place / "model" / "config.json").write_text('{"model_type": "nonsense"}')
    (place / "other" / "yak").mkdir(parents=True, exist_ok=True)
    (place / "other" / "cat").mkdir(exist_ok=True)
    for label in ("yak", "cat"):
        for number in range(2):
            Image.new("RGB", (8, 8)).save(place / "other" / label / f"{number}.png")
    return [
        (["probe", "vitt"], "Did you mean `vit`"),
        (["probe", "./nowhere"], "got `./nowhere`: no such folder is here. Give the folder"),
        (["probe", place / "empty"], "config.json"),
        (["probe", place / "model"], "nonsense"),
        (["probe", image], f"got `{image}`: a file. Give the folder"),
        (["probe", "owner/none"], "owner/none"),
        (["probe", ""], "A model is"),
        (["probe", "vit\0"], "A model is"),
        (["probe", "resnet"], "residual branches"),
        (["probe", "vit", "--layout", place / "none.json"], "none.json"),
        (["probe", "vit", "--layout", place / "text.json"], "text.json"),
        (["probe", "vit", "--layout", place / "list.json"], "list.json"),
        (["probe", "vit", "--layout", place / "empty"], "empty"),
        (["check", "vit", "--adapter", "nonsense"], "nonsense"),
        (["check", "vit", "--adapter", ""], "a configuration begins with a name"),
        (["check", "vit", "--adapter", "seq_bn["], "is missing at the end"),
        (["check", "vit", "--adapter", "seq_bn[reduction_factor=few]"], "reduction_factor"),
        (["check", "vit", "--adapter", "seq_bn[nonsense=1]"], "nonsense"),
        (["check", "vit", "--adapter", place / "text.json"], "text.json"),
        (["check", "vit", "--adapter", place / "none.json"], "none.json"),
        (["probe", f"{place}/bas"], f"Did you mean `{place}/base`?"),
        (["check", "vit", "--adapter", f"{place}/rnu/adapter"], f"Did you mean `{place}/run/adapter`?"),
        (["predict", "./nowhere", image], "nowhere"),
        (["predict", f"{place}/run/adaptr", image], f"Did you mean `{place}/run/adapter`?"),
        (["predict", adapter, image, "--model", f"{place}/bse"], f"Did you mean `{place}/base`?"),
        (["predict", adapter, image, "--model", "dmeo"], "Did you mean `demo`?"),
        (["eval", adapter, "--data", "digit"], "Did you mean `digits`?"),
        (["eval", adapter, "--data", f"{place}/dta"], f"Did you mean `{place}/data`?"),
        (["predict", place / "empty", image], "which has none"),
        (["predict", place / "broken", image], "broken"),
        (["predict", adapter, place / "none.png"], "none.png"),
        (["predict", adapter, place / "empty"], "without images"),
        (["predict", adapter, place / "bad.png"], "bad.png"),
        (["predict", adapter, place / "bad.png", "--json"], "bad.png"),
        (["predict", adapter, image, "--device", "quantum"], "quantum"),
        (["predict", adapter, image, "--model", "./nowhere"], "nowhere"),
        (["predict", adapter, image, "--model", place / "empty"], "config.json"),
        (["predict", adapter, image, "--output", place / "empty"], "Is a directory"),
        (["eval", adapter, "--data", place / "none"], "none"),
        (["eval", adapter, "--data", place / "other"], "`yak`"),
        (["eval", adapter, "--data", "digits"], "must be one of the adapter"),
        (["eval", adapter, "--data", place / "data", "--validation", "3"], "validation"),
        (["eval", adapter, "--data", place / "empty"], "name their labels in a CSV with `--labels`"),
        (["eval", adapter, "--data", place / "data", "--labels", "none.csv"], "`--labels` must be `auto`"),
        (["eval", adapter, "--data", place / "data", "--picture", place / "empty.png"], "Is a directory"),
        (["eval", "./nowhere", "--data", place / "data"], "nowhere"),
        (["demo", "--output", place / "data"], "holds `cat`"),
        (["demo", "--output", image], "a file"),
    ]


def test_whatever_goes_wrong_is_told_in_one_message(place):
    """Exit code 1 (of `check` 2, for 1 is a verdict), nothing but the message on standard error, never a traceback."""
    wrong = []
    for arguments, word in bad_inputs(place):
        result = run(*arguments)
        message = result.stderr
        is_one = message.startswith("Error: ") and message.count("Error: ") == 1
        is_ours = word in message and "Nothing should fail without an explanation" not in message
        if result.exit_code != (2 if arguments[0] == "check" else 1) or not is_one or not is_ours:
            wrong.append((arguments, word, result.exit_code, result.output))
    assert wrong == []


def test_debug_lets_the_exception_through(place):
    """Before the command in typer's way, and anywhere in ours."""
    result = CliRunner().invoke(app, ["--debug", "predict", "./nowhere", str(place)])
    assert isinstance(result.exception, StateError)
    done = subprocess.run(
        [sys.executable, "-m", "inarch", "predict", "./nowhere", "./none.png", "--debug"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "DataError" in done.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DataError("The rule; got this. Do that."), "The rule; got this. Do that."),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "must have room"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "yours to read and write"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "`No such file` at `a/b`"),
        (torch.OutOfMemoryError("CUDA out of memory"), "fit in memory"),
        (MemoryError(), "fit in memory"),
        (KeyError("x"), "--debug"),
    ],
)
def test_every_exception_has_a_description(error, words):
    """With the place where there is one."""
    assert words in describe(error)


@pytest.mark.parametrize(("command", "told"), [("convert", "--other-base"), ("check", 'other_base="allow"')])
def test_a_message_names_an_option_only_where_the_command_has_it(monkeypatch, command, told):
    def refuse(*_args, **_options):
        raise StateError('Bases must agree; got others. Pass `other_base="allow"`.')

    monkeypatch.setattr(importlib.import_module("inarch.loading"), "locate", refuse)
    words = {"convert": ["./a", "./b", "--to", "peft"], "check": ["vit", "--adapter", "owner/name"]}
    result = run(command, *words[command])
    assert result.exit_code
    assert result.stderr == f"Error: Bases must agree; got others. Pass `{told}`.\n"


def test_ctrl_c_ends_with_130(monkeypatch):
    """And a word, not a traceback."""
    probe = importlib.import_module("inarch.sites")

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "probe", interrupt)
    result = run("probe", "vit")
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr


def test_ctrl_c_while_something_is_imported_ends_at_once():
    """There is no half module for anyone to fail with, and later Ctrl-C is an exception again."""
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job starts with it ignored
        "from inarch.core.interrupt import importing\nwith importing():\n    {}\n{}"
    )
    interrupt = "os.kill(os.getpid(), signal.SIGINT)"
    for inside, after, status, said in (
        (interrupt, "print('on')", 130, "Interrupted.\n"),
        ("pass", interrupt, -2, None),
    ):
        command = [sys.executable, "-c", code.format(inside, after)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (status, "")
        assert said in (None, done.stderr)


@pytest.mark.parametrize("module", ["typer", "inarch.cli.probe", "torch"])
def test_ctrl_c_ends_at_once_from_the_first_moment_on(module):
    """Whatever is being imported: the command line itself, a command, or what it needs."""
    code = (
        "import os, runpy, signal, sys\n"
        "class Impatient:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "sys.argv = ['inarch', 'probe', 'vit']\n"
        "runpy.run_module('inarch', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_a_closed_pipe_is_quiet():
    """As in `inarch probe vit | head -1`."""
    command = [sys.executable, "-m", "inarch", "probe", "vit", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_main_takes_arguments(capsys):
    """For programs that call it."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("inarch ")


# ------------------------------------------------------------------------------------------------ probe and check


def test_probe_shows_the_sites_by_groups():
    """24 sites in two rows, as plain text in a pipe."""
    result = run("probe", "vit")
    assert result.exit_code == 0
    assert "24 sites, 12 layers in `image0`" in result.stdout
    assert "image0 self_attention, layers 0-11" in result.stdout
    assert "\x1b" not in result.stdout


def test_colours_are_for_terminals_that_want_them():
    """`NO_COLOR` takes them away; a pipe has none. The words and the exit code stay the same."""
    coloured = run("check", "vit", "--adapter", UNSOUND, FORCE_COLOR="1", NO_COLOR=None, COLUMNS="300")
    assert "\x1b[31m" in coloured.stdout
    plain = run("check", "vit", "--adapter", UNSOUND, FORCE_COLOR="1", NO_COLOR="1", COLUMNS="300")
    assert "\x1b[3" not in plain.stdout
    piped = run("check", "vit", "--adapter", UNSOUND, NO_COLOR=None)
    assert "\x1b" not in piped.output
    assert [result.exit_code for result in (coloured, plain, piped)] == [1, 1, 1]
    shown = [re.sub(r"\x1b\[[\d;]*m|-{2,}", "", result.stdout).split() for result in (coloured, plain, piped)]
    assert shown[0] == shown[1] == shown[2]


def test_a_probe_as_json_is_a_layout(place, tmp_path):
    """What `--json` prints can be given back, and attaches."""
    first = run("probe", place / "base", "--json")
    layout = json.loads(first.stdout)
    file = tmp_path / "layout.json"
    file.write_text(first.stdout)
    again = run("probe", place / "base", "--layout", file, "--json")
    assert json.loads(again.stdout) == layout
    model = ViTForImageClassification.from_pretrained(place / "base")
    assert inarch.attach(model, layout=layout).sites.to_dict() == layout
    assert run("check", place / "base", "--adapter", "seq_bn", "--layout", file).exit_code == 0


def test_a_failed_probe_prints_what_it_found():
    """So that it can be completed; the error is still an error."""
    result = run("probe", "resnet", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["model_class"] == "ResNetForImageClassification"


def test_check_accepts_what_is_sound():
    """Exit code 0, the formula and the verdict."""
    result = run("check", "vit", "--adapter", "seq_bn")
    assert result.exit_code == 0
    assert "y = x + h + A(x + h)" in result.stdout
    assert "preserved" in result.stdout
    assert "Sound: with a zero adapter branch the model computes what it was" in result.stdout


def test_check_says_of_prefixes_what_they_are():
    """No sum is changed and there is no branch to be zero, which the verdict says; the places are in a table."""
    result = run("check", "vit", "--adapter", "prefix_tuning[prefix_length=5]")
    assert result.exit_code == 0
    assert "prefix of image0 self_attention" in result.stdout and "[P_V; V], 5 learned" in result.stdout
    assert "`prefix` changes no sum and has no branch that could be zero: it starts as another" in result.stdout
    assert "with a zero adapter branch" not in result.stdout
    both = run("check", "vit", "--adapter", "prefix_tuning|seq_bn").stdout
    assert "Sound: with a zero adapter branch" in both and "`prefix` changes no sum" in both


def test_check_rejects_what_is_unsound():
    """Exit code 1, the reason and the fix, nothing on standard error."""
    result = run("check", "vit", "--adapter", UNSOUND)
    assert result.exit_code == 1
    assert "skip connection lost" in result.stdout
    assert "Set `residual_before_ln=False` or `original_ln_after=True`" in result.stdout
    assert result.stderr == ""


def test_check_as_json():
    """Everything the table has, for programs."""
    sound = json.loads(run("check", "vit", "--adapter", "seq_bn", "--json").stdout)
    assert (sound["sound"], sound["findings"]) == (True, [])
    result = run("check", "vit", "--adapter", UNSOUND, "--json")
    assert result.exit_code == 1
    unsound = json.loads(result.stdout)
    assert not unsound["sound"]
    assert unsound["sites"][0]["at_zero"] == "y = h"
    assert unsound["findings"][0]["fixes"] == [{"residual_before_ln": False}, {"original_ln_after": True}]
    assert len(unsound["sites"][0]["sites"]) == 12


# ----------------------------------------------------------------------------------------------- predict and eval


def test_predict_as_a_table(place):
    """A line for each image, below a head."""
    result = run("predict", place / "run", place / "data", "--top", "2")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["image", "label", "sure", "then"]
    assert len(lines) == 13
    assert lines[1].startswith(str(place / "data" / "cat" / "0.png"))
    assert lines[1].count("%") == 2
    assert result.stderr == ""


def test_predict_as_json_json_lines_and_csv(place):
    """Three forms of the same results."""
    arguments = ["predict", place / "run" / "adapter", place / "data"]
    rows = json.loads(run(*arguments, "--json").stdout)
    assert len(rows) == 12
    assert [len(row["top"]) for row in rows] == [3] * 12
    lines = run(*arguments, "--jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == rows
    table = list(csv.DictReader(io.StringIO(run(*arguments, "--csv", "--top", "2").stdout)))
    assert [row["label"] for row in table] == [row["label"] for row in rows]
    assert float(table[0]["probability_2"]) == pytest.approx(rows[0]["top"][1]["probability"], abs=1e-6)
    assert list(table[0]) == ["image", "label", "probability", "label_2", "probability_2"]


def test_predict_to_a_file(place, tmp_path):
    """Standard output stays empty; the folder of the file is made."""
    file = tmp_path / "new" / "predictions.csv"
    result = run("predict", place / "run", place / "data", "--csv", "--output", file)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "Wrote 12 predictions" in result.stderr
    assert len(file.read_text().splitlines()) == 13


def test_predict_leaves_bad_images_out(place, tmp_path):
    """With `--skip-bad` they are named and the rest is predicted; what is printed is still JSON."""
    bad = tmp_path / "bad.png"
    bad.write_text("none")
    result = run("predict", place / "run", bad, place / "data" / "cat", "--skip-bad", "--json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)) == 4
    assert "bad.png" in result.stderr
    assert "--skip-bad" in result.stderr
    assert "skip_bad" not in result.stderr
    assert "Left out 1 of 5 images" in result.stderr


def test_predictions_before_an_error_are_whole_json(place, tmp_path):
    """A bad image in the second batch ends the list, which can still be read."""
    images = sorted((place / "data" / "cat").iterdir())[:2]
    bad = tmp_path / "bad.png"
    bad.write_text("none")
    result = run("predict", place / "run", *images, bad, "--json", "--batch-size", "2")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)) == 2


def test_an_error_before_the_first_prediction_prints_no_table(place, tmp_path):
    (tmp_path / "bad.png").write_text("none")
    result = run("predict", place / "run", tmp_path / "bad.png")
    assert (result.exit_code, result.stdout) == (1, "")


def test_an_adapter_of_another_library_is_converted_before_it_predicts(place, tmp_path):
    """It has the processing of its base then, and the labels of its head: what was said first is what is said."""
    away, back = tmp_path / "away", tmp_path / "back"
    base = ("--model", place / "base")
    assert run("convert", place / "run", away, "--to", "adapterhub", *base).exit_code == 0
    told = run("eval", away, "--data", place / "data").stderr
    assert f"Convert it first: `inarch convert {away} FOLDER --to inarch`" in told
    assert run("convert", away, back, "--to", "inarch", *base).exit_code == 0
    data = ("--data", place / "data", "--all", "--json")
    found = [json.loads(run("eval", adapter, *data, *base).stdout) for adapter in (place / "run", back)]
    assert found[0]["confusion"] == found[1]["confusion"]


def test_eval_as_a_table_and_as_json(place):
    """The accuracy, and a line for each label."""
    arguments = ["eval", place / "run", "--data", place / "data", "--all"]
    result = run(*arguments)
    assert result.exit_code == 0
    assert "on 12 images of data" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines()[3:]] == LABELS
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["num_images"] == 12
    assert [row["support"] for row in found["labels"]] == [4, 4, 4]
    held_out = json.loads(run(*arguments[:-1], "--validation", "0.25", "--json").stdout)
    assert held_out["num_images"] == 3


def test_eval_draws_the_confusion_matrix(place, tmp_path):
    """A picture that is not blank."""
    result = run("eval", place / "run", "--data", place / "data", "--all", "--picture", tmp_path / "new" / "c.png")
    assert result.exit_code == 0
    pixels = np.asarray(Image.open(tmp_path / "new" / "c.png").convert("L"))
    assert pixels.std() > 5
    assert "c.png" in result.stderr


def test_check_measures_what_a_batch_shows_and_counts_its_memory():
    result = run("check", "demo", "--adapter", "seq_bn", "--measure", "--batch-size", "4", "--json")
    assert result.exit_code == 0
    measured = json.loads(result.stdout)
    assert measured["evidence"]["dead"] == [] and 0 < measured["evidence"]["drift"] < 1
    again = run("check", "demo", "--adapter", "seq_bn", "--measure", "--batch-size", "4", "--json")
    assert json.loads(again.stdout) == measured
    estimated = json.loads(run("check", "demo", "--adapter", "seq_bn", "--batch-size", "4", "--json").stdout)
    assert measured["memory"]["is_measured"] and not estimated["memory"]["is_measured"]
    assert estimated["memory"]["activations"] == pytest.approx(measured["memory"]["activations"], rel=0.15)


def test_what_cannot_be_measured_is_not_passed_over(monkeypatch):
    monkeypatch.setattr("inarch.sites.synthesise", lambda _: None)
    result = run("check", "demo", "--adapter", "seq_bn", "--measure")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "got `demo`, whose inputs cannot be told from it. Leave `--measure` out" in result.stderr


def test_a_number_out_of_range_is_a_finding_and_is_mended(tmp_path):
    result = run("check", "demo", "--adapter", "lora[dropout=1.0]", "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)["findings"]
    assert found["code"] == "out-of-range" and found["fixes"] == [{"dropout": 0.0}]
    file = tmp_path / "adapter.json"
    file.write_text(json.dumps({"methods": [{"method": "lora", "r": 0}]}))
    result = run("check", "demo", "--adapter", str(file), "--fix")
    assert result.exit_code == 0 and "error out-of-range" in result.stdout
    assert json.loads(file.read_text())["methods"][0]["r"] == 8


def test_what_cannot_be_mended_is_shown_all_the_same():
    result = run("check", "demo", "--adapter", "mute[roles=[mlp]]", "--fix")
    assert result.exit_code == 1
    assert "branch lost" in result.stdout and "which no change of it clears" in result.stderr
    result = run("check", "demo", "--adapter", "mute[roles=[mlp]]", "--fix", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["findings"][0]["code"] == "unsound-wiring"


def test_fix_rewrites_a_file_and_prints_what_it_became(tmp_path):
    file = tmp_path / "adapter.json"
    file.write_text(json.dumps(read_config("seq_bn[original_ln_after=False,scaling=0.0]").to_dict()))
    result = run("check", "demo", "--adapter", str(file), "--fix")
    assert result.exit_code == 0
    assert "written to" in result.stdout
    assert str(read_config(str(file))) == "seq_bn[original_ln_after=False,residual_before_ln=False]"
    assert run("check", "demo", "--adapter", str(file)).exit_code == 0


def test_check_reads_the_images_of_a_training(place, tmp_path):
    """Labels of an adapter's head that the data lack, bytes instead of pixel values, and images of another size."""

    def codes(model, *arguments):
        result = run("check", model, *arguments, "--json")
        return result.exit_code, [found["code"] for found in json.loads(result.stdout)["findings"]]

    assert codes(place / "base", "--adapter", "seq_bn", "--data", place / "data") == (0, [])
    assert codes(place / "base", "--adapter", place / "run/adapter", "--data", place / "data") == (0, [])
    assert codes(place / "base", "--adapter", place / "run/adapter", "--data", "digits") == (1, ["labels-disagree"])
    raw = shutil.copytree(place / "base", tmp_path / "raw")
    file = raw / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "do_rescale": False}))
    new = ("--adapter", "seq_bn", "--data", place / "data")
    assert codes(raw, *new) == (1, ["images-not-normalised"])
    assert codes(raw, *new, "--measure") == (1, ["images-not-normalised"])
    trained = run("train", "--model", raw, *new, "--epochs", "1", "--output", tmp_path / "run")
    assert "error images-not-normalised at `pixel_values`" in trained.stdout
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert [found["code"] for found in record["verdict"]["details"]] == ["images-not-normalised"]
    file.write_text(json.dumps({**settings, "size": {"height": 24, "width": 24}}))
    assert codes(raw, *new) == (0, ["images-of-other-size"])
    for result in (
        run("check", raw, *new, "--measure"),
        run("train", "--model", raw, *new, "--output", tmp_path / "none"),
    ):
        assert result.exit_code != 0 and "got 24 x 24 pixels, and `" in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_learning_rate_is_judged():
    result = run("check", "demo", "--adapter", "seq_bn", "--learning-rate", "5e-5", "--json")
    assert [found["code"] for found in json.loads(result.stdout)["findings"]] == ["small-rate"]
    assert result.exit_code == 0  # a warning is no error


def test_predict_names_all_bad_images_of_a_batch_once(place, tmp_path):
    """One message, with the advice at its end."""
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_text("none")
    result = run("predict", place / "run", tmp_path)
    assert result.exit_code == 1
    assert "got 2 that are not" in result.stderr
    assert result.stderr.count("Mend or remove") == 1
    assert result.stderr.count(".png") == 2


def test_several_labels_an_image_as_a_table(place, tmp_path):
    """The chosen labels in a column, and the likeliest with their probabilities in the next."""
    model = load_model(str(place / "base"), LABELS, task="multi_label")
    adapters = inarch.attach(model)
    adapters.add("animals", "seq_bn")
    adapters.train("animals")
    adapters.save("animals", tmp_path / "adapter", processor=load_processor(str(place / "base")))
    result = run("predict", tmp_path / "adapter", place / "data" / "cat", "--top", "1", "--threshold", "0")
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["image", "labels", "likeliest"]
    for line in lines:
        assert sorted(line[head.index("labels") : head.index("likeliest")].strip().split(", ")) == LABELS
        assert line[head.index("likeliest") :].split()[0] in LABELS
    assert len({line.index(".png") for line in lines}) == 1


def test_the_hubs_own_notes_stay_out_of_the_way_though_it_is_loaded_late():
    """It sets its level when it is loaded, after the command line has begun."""
    code = (
        "import logging\nfrom inarch.cli.guard import guarded\n"
        "def command():\n"
        "    from huggingface_hub.utils import logging as _\n"
        "    logging.getLogger('huggingface_hub.utils').warning('Retrying in 1s')\n"
        "guarded(command)()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_table_breaks_no_word_on_a_narrow_terminal():
    settings = ("original_ln_after", "residual_before_ln", "reduction_factor", "learning_rate")
    headers = ("trial", *settings, "verdict before", "outcome", "accuracy", "steps")
    rows = [("12", "yes", "no", "16", "0.001", "skip connection doubled", "pruned by Hyperband", "0.7750", "120")]
    for room in (80, 100, 120, 200):
        shown, widths, gap = _fitted(headers, rows, room)
        assert sum(widths) + gap * 8 <= room
        for place, width in enumerate(widths):
            words = [*shown[place].split(), *rows[0][place].split()]
            assert max(map(len, words)) <= width, (room, place)
    assert list(headers) == shown and gap == 2  # where there is room for everything
    assert _fitted(headers, rows, 40)[1] == [None] * 9  # and where there is none, letters are what is left
    # Cells get what room there is before headings do.
    assert _fitted(("a_long_name", "what"), [("0.5", "three words here")], 22) == (["a long name", "what"], [4, 16], 2)
