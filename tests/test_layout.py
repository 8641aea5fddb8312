"""Layouts: what a probe writes is read back, and what does not fit a model is named."""

import copy
import json

import pytest
import transformers as tf

from inarch.core.errors import SiteError
from inarch.core.site import Sites
from inarch.sites import probe, resolve

CONFIG = tf.ViTConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)


@pytest.fixture(scope="module")
def model():
    return tf.ViTForImageClassification(CONFIG)


@pytest.fixture(scope="module")
def sites(model):
    return probe(model)


@pytest.fixture
def layout(sites):
    return copy.deepcopy(sites.to_dict())


def attention(layout):
    """The row of a layout that describes the attention of all layers."""
    (row,) = (row for row in layout["sites"] if row["role"] == "self_attention")
    return row


def test_layout_is_read_from_a_dict_a_file_or_sites(model, sites, layout, tmp_path):
    """A probe's layout gives the same sites in every form it may be passed in."""
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(layout), encoding="utf-8")
    for form in (layout, path, str(path), sites):
        read = probe(model, layout=form)
        assert read.sites == sites.sites
        assert (read.source, read.model_class, read.model_type) == ("layout", "ViTForImageClassification", "vit")


def test_layout_needs_no_forward(model, sites):
    """A layout is checked against the modules alone: the model need not run."""
    twin = tf.ViTForImageClassification(CONFIG)
    twin.forward = None
    assert probe(twin, layout=sites).sites == sites.sites


def test_layout_of_fused_and_transposed_maps_survives_json():
    """Rows and transposition are kept."""
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2)
    model = tf.GPT2Model(config)
    sites = probe(model)
    read = resolve(model, json.loads(json.dumps(sites.to_dict())))
    assert read.sites == sites.sites
    assert read["text0.0.self_attention"].projections["v"][0].rows == ((64, 96),)
    assert read["text0.0.self_attention"].projections["v"][0].transposed


def test_part_of_a_layout_is_a_layout(model, layout):
    """A user may leave sites out."""
    layout["sites"] = [attention(layout)]
    assert [site.key for site in resolve(model, layout)] == [f"image0.{layer}.self_attention" for layer in range(3)]


def set_output(layout, **changes):
    attention(layout)["output"] |= changes


def set_query(layout, **changes):
    attention(layout)["projections"]["q"][0] |= changes


def set_stream(layout, **changes):
    attention(layout)["stream"] |= changes


PROBLEMS = {
    "layer": (
        lambda data: attention(data)["layers"].update({"1": "vit.layer.1"}),
        r"`layer_path` names a module of the model; got `vit.layer.1` at image0.1.self_attention. Did you mean `vit.la",
    ),
    "output": (
        lambda data: set_output(data, path="atention"),
        r"`output` names a module .* got `vit.layers.2.atention` .* Did you mean `vit.layers.2.attention`",
    ),
    "nothing near": (
        lambda data: set_output(data, path="zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"),
        r"got `vit.layers.0.z+` at image0.0.self_attention. Name a module of `model.named_modules\(\)`",
    ),
    "stream": (
        lambda data: set_stream(data, path="norm_before"),
        r"`stream` names a module .* got `vit.layers.0.norm_before` .* Did you mean `vit.layers.0.layernorm_before`",
    ),
    "no key": (
        lambda data: set_stream(data, key=[]),
        r"`stream` on the side `in` has the position .* got none at image0.0.self_attention. Give `\[0\]`",
    ),
    "argument": (
        lambda data: set_stream(data, key=["hidden_states"]),
        r"`stream` names an argument of `vit.layers.0.layernorm_before`; got 'hidden_states' .* Its forward is `",
    ),
    "position": (
        lambda data: set_stream(data, key=[4]),
        r"`stream` names an argument of `vit.layers.0.layernorm_before`; got 4 at",
    ),
    "side": (
        lambda data: set_output(data, side="both"),
        r"`side` of `output` is `in` or `out`; got 'both' at image0.0.self_attention. Give the one that is meant",
    ),
    "norm": (
        lambda data: attention(data).update(pre_norm="ln"),
        r"`pre_norm` names a module of the model; got `vit.layers.0.ln` at",
    ),
    "width": (
        lambda data: attention(data).update(width=64),
        r"`pre_norm` normalises the width of its site; got 32 features .* has 64. Give the norm next to the sum",
    ),
    "projection": (
        lambda data: set_query(data, path="attention.query"),
        r"`projections.q` names a module of the model; got `vit.layers.0.attention.query` at",
    ),
    "no linear": (
        lambda data: set_query(data, path="layernorm_before"),
        r"`projections.q` names a linear module; got LayerNorm at `vit.layers.0.layernorm_before` of image0.0",
    ),
    "features": (
        lambda data: set_query(data, out_features=33),
        r"got \(in, out, transposed\) \(32, 33, False\) where `vit.layers.0.attention.q_proj` .* has \(32, 32, False\)",
    ),
    "rows": (
        lambda data: set_query(data, rows=[[8, 16], [12, 40]]),
        r"`rows` of `projections.q` are rising half-open ranges below 32; got \[\(8, 16\), \(12, 40\)\] at image0.0",
    ),
    "twice": (
        lambda data: data["sites"].append(attention(data)),
        r"a site has a key of its own; got 2 times `image0.0.self_attention`. Number the roles",
    ),
    "empty": (
        lambda data: data.update(sites=[]),
        r"a layout describes at least one site; got none for ViTForImageClassification",
    ),
    "format": (
        lambda data: data.update(format=0),
        r"A layout has `format` 1; got 0. Make one with",
    ),
    "kind": (
        lambda data: attention(data).update(kind="attention"),
        r"row 0 does not: `kind` must be one of self_attention, .* got 'attention'",
    ),
}


def as_named(message, sites):
    """The message, with the names that this release of transformers has for the layers and for a query."""
    site = sites["image0.0.self_attention"]
    message = message.replace("attention.q_proj", site.projections["q"][0].path)
    return message.replace("vit.layers", site.layer_path.rpartition(".")[0])


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_does_not_fit_is_named_with_the_fix(model, sites, layout, name):
    """Each fault of a layout is told with the rule, the value, the place and what to do."""
    spoil, message = PROBLEMS[name]
    spoil(layout)
    with pytest.raises(SiteError, match=as_named(message, sites)):
        resolve(model, layout)


def test_all_faults_are_told_at_once(model, layout):
    """Nobody mends a layout one error at a time."""
    set_output(layout, path="atention")
    set_query(layout, out_features=33)
    with pytest.raises(SiteError, match=r"6 problems:(?s:.)*atention(?s:.)*33, False(?s:.)*Compare with `inarch.probe"):
        resolve(model, layout)


def test_layout_of_another_model_is_refused(layout, sites):
    """The layout of one architecture does not pass for another's."""
    message = r"6 problems:(?s:.)*`layer_path` names a module of the model; got `vit.layers.0`"
    with pytest.raises(SiteError, match=as_named(message, sites)):
        resolve(tf.BertModel(tf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)), layout)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"A layout is a dict, `Sites`, or the path of a JSON file; got '.*layout.json', which cannot be read"),
        ("{", r"A layout file holds JSON; got Expecting property name .* in '.*layout.json'"),
        ("[]", r"A layout file holds a JSON object; got list in '.*layout.json'"),
    ],
    ids=["missing", "broken", "list"],
)
def test_unreadable_layout_files_are_named(model, tmp_path, content, message):
    """A file that is no layout is told by its path and by what it holds."""
    path = tmp_path / "layout.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SiteError, match=message):
        probe(model, layout=path)


def test_sites_of_a_layout_are_plain_data(sites):
    """A layout is JSON through and through, and equal sites of all layers are one row of it."""
    data = sites.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [list(row["layers"]) for row in data["sites"]] == [["0", "1", "2"]] * 2
    assert Sites.from_dict(data).sites == sites.sites
