"""Shipped layouts: what they say is what a probe finds, and they serve no model but those they were made from."""

import json
import os
from importlib.metadata import version

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from typer.testing import CliRunner

import inarch
from inarch.cli import app
from inarch.core.errors import SiteError
from inarch.sites import golden, probe_now
from inarch.testing import tiny, tiny_inputs

SHIPPED = sorted(golden.FOLDER.glob("*.json"))
OTHER_NAMES = pytest.mark.skipif(
    not hasattr(tiny("vit"), "layers"), reason="in this release of transformers the modules of ViT have other names"
)
PROBED = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "bert": ("BertModel", "BertForMaskedLM"),
    "gpt2": ("GPT2LMHeadModel",),
    "t5": ("T5ForConditionalGeneration",),
    "clip": ("CLIPModel",),
    "whisper": ("WhisperForConditionalGeneration",),
}


def on_meta(class_name, model_type):
    with torch.device("meta"):
        return getattr(transformers, class_name)(transformers.AutoConfig.for_model(model_type)).eval()


def made_here(record):
    return Version(record.made_with["transformers"]) == Version(version("transformers"))


CASES = [(t, c) for t, classes in PROBED.items() for c in classes]
CASES += [(path.stem, next(iter(golden.read(path).classes))) for path in SHIPPED if path.stem not in PROBED]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_shipped_layout_is_what_a_probe_finds(case):
    """Under a newer transformers too: where it changes what a probe finds, this names the sites that differ."""
    model_type, class_name = case
    record = golden.read(golden.FOLDER / f"{model_type}.json")
    if Version(version("transformers")) < Version(record.made_with["transformers"]):
        pytest.skip("made from a newer transformers; an older one has other modules and is probed")
    if made_here(record) and model_type not in PROBED and "INARCH_FULL_ZOO_TEST" not in os.environ:
        pytest.skip("made from this transformers; probed anew under a newer one, or with INARCH_FULL_ZOO_TEST=1")
    model = on_meta(class_name, model_type)
    fresh = probe_now(model)
    prefix, _ = record.classes[class_name]
    assert golden.differences(record.at(prefix), fresh) == []
    if made_here(record):
        found = inarch.probe(model)
        assert (found.source, found.sites, found.model_class) == ("golden", fresh.sites, class_name)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_sources_of_a_shipped_layout_are_those_installed(path):
    record = golden.read(path)
    assert record.sites.model_type == path.stem
    if made_here(record):
        assert record.changed_files() == [], f"make the layout of {path.stem} again"


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped layouts that has one, of a tiny ViT and its classifier; and the path of the file."""
    base, task = tiny("vit"), tiny("vit-classifier")
    record = golden.make(base, probe_now(base), [(task, probe_now(task))])
    path = tmp_path / "vit.json"
    path.write_text(json.dumps(record.to_dict()))
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    return path


@OTHER_NAMES
def test_the_layout_of_the_base_serves_the_model_around_it(shipped):
    task = tiny("vit-classifier")
    found = inarch.probe(task)
    assert found.source == "golden"
    assert found.sites == probe_now(task).sites
    assert {site.layer_path for site in found} == {"vit.layers.0", "vit.layers.1"}


def test_adapters_on_a_shipped_layout_are_those_on_a_probed_one(shipped):
    inputs = tiny_inputs("vit")
    golden_model, probed_model = tiny("vit"), tiny("vit")
    handles = [inarch.attach(golden_model), inarch.attach(probed_model, example_inputs=inputs)]
    assert [handle.sites.source for handle in handles] == ["golden", "meta"]
    outputs = []
    for handle in handles:
        handle.add("a", "double_seq_bn[init_weights_seed=1]|lora[init_weights_seed=2]")
        handle.activate("a")
        outputs.append(handle.model(**inputs).last_hidden_state)
    assert torch.equal(*outputs)


def forward_of_another_file(self, hidden_states):
    return hidden_states


def replaced_forward(model, monkeypatch):
    monkeypatch.setattr(type(model.layers[0].mlp), "forward", forward_of_another_file)


def own_forward(model, monkeypatch):
    model.layers[1].mlp.forward = model.layers[1].mlp.forward


def other_module(model, monkeypatch):
    model.layers[1].mlp = nn.Sequential(nn.Linear(32, 32))


def other_width(model, monkeypatch):
    model.layers[1].mlp.fc1, model.layers[1].mlp.fc2 = nn.Linear(32, 16), nn.Linear(16, 32)


def one_layer_more(model, monkeypatch):
    model.layers.append(tiny("vit").layers[0])


def a_dropout_in_the_settings(model, monkeypatch):
    model.config.attention_probs_dropout_prob = 0.5


def other_setting(model, monkeypatch):
    model.config.hidden_act = "relu"


def setting_that_the_code_reads(model, monkeypatch):
    model.config.output_hidden_sizes = 1
    model.config.hidden_states = "swapped"  # the code has the word, so it might read the setting


def other_class(model, monkeypatch):
    model.__class__ = type("ViTModel", (type(model),), {})


@pytest.mark.parametrize(
    "change",
    [
        replaced_forward,
        own_forward,
        other_module,
        other_width,
        one_layer_more,
        a_dropout_in_the_settings,
        other_setting,
        setting_that_the_code_reads,
        other_class,
    ],
    ids=lambda change: change.__name__,
)
@OTHER_NAMES
def test_a_model_that_was_changed_is_probed(shipped, monkeypatch, change):
    model = tiny("vit")
    assert golden.find(model) is not None
    change(model, monkeypatch)
    assert golden.find(model) is None


@pytest.mark.parametrize(
    "settings",
    [{"layer_norm_eps": 1e-3}, {"id2label": {0: "cat"}}, {"n_ctx": 7}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_change_no_architecture_are_passed_over(shipped, settings):
    model = tiny("vit")
    model.config.update(settings)
    assert golden.find(model) is not None


def test_the_size_of_a_dropout_changes_nothing():
    record = golden.read(golden.FOLDER / "bert.json")
    model = on_meta("BertModel", "bert")
    model.config.hidden_dropout_prob = model.encoder.layer[0].output.dropout.p = 0.3
    assert (record.fit(model) is not None) == made_here(record)
    model.config.hidden_dropout_prob = model.encoder.layer[0].output.dropout.p = 0.0
    assert record.fit(model) is None


def test_a_change_of_the_source_is_a_change(shipped, monkeypatch):
    model = tiny("vit")
    read = golden._text
    monkeypatch.setattr(golden, "_text", lambda path: read(path) + "\n# changed")
    assert golden.find(model) is None
    assert "transformers.models.vit.modeling_vit" in golden.read(shipped).changed_files()


def test_example_inputs_ask_for_a_probe(shipped):
    assert inarch.probe(tiny("vit"), example_inputs=tiny_inputs("vit")).source == "meta"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1}', "KeyError: 'layout'"),
    ],
)
def test_a_broken_file_is_named(shipped, content, message):
    shipped.write_text(content)
    with pytest.raises(SiteError, match=rf"got .*{message}.* at `.*vit\.json`. Install inarch again, or remove"):
        inarch.probe(tiny("vit"))


def test_a_record_survives_the_file(shipped):
    record = golden.read(shipped)
    assert json.loads(shipped.read_text()) == record.to_dict()


def test_a_model_with_more_branches_in_its_head_is_not_served(shipped):
    """A head with residual branches of its own: the layout of the base would be half the truth."""
    base = tiny("vit")
    found = probe_now(base)
    task = tiny("vit-classifier")
    whole = probe_now(task)
    with_head = golden.replace(whole, sites=(*whole.sites, golden.replace(whole.sites[-1], stack="image1")))
    assert "ViTForImageClassification" in golden.make(base, found, [(task, whole)]).classes
    assert "ViTForImageClassification" not in golden.make(base, found, [(task, with_head)]).classes


def test_differences_name_site_and_field():
    sites = probe_now(tiny("vit"))
    moved = golden.replace(sites.sites[0], pre_norm="elsewhere")
    assert golden.differences(sites, sites) == []
    assert golden.differences(sites, golden.replace(sites, sites=(moved, *sites.sites[1:]))) == [
        "at site `image0.0.self_attention` `pre_norm` was 'layernorm_before' and is 'elsewhere'"
    ]
    assert golden.differences(sites, golden.replace(sites, sites=sites.sites[1:])) == [
        "site `image0.0.self_attention` is gone"
    ]
    assert "another order" in golden.differences(sites, golden.replace(sites, sites=sites.sites[::-1]))[0]


@OTHER_NAMES
def test_a_model_without_source_has_no_record():
    model = tiny("vit")
    model.layers[0].forward = model.layers[0].forward
    with pytest.raises(SiteError, match="unchanged at run time; got ViTModel. Leave it to the probe"):
        golden.make(model, probe_now(tiny("vit")))


def test_probe_says_that_the_layout_is_shipped():
    result = CliRunner().invoke(app, ["probe", "vit"])
    assert result.exit_code == 0, result.output
    assert ("inarch ships" in result.stdout) == (golden.find(on_meta("ViTModel", "vit")) is not None)
