"""Folders of PEFT: read as PEFT computes them, written so that PEFT reads them, or refused by name.

The expected outputs come from PEFT itself: `scripts/peft_table.py --fixtures` and `scripts/make_peft_4_fixtures.py`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, ViTForImageClassification

import inarch
from inarch.convert import is_peft
from inarch.convert.peft_names import Names
from inarch.convert.peft_record import OTHER_FIELDS, OTHER_METHODS
from inarch.testing import tiny, tiny_inputs

FIXTURES = Path(__file__).parent / "fixtures" / "peft"
OLD = Path(__file__).parent / "fixtures" / "peft_4"
CASES = sorted(path.name for path in FIXTURES.iterdir())
LORA_CASES = [case for case in CASES if not case.startswith(("ia3", "vera", "prefix", "prompt", "norms"))]
OLD_CASES = sorted(str(path.parent.relative_to(OLD)) for path in OLD.glob("*/*/adapter_config.json"))


def outputs(model, inputs):
    with torch.no_grad():
        return [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]


def distance(found, expected):
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def prepared(case, **options):
    """The model of a fixture with its adapter loaded, its inputs and what PEFT computed."""
    folder = FIXTURES / case
    name = (folder / "model.txt").read_text().strip()
    model, inputs = tiny(name), tiny_inputs(name)
    adapters = inarch.attach(model, example_inputs=inputs)
    expected = [tensor for _, tensor in sorted(load_file(folder / "outputs.safetensors").items())]
    return model, inputs, adapters, adapters.load(folder, **options), expected


def edited(case, target, tensors=None, **settings):
    """A copy of a fixture with other settings or tensors."""
    shutil.copytree(FIXTURES / case, target)
    record = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(record | settings))
    if tensors is not None:
        save_file(tensors(load_file(target / "adapter_model.safetensors")), target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_computes_what_it_does_in_peft(case):
    model, inputs, adapters, name, expected = prepared(case)
    assert name == case
    adapters.activate(name)
    assert distance(outputs(model, inputs), expected) < 2e-6
    adapters.deactivate()
    assert distance(outputs(model, inputs), expected) > 1e-4


@pytest.mark.parametrize("case", OLD_CASES)
def test_adapters_under_the_module_names_of_transformers_4_are_read(case):
    folder = OLD / case
    kind = ViTForImageClassification if case.startswith("vit") else AutoModel
    model = kind.from_pretrained(folder.parent / "base").eval()
    stored = load_file(folder / "outputs.safetensors")
    adapters = inarch.attach(model)
    with adapters.using(adapters.load(folder)), torch.no_grad():
        found = model(pixel_values=stored["pixel_values"])[0]
    assert torch.allclose(found, stored["output"], atol=2e-6)
    with torch.no_grad():
        assert not torch.allclose(model(pixel_values=stored["pixel_values"])[0], stored["output"], atol=1e-2)


def test_an_adapter_of_a_model_with_a_task_is_read_into_the_bare_model_and_back(tmp_path):
    """`bert.encoder...` in the folder is `encoder...` here, and the other way round."""
    model = tiny("bert")
    adapters = inarch.attach(model)
    name = adapters.load(FIXTURES / "bert_task", head=False)
    stored = load_file(FIXTURES / "bert_task" / "adapter_model.safetensors")
    key = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"
    assert torch.equal(adapters[name]["text0.1.self_attention.lora.q.A"], stored[key])
    adapters.save(name, tmp_path / "bare", format="peft")
    task = inarch.attach(tiny("bert-classifier"))
    again = task.load(tmp_path / "bare")
    assert all(torch.equal(value, adapters[name][k]) for k, value in task[again].items())


@pytest.mark.parametrize(
    "name",
    [
        "vit", "vit-classifier", "deit", "beit", "dinov2", "clip", "swin", "bert", "roberta", "distilbert", "llama-lm",
        "gemma2", "gptj", "t5-lm", "bart-lm", "whisper-lm",
    ],
)  # fmt: skip
def test_names_of_transformers_mean_the_roles_that_the_probe_found(name):
    """An independent check: the probe knows roles from what the forward computes, the table from what names say."""
    sites = inarch.probe(tiny(name), example_inputs=tiny_inputs(name))
    names = Names(sites)
    checked = 0
    for path, meant in names.paths.items():
        if len(meant) > 1 or meant[0].part or meant[0].site.role != meant[0].site.kind:
            continue
        found = names._by_meaning(f"elsewhere.{path}")
        if found is not None:  # a name that says nothing is refused, never mistaken
            assert found.projection_key == meant[0].projection_key
            checked += 1
    assert checked >= len(names.paths) * 0.8


def test_patterns_ranks_and_scales_are_those_of_the_folder():
    _, _, adapters, name, _ = prepared("llama_patterns")
    part = adapters.config(name).parts[0]
    ranks = {key: len(tensor) for key, tensor in adapters[name].items() if key.endswith(".A")}
    assert ranks["text0.0.self_attention.lora.q.A"] == 3 and ranks["text0.1.self_attention.lora.q.A"] == 2
    assert ranks["text0.0.mlp.lora.down.A"] == ranks["text0.1.mlp.lora.down.A"] == 4
    scales = {module.placement.projection_key: part.scale(module.placement) for module in adapters.plan(name).modules}
    assert scales["text0.0.self_attention.q"] == pytest.approx(5 / 3**0.5)  # rank-stabilised: alpha over a root
    assert scales["text0.1.self_attention.v"] == pytest.approx(3 / 2**0.5)


def test_what_an_expression_chose_is_read_off_the_tensors():
    _, _, adapters, name, _ = prepared("llama_expression")
    assert {key.rpartition(".")[0] for key in adapters[name]} == {
        "text0.1.self_attention.lora.q", "text0.1.self_attention.lora.k", "text0.0.mlp.lora.up",
    }  # fmt: skip


@pytest.mark.parametrize("case", LORA_CASES)
def test_lora_written_for_peft_is_the_same_again(case, tmp_path):
    """PEFT's own reading of what is written is in `scripts/peft_table.py`."""
    model, inputs, adapters, name, expected = prepared(case)
    adapters.save(name, tmp_path / "back", format="peft")
    before, after = (load_file(p / "adapter_model.safetensors") for p in (FIXTURES / case, tmp_path / "back"))
    # There whole biases are stored, here what was added; and updates outside of the layers, here in their modules.
    if case not in ("bert_biases", "pissa_bert"):
        assert before.keys() == after.keys()
    adapters.load(tmp_path / "back", name="again")
    adapters.activate("again")
    assert distance(outputs(model, inputs), expected) < 2e-6
    assert is_peft(tmp_path / "back")


def test_updates_of_a_fused_projection_become_one(tmp_path):
    """By hand: W + [s_q B_q A_q; 0; s_v B_v A_v] is what the one update of rank 4 + 2 gives."""
    model = tiny("gpt2")
    adapters = inarch.attach(model)
    adapters.add("a", "lora[r=4,alpha=2,rank_pattern={'*.v':2},alpha_pattern={'*.v':5}]")
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.normal_()
    adapters.save("a", tmp_path / "a", format="peft")
    record = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    own = {key.removeprefix("text0.0.self_attention.lora."): value for key, value in adapters["a"].items()}
    a, b = (stored[f"base_model.model.h.0.attn.c_attn.lora_{side}.weight"] for side in "AB")
    assert record["r"] == len(a) == 6 and record["target_modules"] == ["c_attn"]
    update = b @ a * (record["lora_alpha"] / record["r"])
    expected = torch.cat([own["q.B"] @ own["q.A"] * 0.5, torch.zeros(32, 32), own["v.B"] @ own["v.A"] * 2.5])
    assert torch.allclose(update, expected, atol=1e-5)
    adapters.activate("a")
    before = outputs(model, tiny_inputs("gpt2"))
    adapters.load(tmp_path / "a", name="b")
    adapters.activate("b")
    assert distance(outputs(model, tiny_inputs("gpt2")), before) < 2e-5


def test_modules_that_were_trained_whole_are_the_task_head():
    model, _, adapters, name, _ = prepared("bert_biases")
    stored = load_file(FIXTURES / "bert_biases" / "adapter_model.safetensors")
    assert torch.equal(model.classifier.weight, stored["base_model.model.classifier.weight"])
    assert list(adapters.head(name)) == ["head.classifier.weight", "head.classifier.bias"]


def test_a_projection_outside_of_the_layers_is_taken_whole(tmp_path, caplog):
    """`all-linear` adapts BERT's pooler too: its weight with the update is W + (alpha / r) B A."""

    def with_pooler(tensors):
        key = "base_model.model.bert.pooler.dense.lora_"
        return tensors | {f"{key}A.weight": torch.full((2, 32), 0.5), f"{key}B.weight": torch.full((32, 2), 0.25)}

    folder = edited("bert_task", tmp_path / "a", with_pooler)
    model = tiny("bert-classifier")
    before = model.bert.pooler.dense.weight.detach().clone()
    name = inarch.attach(model).load(folder)
    assert torch.allclose(model.bert.pooler.dense.weight, before + 5 / 2 * (2 * 0.5 * 0.25))
    assert "stay replaced when the adapter is not active: bert.pooler.dense" in caplog.text
    assert name == "a"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LN_TUNING"}, "Trained norms are read at those of .*, one copy for each; got none at"),
        ({"peft_type": "PREFIX_TUNING"}, r"one table `prompt_embeddings` .*; got a table of shape \(\), `"),
        *(({"peft_type": kind}, f"got {name} at") for kind, name in OTHER_METHODS.items()),
        *(({field: True}, f"got {name} at") for field, name in OTHER_FIELDS.items()),
        ({"peft_type": "SHADOW"}, "got the method `SHADOW` at"),
        ({"peft_type": "VERA"}, "with its random matrices and two vectors .*got a folder without"),
        (
            {"target_parameters": ["self.query.weight"]},
            "for experts .* in one; got `bert.*query.weight`",
        ),
        ({"turbo": 3}, "got the setting `turbo`, which it does not know, at"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "numbers .*path_initial_model_for_weight_conversion",
        ),
        (
            {"init_lora_weights": "loftq"},
            "got `init_lora_weights` 'loftq', which changes the base",
        ),
        ({"auto_mapping": {"base_model_class": "ViTModel"}}, "must be of the same type; got `ViTModel` at"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused_by_name(settings, message, tmp_path):
    adapters = inarch.attach(tiny("bert-classifier"))
    with pytest.raises(inarch.StateError, match=message):
        adapters.load(edited("bert_task", tmp_path / "a", **settings))
    assert adapters.names == ()


def test_updates_of_experts_are_those_of_one_parameter(tmp_path):
    adapters = inarch.attach(tiny("mixtral-lm"))
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"

    def narrow(tensors):
        return tensors | {key: tensors[key][:, :-1].contiguous()}

    def twice(tensors):
        others = {name: tensors[name.replace("base_layer.", "")].clone() for name in tensors if "base_layer" in name}
        return tensors | others

    for number, change in enumerate((narrow, twice)):
        with pytest.raises(inarch.StateError, match="one of a parameter that holds them all, and of one .*mlp.experts"):
            adapters.load(edited("experts_mixtral", tmp_path / str(number), change))
    assert adapters.names == ()


def test_dora_that_starts_from_its_base_is_refused(tmp_path):
    adapters = inarch.attach(tiny("vit"))
    with pytest.raises(inarch.StateError, match="DoRA is read where it starts beside its base; got .*'pissa' at"):
        adapters.load(edited("dora_vit", tmp_path / "a", init_lora_weights="pissa"))


def with_tensor(key, tensor):
    return lambda tensors: tensors | {f"base_model.model.{key}": tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_tensor("bert.embeddings.word_embeddings.lora_embedding_A", torch.zeros(2, 99)),
            r"must belong to a projection of a branch.*got `bert.embeddings.word_embeddings.lora_embedding_A`",
        ),
        (
            lambda tensors: {
                key: value for key, value in tensors.items() if "layer.0" not in key or "lora_B" not in key
            },
            "has two matrices; got no `lora_B` for `bert.encoder.layer.0.attention.self.query`",
        ),
        (
            with_tensor("bert.encoder.layer.7.attention.self.query.lora_A.weight", torch.zeros(2, 32)),
            "got modules that are none in BertForSequenceClassification: `bert.encoder.layer.7.attention.self.query`",
        ),
        (
            lambda tensors: {
                key: value[:, :16].contiguous() if "lora_A" in key else value for key, value in tensors.items()
            },
            r"has shape \(2, 16\), the model wants \(2, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
    adapters = inarch.attach(tiny("bert-classifier"))
    with pytest.raises(inarch.StateError, match=message):
        adapters.load(edited("bert_task", tmp_path / "a", change))
    assert adapters.names == ()


def test_biases_outside_of_the_adapted_projections_are_refused_unless_they_are_the_bases(tmp_path):
    model = tiny("bert-classifier")
    adapters = inarch.attach(model)
    bias = model.bert.encoder.layer[0].output.dense.bias.detach().clone()
    name = "bert.encoder.layer.0.output.dense.bias"
    adapters.load(edited("bert_task", tmp_path / "same", with_tensor(name, bias), bias="all"))
    with pytest.raises(inarch.StateError, match="trained biases outside of the adapted projections"):
        adapters.load(edited("bert_task", tmp_path / "other", with_tensor(name, bias + 1), bias="all"))


def test_an_adapter_of_another_model_type_is_refused_where_its_names_say_so(tmp_path):
    """BERT's and ViT's projections have the same shapes here, and names that mean the same roles."""
    adapters = inarch.attach(tiny("vit"))
    with pytest.raises(inarch.StateError, match="of the same type; got modules such as `bert.encoder"):
        adapters.load(edited("bert_task", tmp_path / "a", auto_mapping=None), head=False)
    assert adapters.load(edited("bert_task", tmp_path / "b", auto_mapping=None), head=False, other_base="allow") == "b"


@pytest.mark.parametrize(
    ("made_for", "same"),
    [
        ({"base_model_class": "BertForMaskedLM", "parent_library": "transformers.models.bert.modeling_bert"}, True),
        ({"base_model_class": "BertModel", "parent_library": "transformers.models.old.bert.modeling_bert"}, True),
        ({"base_model_class": "BertForSequenceClassification", "parent_library": "__main__"}, True),
        (
            {
                "base_model_class": "BertGenerationEncoder",
                "parent_library": "transformers.models.bert_generation.modeling_bert_generation",
            },
            False,
        ),
        ({"base_model_class": "Model", "parent_library": "elsewhere"}, False),
    ],
)
def test_the_type_that_an_adapter_was_made_for_is_that_of_its_class(made_for, same, tmp_path):
    adapters = inarch.attach(tiny("bert-classifier"))
    folder = edited("bert_task", tmp_path / "a", auto_mapping=made_for)
    if same:
        assert adapters.load(folder) == "a"
        return
    with pytest.raises(inarch.StateError, match=f"of the same type; got `{made_for['base_model_class']}` at"):
        adapters.load(folder)


@pytest.mark.parametrize(("word", "same"), [("encoder", True), ("mine", True), ("roberta", False), ("vit", False)])
def test_the_first_word_of_a_path_may_be_anything_but_another_model_type(word, same, tmp_path):
    def renamed(tensors):
        return {key.replace("model.bert.", f"model.{word}."): tensor for key, tensor in tensors.items()}

    folder = edited("bert_task", tmp_path / "a", renamed, auto_mapping=None)
    adapters = inarch.attach(tiny("bert-classifier"))
    if same:
        assert adapters.load(folder) == "a"
        return
    with pytest.raises(inarch.StateError, match=f"of the same type; got modules such as `{word}.encoder"):
        adapters.load(folder)


@pytest.mark.parametrize("tower", ["text_model.encoder", "decoder"])
def test_an_adapter_of_another_tower_is_refused_though_its_shapes_fit(tower, tmp_path):
    model = tiny("clip-vision")
    width = model.config.hidden_size
    written = {}
    for layer in range(model.config.num_hidden_layers):
        key = f"base_model.model.{tower}.layers.{layer}.self_attn.q_proj"
        written |= {f"{key}.lora_A.weight": torch.ones(2, width), f"{key}.lora_B.weight": torch.ones(width, 2)}
    record = {"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(record))
    save_file(written, tmp_path / "adapter_model.safetensors")
    adapters = inarch.attach(model)
    with pytest.raises(inarch.StateError, match=rf"modules that are none in CLIPVisionModel: `{tower}.layers.0"):
        adapters.load(tmp_path)


def test_a_head_that_the_model_does_not_have_is_refused():
    with pytest.raises(inarch.StateError, match="must exist in the model; got `classifier` of"):
        inarch.attach(tiny("bert")).load(FIXTURES / "bert_task")


def test_a_head_that_is_one_with_the_embeddings_is_refused(tmp_path):
    """PEFT gives it a copy, and leaves the embeddings as they are."""

    def with_head(scale):
        return lambda tensors: tensors | {"base_model.model.lm_head.weight": weight * scale}

    def folder(name, scale):
        return edited("gpt2_fused", tmp_path / name, with_head(scale), modules_to_save=["lm_head"])

    model = tiny("gpt2-lm")
    weight = model.lm_head.weight.detach().clone()
    adapters = inarch.attach(model)
    with pytest.raises(inarch.StateError, match=r"ties to `transformer.wte.weight`. .*tie_word_embeddings=False"):
        adapters.load(folder("a", 2))
    assert adapters.load(folder("b", 1)) == "b"  # what changes nothing
    config = transformers.GPT2Config(**model.config.to_dict() | {"tie_word_embeddings": False})
    loose = transformers.GPT2LMHeadModel(config)
    adapters = inarch.attach(loose)
    adapters.load(folder("c", 2))
    assert torch.equal(loose.lm_head.weight, weight * 2)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_no_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = edited("bert_task", tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Bomb()}, folder / "adapter_model.bin")
    with pytest.raises(inarch.StateError, match="torch file of nothing but tensors"):
        inarch.attach(tiny("bert-classifier")).load(folder)
    assert not Path("exploded").exists()
    torch.save(load_file(FIXTURES / "bert_task" / "adapter_model.safetensors"), folder / "adapter_model.bin")
    assert inarch.attach(tiny("bert-classifier")).load(folder) == "a"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("dora[bias=True]", "got DoRA with `bias=True` of `a`"),
        ("seq_bn", "where PEFT has its method, plain LoRA or DoRA; got the method `bottleneck` of `a`"),
        ("lora|seq_bn", "got the method `bottleneck` of `a`"),
        ("lora[use_gating=True]", "got `use_gating=True` of `a`"),
    ],
)
def test_what_peft_does_not_have_is_not_written(config, message, tmp_path):
    adapters = inarch.attach(tiny("vit"))
    adapters.add("a", config)
    with pytest.raises(inarch.StateError, match=message):
        adapters.save("a", tmp_path / "a", format="peft")
    with pytest.raises(
        inarch.StateError, match="is written in the format `inarch` or `peft` or `adapterhub`; got 'onnx' for `a`"
    ):
        adapters.save("a", tmp_path / "a", format="onnx")
    assert not (tmp_path / "a").exists()


def test_weights_that_a_module_applies_itself_are_not_written(tmp_path):
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    adapters = inarch.attach(model, example_inputs=torch.randn(2, 5, 32))
    adapters.add("a", "lora")
    with pytest.raises(inarch.StateError, match="where its projections are modules; got `.*self_attention.q`"):
        adapters.save("a", tmp_path / "a", format="peft")


def test_patterns_of_projections_choose_ranks_scales_and_what_is_left_out():
    """By hand on one projection: y = W x + b + (alpha / r) B A x + c, with the rank and alpha of the first pattern."""
    model = tiny("bert")
    adapters = inarch.attach(model)
    adapters.add(
        "a",
        "lora[r=4,rank_pattern={'*.0.*.q':2,'*.q':3},alpha_pattern={'*.q':6.0},bias=True,"
        "leave_out_projections=['text0.1.self_attention.v']]",
    )
    shapes = {key: tuple(value.shape) for key, value in adapters["a"].items()}
    assert {key: shape for key, shape in shapes.items() if key.endswith(".A")} == {
        "text0.0.self_attention.lora.q.A": (2, 32),
        "text0.0.self_attention.lora.v.A": (4, 32),
        "text0.1.self_attention.lora.q.A": (3, 32),
    }
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.normal_()
    query, x = model.encoder.layer[0].attention.self.query, torch.randn(2, 3, 32)
    own = {key.rpartition(".")[2]: value for key, value in adapters["a"].items() if ".0.self_attention.lora.q" in key}
    adapters.activate("a")
    expected = x @ query.weight.T + query.bias + 6 / 2 * (x @ own["A"].T @ own["B"].T) + own["bias"]
    assert torch.allclose(query(x), expected, atol=1e-4)
    with adapters.using(None):
        assert torch.allclose(query(x), x @ query.weight.T + query.bias, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "lora[rank_pattern={'*.gate':2}]",
            r"pattern of `rank_pattern` must match a projection.*got `\*.gate` for Bert",
        ),
        ("lora[alpha_pattern={'text0.7.*':2}]", "pattern of `alpha_pattern` must match"),
        ("lora[leave_out_projections=['*.cross_attention.*']]", "pattern of `leave_out_projections` must match"),
        (
            "lora[leave_out_projections=['*']]",
            r"must reach at least one projection; got `leave_out_projections=\['\*'\]`",
        ),
        ("ia3[leave_out_projections=['*.u']]", "pattern of `leave_out_projections` must match"),
        ("ia3[input_matrices=[q]]", "`IA3Config.input_matrices` must name projections that are adapted; got `q`"),
    ],
)
def test_patterns_that_match_nothing_are_refused(config, message):
    with pytest.raises(inarch.ConfigError, match=message):
        inarch.attach(tiny("bert")).add("a", config)


def test_the_input_of_one_role_of_a_fused_projection_is_not_scaled_alone():
    with pytest.raises(
        inarch.ConfigError, match=r"scaled where it has one role; got `input_matrices` with `k` for GPT2"
    ):
        inarch.attach(tiny("gpt2")).add("a", "ia3[input_matrices=[k]]")


def test_a_prefix_is_read_where_positions_turn_queries_and_keys(tmp_path):
    adapters = inarch.attach(tiny("gpt2"))
    with pytest.raises(inarch.StateError, match="turn all queries and keys .*; got `GPT2Attention` at"):
        adapters.load(edited("prefix_llama", tmp_path / "a", lambda _: {"prompt_embeddings": torch.randn(3, 128)}))
    with pytest.raises(inarch.StateError, match="one table .* got a table of shape .* for 2 attentions of GPT2Model"):
        adapters.load(FIXTURES / "prefix_llama")


def test_trained_norms_have_the_values_of_the_folder_and_leave_others_alone():
    """In a layer of two that has copies of both its norms; PEFT's are the values, ours the differences."""
    model, _, adapters, name, _ = prepared("norms_vit")
    stored = load_file(FIXTURES / "norms_vit" / "adapter_model.safetensors")
    assert {key.split(".")[1] for key in adapters[name]} == {"1"}
    own = model.layers[1].layernorm_after.weight
    value = stored["base_model.model.layers.1.layernorm_after.ln_tuning_layers.weight"]
    assert torch.equal(own + adapters[name]["image0.1.mlp.layernorm_tuning.pre_norm.weight"], value)


@pytest.mark.parametrize("prefix", ["vit.encoder.layer.", "encoder.layer.", "vit.layers."])
def test_norms_under_other_module_names_are_the_same(tmp_path, prefix):
    def renamed(tensors):
        return {key.replace("model.layers.", f"model.{prefix}"): tensor for key, tensor in tensors.items()}

    *_, expected = prepared("norms_vit")
    model = tiny("vit")
    adapters = inarch.attach(model)
    with adapters.using(adapters.load(edited("norms_vit", tmp_path / "a", renamed))):
        assert distance(outputs(model, tiny_inputs("vit")), expected) < 2e-6


def test_other_modules_that_were_copied_whole_are_part_of_the_head(tmp_path, caplog):
    """A copy of what is no norm of a layer or around the layers, here the pooler."""

    def with_pooler(tensors):
        path = "base_model.model.bert.pooler.dense.ln_tuning_layers"
        return tensors | {f"{path}.weight": torch.full((32, 32), 0.5), f"{path}.bias": torch.full((32,), 0.25)}

    model = tiny("bert-classifier")
    name = inarch.attach(model).load(edited("norms_bert", tmp_path / "a", with_pooler))
    assert name == "a"
    assert torch.equal(model.bert.pooler.dense.weight, torch.full((32, 32), 0.5))
    assert "stay replaced when the adapter is not active: bert.pooler.dense" in caplog.text


def test_a_norm_of_another_width_or_of_no_module_here_is_refused(tmp_path):
    def narrow(tensors):
        return {key: tensor[:16] if "LayerNorm" in key else tensor for key, tensor in tensors.items()}

    with pytest.raises(inarch.StateError, match=r"has its vectors, of its size; got \(16,\) for `weight` of `bert"):
        inarch.attach(tiny("bert-classifier")).load(edited("norms_bert", tmp_path / "a", narrow))
    with pytest.raises(inarch.StateError, match=r"at those of BertModel, one copy for each; got `layers.1.l"):
        inarch.attach(tiny("bert")).load(FIXTURES / "norms_vit")
