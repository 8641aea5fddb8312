"""The names of the library `adapters` over inarch, and three of its published usage patterns."""

import ast
import copy
import importlib.util
import pickle
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers

import inarch
import inarch.compat as adapters
import inarch.compat.composition as ac
from inarch.combine import Combination
from inarch.compat import METHODS, words
from inarch.core.errors import ConfigError, SetupError
from inarch.testing import tiny, tiny_inputs

ROOT = Path(__file__).parent.parent
BATCH = tiny_inputs("bert", batch=8)
LABELS = torch.arange(8) % 2
ELSEWHERE = ("cli", "sweep", "report", "compat", "rules", "pretrained.py", "peft_write.py", "data")
"""Where messages are made that no call through the door meets."""


def texts():
    """Every text of the package but docstrings, and those that are made elsewhere."""
    for path in (ROOT / "src" / "inarch").rglob("*.py"):
        if not set(ELSEWHERE) & set(path.parts):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told)
            yield from (node.value for node in constants if isinstance(node.value, str))


def weights(model, name):
    places = [places for layer in model.get_adapter(name).values() for places in layer.values()]
    return [parameter for module in places for parameter in module.parameters()]


def fit(model, tmp_path, **batch):
    rows = [{key: value[number] for key, value in batch.items()} for number in range(8)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, learning_rate=0.01, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = adapters.AdapterTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def test_sentiment_with_a_bottleneck_and_a_head(tmp_path):
    model = tiny("bert")
    adapters.init(model)
    model.add_adapter("sst-2", config=adapters.SeqBnConfig(reduction_factor=4))
    model.add_classification_head("sst-2", num_labels=2, id2label={0: "bad", 1: "good"})
    model.train_adapter("sst-2")
    assert model.active_adapters == "sst-2" and model.active_head == "sst-2"
    before, after = fit(model, tmp_path / "run", **BATCH, labels=LABELS)
    assert after < before
    model.save_adapter(tmp_path / "sst-2", "sst-2")
    model.eval()
    fresh = tiny("bert")
    adapters.init(fresh)
    assert fresh.load_adapter(tmp_path / "sst-2", load_as="again", set_active=True) == "again"
    assert fresh.get_labels("again") == ["bad", "good"]
    assert torch.equal(fresh(**BATCH).logits, model(**BATCH).logits)
    assert "sst-2" in model.adapter_summary()


def test_fusion_of_three_tasks(tmp_path):
    model = tiny("bert")
    adapters.init(model)
    tasks = ["multinli", "qqp", "qnli"]
    for task in tasks:
        model.add_adapter(task, config="seq_bn[reduction_factor=4]")
    setup = ac.Fuse(*tasks)
    model.add_adapter_fusion(setup)
    model.set_active_adapters(setup)
    model.add_classification_head("cb", num_labels=2)
    model.train_adapter_fusion(setup)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("fusion" in key or ".heads.cb." in key for key in trained)
    assert model.get_fusion_regularization_loss() > 0
    before, after = fit(model, tmp_path / "run", **BATCH, labels=LABELS)
    assert after < before
    model.save_adapter_fusion(tmp_path / "fusion", ",".join(tasks))
    model.save_head(tmp_path / "head", "cb")
    model.save_all_adapters(tmp_path / "all")
    model.eval()
    fresh = tiny("bert")
    adapters.init(fresh)
    for task in tasks:
        fresh.load_adapter(tmp_path / "all" / task)
    fresh.load_adapter_fusion(tmp_path / "fusion", set_active=True)
    assert fresh.active_adapters == setup and fresh.active_adapters.flatten() == set(tasks)
    fresh.active_head = fresh.load_head(tmp_path / "head")
    assert torch.equal(fresh(**BATCH).logits, model(**BATCH).logits)


def test_a_language_is_changed_below_a_task(tmp_path):
    """MAD-X: a task is trained on an English language adapter and tested on a Chinese one."""
    for name, seed in (("en", 1), ("zh", 2)):
        model = tiny("bert")
        adapters.init(model)
        torch.manual_seed(seed)
        model.add_adapter(name, config=adapters.SeqBnInvConfig(reduction_factor=2))
        for parameter in weights(model, name):
            parameter.data.normal_(std=0.2)
        model.save_adapter(tmp_path / name, name)
    model = tiny("bert")
    adapters.init(model)
    for name in ("en", "zh"):
        model.load_adapter(tmp_path / name)
    model.add_adapter("copa", config="seq_bn[reduction_factor=4]")
    model.add_multiple_choice_head("copa", num_choices=2)
    model.train_adapter(["copa"])
    model.active_adapters = ac.Stack("en", "copa")
    choices = {"input_ids": torch.stack([BATCH["input_ids"], BATCH["input_ids"].flip(0)], dim=1)}
    before, after = fit(model, tmp_path / "run", **choices, labels=LABELS)
    assert after < before
    assert not any(parameter.requires_grad for parameter in weights(model, "en"))
    model.eval()
    english = model(**choices).logits
    model.active_adapters = ac.Stack("zh", "copa")
    chinese = model(**choices).logits
    assert model.active_adapters == ac.Stack("zh", "copa") and model.active_head == "copa"
    assert not torch.allclose(english, chinese)
    with adapters.AdapterSetup(ac.Stack("en", "copa")):
        assert torch.equal(model(**choices).logits, english)
    assert torch.equal(model(**choices).logits, chinese)


def noting(called, name):
    def method(_, *args, **kwargs):
        called.append((name, args, kwargs))

    return method


def test_both_forms_of_a_method_reach_their_library(monkeypatch):
    model = tiny("bert")
    called = []
    for name in ("add_adapter", "load_adapter", "delete_adapter", "active_adapters"):
        monkeypatch.setattr(type(model), name, noting(called, name))
    adapters.init(model)
    model.add_adapter("a", "lora", set_active=True)
    assert not called and model.active_adapters == "a"
    peft = type("LoraConfig", (), {"peft_type": "LORA"})()
    model.add_adapter(peft, adapter_name="b")
    model.add_adapter(adapter_config=peft)
    model.load_adapter(peft_model_id="c/d")
    model.delete_adapter(adapter_names="b")
    model.active_adapters()
    assert [name for name, _, _ in called] == [
        "add_adapter", "add_adapter", "load_adapter", "delete_adapter", "active_adapters",
    ]  # fmt: skip
    assert called[0] == ("add_adapter", (peft,), {"adapter_name": "b"})
    assert inarch.attach(model).names == ("a",)


def test_what_is_assigned_holds_from_the_next_forward():
    model = tiny("bert")
    adapters.init(model)
    for name in "ab":
        model.add_adapter(name)
        model.add_tagging_head(name, num_labels=3)
    model.active_adapters = "a"
    assert model(**BATCH).logits.shape == (8, 7, 3) and model.active_head == "a"
    model.active_head = "b"
    model(**BATCH)
    assert inarch.attach(model).active_head == "b"
    model.active_adapters = ac.Parallel("a", "b")
    with pytest.raises(SetupError, match="is activated before the model is called; got Parallel"):
        model(**BATCH)
    output = model(**BATCH)
    assert len(output) == 2 and [one.logits.shape for one in output] == [(8, 7, 3)] * 2
    assert output[1] is output.head_outputs[1] and set(output.keys()) == {"logits"} and "logits" in output
    model.set_active_adapters(None)
    assert model.active_adapters is None and model.active_head is None
    assert "logits" not in model(**BATCH)
    assert pickle.loads(pickle.dumps(model)).adapter_summary() == model.adapter_summary()


def test_what_is_active_reads_as_its_block():
    """As a sequence, which is None where nothing is active; and it may be activated again."""
    model = tiny("bert")
    adapters.init(model)
    assert model.active_adapters is None
    for name in "abc":
        model.add_adapter(name)
    model.set_active_adapters("a")
    before = model.active_adapters
    assert before == "a" and before == ac.Stack("a") and before != ac.Stack("b") and before != ac.Parallel("a")
    assert (len(before), before[0], list(before), before.first()) == (1, "a", ["a"], "a") and "b" not in before
    model.add_adapter_fusion(["b", "c"])
    model.active_adapters = ["a", ["b", "c"]]
    model(**BATCH)
    found = model.active_adapters
    assert found == ac.Stack("a", ac.Fuse("b", "c")) and found.children == ("a", ac.Fuse("b", "c"))
    assert list(found[1]) == ["b", "c"] and "b" in found[1] and "b" not in found and len(found[1]) == 2
    assert (found.first(), found.last(), found.flatten()) == ("a", "c", {"a", "b", "c"})
    model.active_adapters = before
    model(**BATCH)
    assert model.active_adapters == "a"
    model.set_active_adapters(found)
    assert inarch.attach(model).setup == found.setup and found.parallel_channels == 1
    model.set_active_adapters(ac.Parallel("a", ac.Stack("b", "c")))
    assert model.active_adapters.parallel_channels == 2
    with pytest.raises(SetupError, match=r"made of adapters by name; got the setup Average\('a', 'b'"):
        model.average_adapter("d", ac.Average("a", "b", weights=[1, 3]))
    model.set_active_adapters([])
    assert model.active_adapters is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, _: m.add_adapter("a"), "name, `delete_adapter` the old one, or pass `overwrite_ok=True`"),
        (lambda m, _: m.add_tagging_head("h"), "`delete_head` the old one, or pass `overwrite_ok=True`"),
        (lambda m, _: m.add_tagging_head("h.h"), "A head's name is text without `.`"),
        (lambda m, _: m.add_adapter("h.h"), "An adapter's name is text without `.`"),
        (lambda m, _: m.set_active_adapters(ac.Fuse("a", "b")), r"`add_adapter_fusion\(Fuse\('a', 'b'"),
        (lambda m, _: m.average_adapter("c", ["a"], combine_strategy="x"), "`combine_strategy` is .*`lora_delta_w_svd"),
        (lambda m, _: m.average_adapter("c", ["a"], svd_rank=2), "`svd_rank` cuts off .* `lora_delta_w_svd`"),
        (lambda m, _: m.add_adapter("c", "seq_bn[original_ln_after=False]"), r"attach\(model\).add\(name, config, un"),
        (lambda m, _: (m.inarch.heads.h.to("meta"), m.train_adapter("a")), r"call .*\.train\(name, head=False\)`"),
        (lambda m, path: m.load_adapter(path), "Give the folder of one adapter|as `save_adapter` writes it"),
        (lambda m, path: m.load_adapter_setup(path), "as `save_adapter_setup` writes it.*; `load_adapter` reads that"),
        (lambda m, _: m.share_parameters([]), r"`share_parameters\(\[\.\.\.\]\)`"),
        (lambda m, _: adapters.AdapterTrainer(m), r"Call `model.train_adapter\('a'\)`"),
    ],
)  # fmt: skip
def test_errors_name_what_is_typed_here(call, said, tmp_path):
    model = tiny("vit")
    adapters.init(model)
    for name in "ab":
        model.add_adapter(name)
    model.add_image_classification_head("h")
    with pytest.raises(inarch.InarchError, match=said):
        call(model, tmp_path)


def test_every_call_that_an_error_names_is_told_in_the_words_of_the_door():
    """Of the messages that a call on a model can meet, none names a method of the handle that is not here by itself."""
    said = [*texts(), *(f"`{way}`" for way in get_args(Combination))]
    ours = {name for name in dir(inarch.Adapters) if not name.startswith("_")} - set(METHODS)
    named = re.compile(rf"`(adapters\.({'|'.join(ours)})|({'|'.join(ours)})\()")
    assert any(named.search(text) for text in said), "the search finds nothing any more"
    assert not [text for text in said if named.search(words.told(text))]
    for word, here in words.WORDS.items():
        assert any(word in text for text in said), f"no error says {word}"
        assert words.told(here) == here


def test_averages_merging_and_removal():
    model = tiny("gpt2-lm")
    adapters.init(model)
    for name in "ab":
        model.add_adapter(name, config=adapters.LoRAConfig(r=4, alpha=8))
        for parameter in weights(model, name):
            parameter.data.normal_(std=0.1)
    model.average_adapter("c", ["a", "b"], weights=[0.3, 0.7], combine_strategy="lora_delta_w_svd", svd_rank=8)
    batch = tiny_inputs("gpt2")
    plain = model(**batch).logits
    model.set_active_adapters("c")
    expected = model(**batch).logits
    model.merge_adapter("c")
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-3, atol=1e-4)
    model.reset_adapter()
    assert torch.equal(model(**batch).logits, plain)
    model.delete_adapter("c")
    assert model.has_adapters() and inarch.attach(model).names == ("a", "b")


def test_prefixes_are_ejected():
    model = tiny("gpt2-lm")
    adapters.init(model)
    model.add_adapter("a", config=adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6))
    model.set_active_adapters("a")
    before = model(**tiny_inputs("gpt2")).logits
    model.eject_prefix_tuning("a")
    assert inarch.attach(model).config("a").parts[0].flat
    torch.testing.assert_close(model(**tiny_inputs("gpt2")).logits, before, rtol=0, atol=1e-5)


def test_models_by_name(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    model = adapters.AutoAdapterModel.from_pretrained(tmp_path)
    model.add_adapter("a", config=adapters.ConfigUnion(adapters.LoRAConfig(), "seq_bn"))
    assert type(model) is transformers.BertModel
    assert adapters.load_model(tmp_path, transformers.BertModel).has_adapters() is False
    with pytest.raises(SetupError, match="inarch finds the places of adapters by itself"):
        adapters.init(tiny("bert"), interface="x")
    with (
        pytest.raises(SetupError, match="for models that have its adapters; got 'nobody'"),
        adapters.AdapterSetup("nobody"),
    ):
        pass
    with pytest.raises(ConfigError, match="has no field `reduction`"):
        adapters.SeqBnConfig(reduction=2)


def test_every_configuration_class_is_a_preset():
    for name, make in adapters.CONFIGS.items():
        assert getattr(adapters, name) is make
        assert make().parts


def test_the_page_tells_every_call():
    spec = importlib.util.spec_from_file_location("docs_migrate", ROOT / "scripts" / "docs_migrate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run scripts/docs_migrate.py"


@pytest.mark.parametrize("word", ["output_adapter_gating_scores", "output_adapter_fusion_attentions"])
def test_scores_are_not_asked_for_in_vain(word):
    model = tiny("bert")
    adapters.init(model)
    model.add_adapter("a", config="seq_bn", set_active=True)
    with pytest.raises(SetupError, match=f"got `{word}=True` for BertModel. Call the model in `with inarch"):
        model(**BATCH, **{word: True})
    model(**BATCH, **{word: False})


def test_a_setup_holds_for_copies_and_is_used_again():
    model = tiny("bert")
    adapters.init(model)
    for name in "ab":
        model.add_adapter(name, config=adapters.SeqBnConfig(init_weights="mam_adapter"))
        for parameter in weights(model, name):
            parameter.data.add_(0.1)
    again = copy.deepcopy(model)
    expected = {}
    for name in "ab":
        model.set_active_adapters(name)
        expected[name] = model(**BATCH).last_hidden_state
    model.set_active_adapters("a")
    block = adapters.AdapterSetup("b")
    for _ in range(2):
        with block:
            assert torch.equal(model(**BATCH).last_hidden_state, expected["b"])
            assert torch.equal(again(**BATCH).last_hidden_state, expected["b"])
            with adapters.AdapterSetup(None, ignore_empty=True):
                assert torch.equal(model(**BATCH).last_hidden_state, expected["b"])
            with adapters.AdapterSetup(None):
                assert model.active_adapters is None
        assert model.active_adapters == "a" and again.active_adapters is None
    assert torch.equal(model(**BATCH).last_hidden_state, expected["a"])


def test_the_door_closes_with_its_handle():
    model = tiny("bert")
    adapters.init(model)
    model.add_adapter("a", set_active=True)
    adapters.init(model)
    assert model.active_adapters == "a" and len(model._forward_pre_hooks) == 1
    inarch.attach(model).detach()
    model(**BATCH)
    assert not model._forward_pre_hooks
    assert not {"add_adapter", "active_head", "adapters_config", "iter_attentions"} & set(model.__dict__)
    inarch.attach(model)
    adapters.init(model)
    model.add_adapter("b")
    inarch.attach(model).detach()
    adapters.init(model)  # without a forward in between
    model.add_adapter("b")
    model.add_tagging_head("b")
    model.set_active_adapters("b")
    assert model(**BATCH).logits.shape == (8, 7, 2)
    assert list(model.adapters_config) == ["b"] and "a" not in model.adapters_config
    assert model.adapters_config.get("a") is None and str(model.adapters_config.get("b")) == "seq_bn"


def test_layers_modules_and_rows():
    model = tiny("bert")
    adapters.init(model)
    model.add_adapter("a", config="double_seq_bn|lora")
    found = model.get_adapter("a")
    assert set(found) == {0, 1} and set(found[0]) == {"self_attention", "mlp"}
    own = {id(parameter) for parameter in inarch.attach(model)["a"].values()}
    assert {id(parameter) for parameter in weights(model, "a")} == own
    assert [layer for _, layer in model.iter_layers()] == list(model.encoder.layer)
    assert model.get_layer(1) is model.encoder.layer[1]
    adapter, base = model.adapter_summary(as_dict=True)
    count = sum(parameter.numel() for parameter in weights(model, "a"))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (adapter["adapter"], adapter["parameters"], adapter["active"]) == ("a", count, False)
    assert (base["adapter"], base["parameters"]) == ("(base)", total - count)
    assert adapter["of base"] == count / (total - count)
    model.adapter_to("a", dtype=torch.float64)
    assert {parameter.dtype for parameter in weights(model, "a")} == {torch.float64}
    assert model.supports_adapter("lora") and not model.supports_adapter("lora[gate_lora=True,selfattn_lora=False]")
    assert not model.supports_adapter("vpt_shallow")
    model.set_active_adapters("a", skip_layers=[0])
    assert model.adapters_config.skip_layers == (0,) and model.adapters_config.active_setup == "a"
    model.delete_adapter("a")
    assert model.active_adapters is None and not model.has_adapters()


class Tokens:
    """A tokenizer, as far as its vocabulary goes."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def get_vocab(self):
        return {f"w{number}": number for number in range(self.count)}


def test_embeddings_are_exchanged(tmp_path):
    model = tiny("bert")
    adapters.init(model)
    own = model.get_input_embeddings().weight
    model.add_embeddings("long", Tokens(120), "default", Tokens(99))
    assert model.active_embeddings == "long" and list(model.loaded_embeddings) == ["default", "long"]
    assert torch.equal(model.loaded_embeddings["long"].weight[:99], own)
    model.add_adapter("a")
    model.train_adapter("a", train_embeddings=True)
    assert model.loaded_embeddings["long"].weight.requires_grad and not own.requires_grad
    model.freeze_embeddings()
    assert not model.loaded_embeddings["long"].weight.requires_grad
    expected = model.eval()(input_ids=torch.tensor([[110]])).last_hidden_state
    model.save_embeddings(tmp_path, "long")
    model.set_active_embeddings("default")
    model.delete_embeddings("long")
    assert model.load_embeddings(tmp_path, "again") is None
    assert torch.equal(model(input_ids=torch.tensor([[110]])).last_hidden_state, expected)


def test_heads_by_object_by_file_and_averaged(tmp_path):
    model = tiny("bert")
    adapters.init(model)
    for name in "ab":
        model.add_prediction_head(adapters.TaggingHead(model, name, num_labels=3, id2label={0: "x", 1: "y", 2: "z"}))
    model.add_prediction_head_from_config("c", {"head_type": "tagging", "num_labels": 3, "layers": 1}, set_active=False)
    assert model.active_head == "b" and model.get_labels_dict() == {0: "x", 1: "y", 2: "z"}
    assert model.get_labels("c") is None
    model.average_head("d", ["a", "b"], set_active=True)
    model.save_all_heads(tmp_path)
    fresh = tiny("bert")
    adapters.init(fresh)
    assert fresh.load_head(tmp_path / "d", load_as="e", id2label={0: "p", 1: "q", 2: "r"}) == "e"
    assert fresh.get_labels("e") == ["p", "q", "r"]
    assert torch.equal(fresh(**BATCH, head="e").logits, model(**BATCH).logits)
    with pytest.raises(inarch.StateError, match="of one of the types .*; got `poetry`"):
        model.add_prediction_head_from_config("f", {"head_type": "poetry"})


def test_setups_and_all_that_is_saved(tmp_path):
    model = tiny("bert")
    adapters.init(model)
    for name in "ab":
        model.add_adapter(name, config="seq_bn[reduction_factor=4]")
        model.add_classification_head(name)
    model.add_adapter_fusion(["a", "b"], config="static")
    model.save_all_adapter_fusions(tmp_path / "fusions")
    model.save_all_adapters(tmp_path / "all", with_head=False)
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"a", "b"}
    assert [path.name for path in (tmp_path / "fusions").iterdir()] == ["a+b"]
    with pytest.raises(SetupError, match="with the adapters that they combine; got `mine`"):
        model.load_adapter_fusion(tmp_path / "fusions" / "a+b", load_as="mine", set_active=True)
    model.delete_adapter("mine")
    model.save_adapter_setup(tmp_path / "setup", ac.Parallel("a", "b"))
    fresh = tiny("bert")
    adapters.init(fresh)
    assert fresh.load_adapter_setup(tmp_path / "setup", set_active=True) == (ac.Parallel("a", "b"), ["a", "b"])
    assert fresh.has_parallel_adapters
    one = fresh.load_adapter(tmp_path / "setup" / "adapters" / "a", load_as="c", id2label={0: "no", 1: "yes"})
    assert fresh.get_labels(one) == ["no", "yes"]


def test_the_arguments_of_example_scripts(tmp_path):
    model = tiny("bert")
    adapters.init(model)
    assert adapters.setup_adapter_training(model, adapters.AdapterArguments(), "a") == (None, None)
    with pytest.raises(SetupError, match="one to load and `train_adapter=False`"):
        adapters.setup_adapter_training(model, adapters.AdapterArguments(load_adapter="x"), "a")
    (args,) = transformers.HfArgumentParser(adapters.AdapterArguments).parse_args_into_dataclasses(
        ["--train_adapter", "True", "--adapter_config", "lora[r=4]"]
    )
    assert adapters.setup_adapter_training(model, args, "a", {"alpha": 16}) == ("a", None)
    assert model.active_adapters == "a" and str(model.adapters_config.get("a")) == "lora[r=4,alpha=16]"
    model.save_adapter(tmp_path / "a", "a")
    args = adapters.AdapterArguments(train_adapter=True, load_lang_adapter=str(tmp_path / "a"))
    assert adapters.setup_adapter_training(model, args, "b") == ("b", "a")
    assert model.active_adapters == ac.Stack("a", "b")
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".b." in key for key in trained)


def test_a_trainer_of_sequences_generates(tmp_path):
    model = tiny("t5")
    adapters.init(model)
    model.add_adapter("a")
    model.add_seq2seq_lm_head("a")
    model.train_adapter("a")
    ids = tiny_inputs("t5", batch=4)["input_ids"]
    rows = [{"input_ids": row, "labels": row[:3]} for row in ids]
    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", predict_with_generate=True,
        generation_max_length=5,
    )  # fmt: skip
    said = []
    trainer = adapters.Seq2SeqAdapterTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows,
        compute_metrics=lambda found: {"rows": len(said.append(found.predictions) or found.predictions)},
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_rows"] == 4 and found["eval_loss"] > 0
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=5)
    assert said[0][:, :5].tolist() == expected.tolist() and not said[0][:, 5:].any()  # padded to the longest there is


def test_configurations_are_read_as_they_are_written_there():
    assert adapters.SeqBnConfig(inv_adapter="nice", inv_adapter_reduction_factor=2) == adapters.SeqBnInvConfig()
    assert str(adapters.VeraConfig(vera_d=0.2)) == "vera[r=8,d_initial=0.2]"
    assert adapters.AdapterConfig.load("pfeiffer", reduction_factor=4) == adapters.SeqBnConfig(reduction_factor=4)
    fields = {"architecture": "lora", "r": 4, "alpha": 8, "use_dora": False, "composition_mode": "add"}
    assert adapters.AdapterConfig.from_dict(fields) == adapters.LoRAConfig(r=4, alpha=8)
    scales = {"architecture": "lora", "composition_mode": "scale", "r": 1, "attn_matrices": ["k"]}
    assert adapters.AdapterConfig.load(scales) == adapters.IA3Config(attn_matrices=["k"])
    union = {"architecture": "union", "configs": [fields, {"architecture": None, "reduction_factor": 4}]}
    assert [part.r for part in adapters.AdapterConfig.load(union).parts[:1]] == [4]
    mam = adapters.MAMConfig(adapter=adapters.ParBnConfig(reduction_factor=4))
    assert mam.parts[0].bottleneck_size == 800 and mam.parts[1].reduction_factor == 4
    with pytest.raises(ConfigError, match="the architecture 'reft'"):
        adapters.AdapterConfig.load({"architecture": "reft", "orthogonality": False})
    assert isinstance(adapters.BertAdapterModel(tiny("bert").config), transformers.BertModel)
    with pytest.raises(SetupError, match="`RobertaAdapterModel` is a model of type `roberta`; got `bert`"):
        adapters.RobertaAdapterModel.from_config(tiny("bert").config)
    with pytest.raises(SetupError, match="adapter_names=.* What is trained is saved"):
        adapters.AdapterTrainer(model=None, adapter_names=[["a"]])


def test_labels_and_heads_are_those_of_what_was_loaded(tmp_path):
    """Not those of the head that happens to be active beside an adapter without one."""
    model = tiny("bert")
    adapters.init(model)
    model.add_adapter("plain")
    model.save_adapter(tmp_path / "plain", "plain")
    model.save_adapter_setup(tmp_path / "setup", "plain")
    model.add_classification_head("other", num_labels=2, id2label={0: "no", 1: "yes"})
    model.load_adapter(str(tmp_path / "plain"), id2label={0: "x", 1: "y"})
    assert model.get_labels("other") == ["no", "yes"]
    assert model.load_adapter_setup(tmp_path / "setup")[1] is None
    assert model.active_head == "other"


def test_labels_are_in_the_order_of_their_numbers_however_these_are_written(tmp_path):
    """As text, which is what JSON makes of numbers, 10 would stand before 2."""
    model = tiny("bert")
    adapters.init(model)
    names = [f"l{number}" for number in range(11)]
    texts = {str(number): name for number, name in enumerate(names)}
    model.add_classification_head("c", num_labels=11, id2label=texts)
    assert model.get_labels("c") == names
    model.save_head(tmp_path / "c", "c")
    model.load_head(tmp_path / "c", "d", id2label=texts)
    assert model.get_labels("d") == names
    with pytest.raises(ConfigError, match=r"`id2label` names the labels 0 to 1; got 1, 2. Count from 0"):
        model.add_classification_head("e", num_labels=2, id2label={1: "no", 2: "yes"})
    with pytest.raises(SetupError, match="The labels of one head are asked for; got 'zz'.*Known: `c`, `d`"):
        model.get_labels("zz")
    model.active_head = None
    with pytest.raises(SetupError, match="The labels of one head are asked for; got None"):
        model.get_labels()
