"""What `inarch.check` says of adapter folders, and of configurations that the model has no place for."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

import inarch
from inarch.check import Training
from inarch.cli import main
from inarch.cli.skeleton import with_own_weights
from inarch.testing import tiny, tiny_inputs

FIXTURES = Path(__file__).parent / "fixtures"
PEFT = FIXTURES / "peft"


def codes(report, level=None):
    return {finding.code for finding in report.findings if level in (None, finding.level)}


def finding(report, code):
    return next(found for found in report.findings if found.code == code)


def saved(folder, config="seq_bn", name="vit-classifier"):
    """A folder of ours with weights that do something, and a task head."""
    model = tiny(name)
    adapters = inarch.attach(model)
    adapters.add("task", config, unsound="allow")
    adapters.train("task")
    with torch.no_grad():
        for parameter in adapters["task"].values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapters.save("task", folder)
    return folder


# ------------------------------------------------------------------------ folders


@pytest.mark.parametrize("measure", [True, False])
def test_a_folder_of_ours_is_judged_with_its_weights_and_leaves_the_model_as_it_was(tmp_path, measure):
    folder = saved(tmp_path / "a")
    model = tiny("vit-classifier")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = inarch.check(model, folder, measure=measure)
    assert codes(report) == set() and report.sound and report.subject == "seq_bn"
    assert [group.proof.verdict for group in report.sites] == ["preserved"]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if measure:
        inputs = tiny_inputs("vit-classifier")
        report = inarch.check(model, str(folder), example_inputs=inputs)
        with torch.no_grad():
            base = model(**inputs).logits
            adapters = inarch.attach(model)
            adapters.activate(adapters.load(folder, head=False))
            found = model(**inputs).logits
        assert report.evidence.drift == pytest.approx(float((found - base).norm() / base.norm()), rel=1e-4)
        assert "drift of the output by the adapter as it is" in str(report)


def test_an_adapter_of_another_base_is_a_finding(tmp_path):
    folder = saved(tmp_path / "a")
    report = inarch.check(tiny("vit-classifier", seed=5), folder, measure=False)
    assert codes(report, "error") == {"other-base"}
    assert "the weights of an adapter's base and of the model must agree" in finding(report, "other-base").message
    with pytest.raises(inarch.StateError, match="must agree"):  # where it does not even fit, as `load` says it
        inarch.check(tiny("bert"), folder, measure=False)


def test_an_unsound_adapter_of_a_folder_is_a_finding(tmp_path):
    folder = saved(tmp_path / "a", "seq_bn[original_ln_after=False]")
    assert codes(inarch.check(tiny("vit-classifier"), folder, measure=False)) == {"unsound-wiring"}


def test_a_head_that_has_no_place_is_a_finding(tmp_path):
    folder = saved(tmp_path / "a")
    report = inarch.check(tiny("vit-classifier").vit, folder, measure=False)
    assert codes(report, "error") == {"head-not-found"}
    assert "got `classifier` of" in finding(report, "head-not-found").message
    record = json.loads((folder / "inarch.json").read_text())
    record["head"]["labels"] = [f"other {n}" for n in range(5)]
    (folder / "inarch.json").write_text(json.dumps(record))
    model = tiny("vit-classifier")
    model.config.id2label = dict(enumerate("abcde"))
    assert "must agree in order" in finding(inarch.check(model, folder, measure=False), "head-not-found").message


def test_a_folder_of_adapterhub_is_judged():
    folder = FIXTURES / "adapterhub"
    place = next(path.parent for path in sorted(folder.rglob("adapter_config.json")) if "bert" in str(path))
    base = next(parent / "base" for parent in place.parents if (parent / "base").is_dir())
    from transformers import AutoModel

    report = inarch.check(AutoModel.from_pretrained(base).eval(), place, measure=False)
    assert "base-unknown" in codes(report) and "other-base" not in codes(report)


def test_a_folder_of_peft_is_judged_and_its_base_is_not_known(tmp_path):
    report = inarch.check(tiny("llama-lm"), PEFT / "llama_patterns", measure=False)
    assert report.sound and codes(report) == set()  # it names no base
    assert re.search(r"q of text0 self_attention, layer 0 +y = W u \+ 2\.887 · B A u", str(report))  # 5 / sqrt(3)
    folder = tmp_path / "a"
    shutil.copytree(PEFT / "llama_patterns", folder)
    record = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(record | {"base_model_name_or_path": "meta/little"}))
    note = finding(inarch.check(tiny("llama-lm"), folder, measure=False), "base-unknown")
    assert note.level == "note" and "names its base `meta/little`" in note.message
    model = tiny("llama-lm")
    model.config._name_or_path = "meta/other"
    warning = finding(inarch.check(model, folder, measure=False), "base-unknown")
    assert warning.level == "warning" and "the model is `meta/other`" in warning.message
    model.config._name_or_path = "cache/little"
    assert finding(inarch.check(model, folder, measure=False), "base-unknown").level == "note"


def test_what_a_folder_names_and_has_nothing_of_is_a_finding(tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(PEFT / "bert_task", folder)
    record = json.loads((folder / "adapter_config.json").read_text())
    record |= {"target_modules": ["query", "valeu"], "modules_to_save": ["classifier", "clasifier"]}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    found = finding(inarch.check(tiny("bert-classifier"), folder, measure=False), "matched-nothing")
    assert "`target_modules: valeu`, `modules_to_save: clasifier`" in found.message
    assert "matched-nothing" not in codes(inarch.check(tiny("bert-classifier"), PEFT / "bert_biases", measure=False))


@pytest.mark.parametrize(
    ("setting", "name", "value"), [({"lora_dropout": 1.0}, "dropout", 1.0), ({"lora_alpha": 0}, "alpha", 0.0)]
)
def test_numbers_of_a_peft_folder_that_leave_nothing_of_it_are_findings(tmp_path, setting, name, value):
    folder = tmp_path / "a"
    shutil.copytree(PEFT / "bert_biases", folder)
    record = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(record | setting))
    model = tiny("bert-classifier")
    report = inarch.check(model, folder, measure=False)
    found = finding(report, "out-of-range")
    assert f"`LoRAConfig.{name}` must be" in found.message and f"got {value}" in found.message
    assert report.has_errors and not report.sound and f"{name}={value}" in report.subject
    with pytest.raises(inarch.StateError, match=rf"must be valid here too; got .*`LoRAConfig\.{name}` must be"):
        inarch.attach(model).load(folder)


def test_dead_tensors_of_a_folder_are_found(tmp_path):
    """A and B of an update both zero: no gradient can ever reach them."""
    folder = saved(tmp_path / "a", "lora")
    tensors = load_file(folder / "adapter.safetensors")
    dead = {key: torch.zeros_like(value) if ".1." in key else value for key, value in tensors.items()}
    save_file(dead, folder / "adapter.safetensors")
    report = inarch.check(tiny("vit-classifier"), folder)
    assert len(report.evidence.dead) == 4  # A and B of q and v
    assert {key.split(".")[1] for key in report.evidence.dead} == {"1"}
    assert "dead-tensors" in codes(report, "error")
    half = {key: torch.zeros_like(value) if key.endswith(".B") else value for key, value in tensors.items()}
    save_file(half, folder / "adapter.safetensors")
    assert "dead-tensors" not in codes(inarch.check(tiny("vit-classifier"), folder))  # B moves, then A


def test_a_run_is_the_adapter_in_it(tmp_path):
    run = saved(tmp_path / "run" / "adapter").parent
    report = inarch.check(tiny("vit-classifier"), run, measure=False)
    assert report.sound and report.subject == "seq_bn"
    assert inarch.attach(tiny("vit-classifier")).load(run) == "task"
    shutil.move(run, tmp_path / "seeds" / "seed-0")
    with pytest.raises(
        inarch.StateError, match=r"none of its own\. Choose one of the 1 in it, such as `.*seed-0/adapter`"
    ):
        inarch.check(tiny("vit-classifier"), tmp_path / "seeds", measure=False)


def test_an_adapter_of_another_shape_of_base_is_told_without_an_option_that_is_not_there(tmp_path, capsys):
    """Its weights have no place in the model, so that there is nothing to judge."""
    folder = saved(tmp_path / "a")
    with pytest.raises(SystemExit):
        main(["check", "vit", "--adapter", str(folder)])
    told = " ".join(capsys.readouterr().err.split())
    assert "must agree; got" in told and "Check it on the base that it was trained on." in told
    assert "other_base" not in told and "--other-base" not in told


def test_a_preset_is_no_folder_and_nothing_is_no_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    assert inarch.check(tiny("vit"), "lora", measure=False).subject == "lora"
    with pytest.raises(inarch.StateError, match="nothing of those in"):
        inarch.check(tiny("vit"), "./lora", measure=False)
    with pytest.raises(inarch.ConfigError, match="begins with a name"):
        inarch.check(tiny("vit"), "", measure=False)


# ------------------------------------------------------------------------ places


@pytest.mark.parametrize(
    ("config", "message", "fix"),
    [
        ("lora[gate_lora=True]", "got `gate` from `gate_lora`", {"gate_lora": False}),
        ("seq_bn[leave_out=[0,7]]", "got 7 for ViTModel", {"leave_out": [0]}),
        ("lora[leave_out=[0,1]]", "must reach at least one projection", {"leave_out": []}),
        ("seq_bn[leave_out=[0,1]]", "", {"leave_out": []}),
        ("seq_bn[leave_out_roles=[mlp_2]]", "got `mlp_2`", {"leave_out_roles": []}),
        ("lora[rank_pattern={'*.gate':2}]", "pattern of `rank_pattern`", {"rank_pattern": {}}),
        ("double_seq_bn[cross_adapter=True]", "", {"cross_adapter": False}),
    ],
)
@pytest.mark.parametrize("is_attached", [False, True])
def test_what_matches_nothing_or_leaves_nothing_is_found_and_mended(config, message, fix, is_attached):
    model = tiny("vit")
    if is_attached:
        inarch.attach(model)
    report = inarch.check(model, config, measure=False)
    found = finding(report, "no-such-place")
    assert found.level == "error" and message in found.message
    assert [dict(repair.changes) for repair in found.fixes] == [fix]
    assert not report.sound and report.num_parameters == 0
    mended = found.fixes[0].apply(inarch.methods.read_config(config))
    assert "no-such-place" not in codes(inarch.check(model, mended, measure=False))


def test_the_projections_of_each_group_are_shown_with_what_they_compute():
    text = str(inarch.check(tiny("bert"), "lora[attn_matrices=[q,k,v],alpha=16,leave_out=[1]]", measure=False))
    assert "q, k, v of text0 self_attention, layer 0  y = W u + 2 · B A u" in text
    text = str(inarch.check(tiny("bert"), "ia3|lora[attn_matrices=[o],bias=True]", measure=False))
    assert "k, v of text0 self_attention, layers 0-1  y = l · W u" in text
    assert "down of text0 mlp, layers 0-1             y = W (l · u)" in text
    assert "o of text0 self_attention, layers 0-1     y = W u + B A u + c" in text
    text = str(inarch.check(tiny("bert"), "lora[use_gating=True]", measure=False))
    assert "y = W u + g(u) · B A u" in text


def test_the_formula_of_a_projection_is_what_it_computes():
    """W u + s B A u + c and l W (l u), read off the report and computed by hand."""
    model = tiny("bert")
    adapters = inarch.attach(model)
    adapters.add("a", "lora[alpha=4,bias=True,attn_matrices=[q]]|ia3[alpha=3,attn_matrices=[v],output_lora=True]")
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.normal_()
    adapters.activate("a")
    formulas = {m.placement.projection_key: m.formula() for m in adapters.plan("a").modules}
    assert formulas["text0.0.self_attention.q"] == "y = W u + 0.5 · B A u + c"
    assert formulas["text0.0.self_attention.v"] == "y = 3 · l · W u"
    assert formulas["text0.0.mlp.down"] == "y = 3 · l · W (3 · l · u)"
    own = {key.removeprefix("text0.0."): value for key, value in adapters["a"].items() if ".0." in key[:8]}
    layer, x, z = model.encoder.layer[0], torch.randn(2, 3, 32), torch.randn(2, 3, 48)
    query, down = layer.attention.self.query, layer.output.dense
    a, b, c = (own[f"self_attention.lora.q.{leaf}"] for leaf in ("A", "B", "bias"))
    outer, inner = own["mlp.ia3.down.scale"], own["mlp.ia3.down.input_scale"]
    with torch.no_grad():
        assert torch.allclose(query(x), x @ query.weight.T + query.bias + 0.5 * x @ a.T @ b.T + c, atol=1e-3)
        expected = 3 * outer * ((3 * inner * z) @ down.weight.T + down.bias)
        assert torch.allclose(down(z), expected, rtol=1e-3, atol=1e-2)


# ------------------------------------------------------------------------ trainability and rates


def test_an_adapter_for_inference_has_nothing_to_train_and_that_is_a_note(tmp_path):
    folder = saved(tmp_path / "a")
    model = tiny("vit-classifier").requires_grad_(False)
    adapters = inarch.attach(model)
    adapters.activate(adapters.load(folder))
    assert finding(inarch.check(model, measure=False), "nothing-trainable").level == "note"
    meant = inarch.check(model, measure=False, training=Training(learning_rate=1e-3))
    assert finding(meant, "nothing-trainable").level == "error"
    model.train()
    assert finding(inarch.check(model, measure=False), "nothing-trainable").level == "error"
    adapters.train("task")
    assert "nothing-trainable" not in codes(inarch.check(model, measure=False))


@pytest.mark.parametrize(("search", "is_found"), [((1e-6, 1e-4), True), ((1e-5, 1e-2), False), ((1e-4, 1e-3), False)])
def test_a_study_that_ends_below_what_adapters_need_is_found(search, is_found):
    """The first is what transformers gives Optuna."""
    report = inarch.check(tiny("vit"), "seq_bn", measure=False, training=Training(learning_rate=1e-3, search=search))
    assert ("small-rate" in codes(report)) == is_found
    if is_found:
        assert "a study of learning rates from 1e-06 to 0.0001" in finding(report, "small-rate").message


# ------------------------------------------------------------------------ the command line


def run(*arguments):
    with pytest.raises(SystemExit) as error:
        main(list(map(str, arguments)))
    return error.value.code


def test_the_command_checks_folders_and_converts_them(tmp_path, capsys):
    model = tiny("bert")
    model.save_pretrained(tmp_path / "base")
    loaded = BertModel.from_pretrained(tmp_path / "base").eval()
    adapters = inarch.attach(loaded)
    adapters.add("task", "lora[attn_matrices=[q,o],init_weights=bert]")
    adapters.save("task", tmp_path / "own")
    assert run("check", tmp_path / "base", "--adapter", tmp_path / "own", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["projections"] == [{"place": "q, o of text0 self_attention, layers 0-1", "adapted": "y = W u + B A u"}]
    assert found["findings"] == []
    assert run("convert", tmp_path / "own", tmp_path / "peft", "--to", "peft") == 0
    assert run("convert", tmp_path / "peft", tmp_path / "again", "--to", "inarch", "--model", tmp_path / "base") == 0
    before, after = (load_file(tmp_path / place / "adapter.safetensors") for place in ("own", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert run("check", tmp_path / "base", "--adapter", tmp_path / "again") == 0
    capsys.readouterr()
    assert run("check", tmp_path / "base", "--adapter", tmp_path / "own", "--fix") == 2
    assert "`--fix` changes a configuration; got the folder of an adapter" in capsys.readouterr().err
    shutil.copytree(PEFT / "bert_task", tmp_path / "nameless")
    assert run("convert", tmp_path / "nameless", tmp_path / "b", "--to", "inarch") == 1
    assert "got a folder that names none" in capsys.readouterr().err
    assert run("check", "bert", "--adapter", "lora[gate_lora=True]") == 1
    assert "no-such-place" in capsys.readouterr().out
    assert run("check", "bert", "--adapter", "lora[gate_lora=True]", "--fix") == 0
    assert "gate_lora=True] becomes lora" in capsys.readouterr().out


def test_the_model_is_given_a_head_for_the_labels_that_an_adapter_was_trained_for(tmp_path, capsys):
    """As `inarch train` leaves one: its base has a head for other labels."""
    base = tiny("vit-classifier")
    base.save_pretrained(tmp_path / "base")
    labels = {number: f"LABEL_{number}" for number in range(7)}
    model = type(base).from_pretrained(tmp_path / "base", id2label=labels, ignore_mismatched_sizes=True)
    adapters = inarch.attach(model)
    adapters.add("task", "seq_bn[reduction_factor=2]")
    adapters.train("task")
    adapters.save("task", tmp_path / "own")
    assert run("check", tmp_path / "base", "--adapter", tmp_path / "own") == 0
    assert run("convert", tmp_path / "own", tmp_path / "hub", "--to", "adapterhub", "--model", tmp_path / "base") == 0
    assert run("convert", tmp_path / "own", tmp_path / "copy", "--to", "inarch", "--model", tmp_path / "base") == 0
    before, after = (load_file(tmp_path / place / "adapter.safetensors") for place in ("own", "copy"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "copy" / "inarch.json").read_text())["head"]["labels"] == list(labels.values())


def test_an_exported_adapter_of_the_demonstration_names_its_base_as_everybody_does(tmp_path):
    """Not by the place where the package lies here."""
    adapters = inarch.attach(with_own_weights("demo"))
    adapters.add("a", "lora")
    adapters.save("a", tmp_path / "a", format="peft")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "demo"
