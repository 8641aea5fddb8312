"""`inarch convert` between all formats: what is written computes the same, and nothing is left half written."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import inarch
from inarch.cli import app
from inarch.convert import is_adapterhub, is_peft
from inarch.state import is_adapter, read_record
from inarch.testing import tiny, tiny_inputs

FORMATS = {"inarch": is_adapter, "peft": is_peft, "adapterhub": is_adapterhub}
NAME = "bert-classifier"


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def output(model):
    with torch.no_grad():
        return model(**tiny_inputs(NAME)).logits


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A base, an adapter of it in every format, and what they compute."""
    place = tmp_path_factory.mktemp("stored")
    model = tiny(NAME)
    model.save_pretrained(place / "base")
    adapters = inarch.attach(model)
    adapters.add("a", "lora[r=3,alpha=5,attn_matrices=[q,k],intermediate_lora=True]")
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for kind in FORMATS:
        adapters.save("a", place / kind, format=kind)
    adapters.activate("a")
    return place, output(model)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FORMATS, FORMATS)))
def test_every_format_becomes_every_other(stored, tmp_path, source, target):
    place, expected = stored
    result = run("convert", place / source, tmp_path / "a", "--to", target, "--model", place / "base")
    assert result.exit_code == 0, result.output
    assert [kind for kind, is_one in FORMATS.items() if is_one(tmp_path / "a")] == [target]
    model = tiny(NAME)
    adapters = inarch.attach(model)
    adapters.activate(adapters.load(tmp_path / "a"))
    assert torch.allclose(output(model), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        ("seq_bn", "peft", "written for PEFT where PEFT has its method"),
        ("dora", "adapterhub", "written for the library `adapters` where that computes the same"),
        ("layernorm_tuning", "peft", "got the method `layernorm_tuning` of `b`"),
    ],
)
def test_what_a_format_does_not_have_leaves_nothing_and_takes_nothing_away(stored, tmp_path, config, target, message):
    place, _ = stored
    adapters = inarch.attach(tiny(NAME))
    adapters.add("b", config)
    adapters.save("b", tmp_path / "b")
    adapters.remove("b")
    adapters.load(place / target, name="before")
    adapters.save("before", tmp_path / "there", format=target)
    files = {file: file.read_bytes() for file in (tmp_path / "there").iterdir()}
    for destination in ("new", "there"):
        words = ("convert", tmp_path / "b", tmp_path / destination, "--to", target, "--model", place / "base")
        result = run(*words, "--overwrite")
        assert result.exit_code == 1 and message in " ".join(result.output.split())
    assert {entry.name for entry in tmp_path.iterdir()} == {"b", "there"}  # no draft, either
    assert {file: file.read_bytes() for file in (tmp_path / "there").iterdir()} == files


def test_a_folder_with_something_else_is_left_alone(stored, tmp_path):
    place, _ = stored
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    words = ("convert", place / "inarch", tmp_path / "mine", "--to", "peft", "--model", place / "base")
    assert "which holds files. Choose another, or pass `--overwrite`" in " ".join(run(*words).output.split())
    result = run(*words, "--overwrite")
    assert result.exit_code == 1 and "which holds thesis.txt" in " ".join(result.output.split())
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("kind", "config"), [("adapterhub", "seq_bn[init_weights=mam_adapter]"), ("peft", "lora")])
def test_a_head_of_other_labels_goes_there_and_back(kind, config, tmp_path):
    """The model's own head, made for labels that the base by itself does not have; PEFT keeps only how many."""
    place, labels = tmp_path / "base", ("left", "right", "neither", "both", "unknown")
    tiny(NAME).save_pretrained(place)
    model = type(tiny(NAME)).from_pretrained(
        place, id2label=dict(enumerate(labels)), label2id={label: n for n, label in enumerate(labels)},
        num_labels=5, ignore_mismatched_sizes=True,
    )  # fmt: skip
    adapters = inarch.attach(model)
    adapters.add("a", config)
    adapters.train("a")
    adapters.save("a", tmp_path / "ours")
    for source, target, to in (("ours", "theirs", kind), ("theirs", "back", "inarch")):
        result = run("convert", tmp_path / source, tmp_path / target, "--to", to, "--model", place)
        assert result.exit_code == 0 and "Warning" not in result.output, result.output
    wanted, found = (load_file(tmp_path / folder / "adapter.safetensors") for folder in ("ours", "back"))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)
    words = ("convert", tmp_path / "theirs", tmp_path / "named", "--to", "inarch", "--model", place, "--labels")
    assert run(*words, ",".join(labels)).exit_code == 0
    assert read_record(tmp_path / "named")["head"]["labels"] == list(labels)
    refused = run(*words, "left,right", "--overwrite")
    assert refused.exit_code == 1 and "got 2 in `--labels` for 5" in " ".join(refused.output.split())
    kept = list(labels) if kind == "adapterhub" else [f"LABEL_{number}" for number in range(5)]
    assert read_record(tmp_path / "back")["head"]["labels"] == kept
