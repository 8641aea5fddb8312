"""A representative part of the zoo; `make coverage` runs all of it."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from torch import nn
from zoo import exceptions, factories, judge, reviews, table
from zoo.build import model_types, tiny_config, tiny_model
from zoo.describe import differences
from zoo.judge import judge as judged
from zoo.oracle import sublayers, sums
from zoo.recorded import changes, recorded, recorded_with

REPRESENTATIVE = [
    "albert", "audio-spectrogram-transformer", "bart", "beit", "bert", "blip_2_qformer", "bloom", "canine", "clip",
    "clip_vision_model", "cohere", "convbert", "deberta", "deberta-v2", "deepseek_v3", "deit", "dinov2", "dinov3_vit",
    "distilbert", "falcon", "fnet", "gemma2", "gemma3_text", "gemma3n_text", "git", "glm4", "gpt2", "gpt_neox",
    "gpt_oss", "gptj", "hubert", "ibert", "imagegpt", "inkling_text", "lilt", "llama", "llava", "luke", "mamba",
    "mixtral", "mobilebert", "modernbert", "mpnet", "mpt", "muse_spark_text", "musicgen_melody", "nystromformer",
    "olmo2", "phi", "phi3", "qwen3", "qwen3_vl_vision", "roberta", "roformer", "sam", "siglip2", "swiftformer",
    "swin", "t5", "timesformer", "vit", "vit_mae", "wav2vec2", "whisper", "xlnet", "xmod",
]  # fmt: skip

COVERAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
SCRIPTS = Path(__file__).parent.parent / "scripts"

NEWEST = pytest.mark.skipif(
    Version(transformers.__version__) < Version(recorded_with()),
    reason="the layouts are recorded under a newer release of transformers, and an older one has other modules",
)


@NEWEST
@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_type_adapts(model_type):
    record = judged(model_type)
    assert (record.verdict, record.stage, record.reason) == ("adapts", "", "")
    assert changes({model_type: record.to_dict()}) == []


@NEWEST
@pytest.mark.skipif("INARCH_FULL_ZOO_TEST" not in os.environ, reason="takes minutes; set INARCH_FULL_ZOO_TEST=1")
def test_every_layout_is_as_recorded():
    """The whole zoo under the installed release; the second command says which types it changes, and in what."""
    for command in (["tiny", "--workers", str(os.cpu_count())], ["record", "--check"]):
        zoo = [sys.executable, str(SCRIPTS / "zoo"), *command]
        done = subprocess.run(zoo, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_layout_that_changes_is_named():
    was = recorded()["bert"]
    now = [line.replace(" post:", " pre:") if " mlp " in line else line for line in was]
    assert now != was
    first, second = changes({"bert": {"verdict": "adapts", "layout": now}})
    assert first.startswith("bert: gone: text0 mlp x2 BertLayer post: h ")
    assert second.startswith("bert: new: text0 mlp x2 BertLayer pre: h ")
    assert differences(was, was) == []


def test_a_type_that_adapts_no_more_is_named_with_all_that_is_gone():
    found = changes({"bert": {"verdict": "fails", "layout": recorded()["bert"]}})
    assert found == [f"bert: gone: {line}" for line in recorded()["bert"]]


def test_the_judge_sees_an_adapter_that_changes_the_output(monkeypatch):
    monkeypatch.setattr(judge, "_configuration", lambda _: "seq_bn[init_weights=bert]")
    record = judged("bert")
    assert (record.verdict, record.stage) == ("fails", "identity")
    assert "a new adapter changes the output: last_hidden_state by" in record.reason


def test_the_judge_sees_a_missing_site(monkeypatch):
    attach = judge.inarch.attach

    def forgetful(model, **options):
        handle = attach(model, **options)
        handle.sites = dataclasses.replace(handle.sites, sites=handle.sites.sites[:-1])
        return handle

    monkeypatch.setattr(judge.inarch, "attach", forgetful)
    record = judged("bert")
    assert (record.verdict, record.stage) == ("fails", "count")
    assert "BertLayer: 1 sites, expected 2 at encoder.layer.1" in record.reason


def test_the_judge_sees_a_tower_that_does_not_run(monkeypatch):
    text = judge.Inputs((), {"input_ids": factories._ids(1, 8), "use_cache": False})
    monkeypatch.setattr(judge, "FACTORIES", {"llava": lambda _: text})
    record = judged("llava")
    assert (record.verdict, record.stage) == ("fails", "towers")
    assert record.reason == "the inputs reach every tower; got none for vision_tower (CLIPVisionModel)"


def test_the_judge_sees_a_tower_that_the_configuration_leaves_out():
    class TextOnly:
        sub_configs = dict.fromkeys(("text_config", "audio_config"))
        text_config, audio_config = object(), None

    model = nn.Module()
    model.config = TextOnly()
    assert judge._left_out(model) == ["audio_config (not configured)"]
    model.config.audio_config = object()
    assert judge._left_out(model) == []


def test_the_oracle_counts_from_source_and_names():
    layer = tiny_model("llama").layers[0]
    ran = set(layer.modules())
    assert (sums(layer, ran), sublayers(layer, ran)) == (2, 2)
    without_mlp = ran - set(layer.mlp.modules())
    assert sublayers(layer, without_mlp) == 1
    assert sums(nn.Linear(2, 2), ran) == 0


def test_shrinking_keeps_the_structure():
    default, tiny = transformers.JambaConfig(), tiny_config("jamba")
    assert set(tiny.layer_types) == set(default.layer_types)
    clip = tiny_config("clip")
    assert clip.vision_config.projection_dim == clip.text_config.projection_dim
    llava = tiny_config("llava")
    assert llava.image_token_id < llava.text_config.vocab_size


@NEWEST
def test_the_tables_name_types_that_exist():
    tables = [exceptions.COMPLETE, exceptions.CONFIGS, exceptions.CLASSES, factories.FACTORIES, table.NAMED]
    tables += [reviews.REVIEWED, reviews.IDLE, reviews.REFUSED]
    assert {name for rows in tables for name in rows} <= set(model_types())


@NEWEST
def test_the_page_has_every_type_with_a_verdict_and_a_reason():
    rows = [line for line in COVERAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [re.split(r" (?<!\\)\| ", row.strip("| ")) for row in rows]
    types = [re.match(r"`([^`]+)`", row[0])[1] for row in cells]
    assert sorted(types) == sorted(model_types())
    for row in cells:
        assert ("adapts" in row) == (row[0].split("`")[1] in recorded()), row
        assert "adapts" in row or (("refused" in row or "fails" in row) and row[-1].strip()), row
