"""The names of the library `adapters` over inarch, and three of its published usage patterns."""

import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
import transformers

import inarch
import inarch.compat as adapters
import inarch.compat.composition as ac
from inarch.core.errors import ConfigError, SetupError
from inarch.testing import tiny, tiny_inputs

ROOT = Path(__file__).parent.parent
BATCH = tiny_inputs("bert", batch=8)
LABELS = torch.arange(8) % 2


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
    model.save_adapter_fusion(tmp_path / "fusion", setup)
    model.save_all_adapters(tmp_path / "all")
    model.eval()
    fresh = tiny("bert")
    adapters.init(fresh)
    for task in tasks:
        fresh.load_adapter(tmp_path / "all" / task)
    fresh.load_adapter_fusion(tmp_path / "fusion")
    fresh.set_active_adapters(setup)
    assert torch.equal(fresh(**BATCH).logits, model(**BATCH).logits)


def test_a_language_is_changed_below_a_task(tmp_path):
    """MAD-X: a task is trained on an English language adapter and tested on a Chinese one."""
    for name, seed in (("en", 1), ("zh", 2)):
        model = tiny("bert")
        adapters.init(model)
        torch.manual_seed(seed)
        model.add_adapter(name, config=adapters.SeqBnInvConfig(reduction_factor=2))
        for parameter in model.get_adapter(name).values():
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
    assert not any(parameter.requires_grad for parameter in model.get_adapter("en").values())
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
    assert len(model(**BATCH).head_outputs) == 2
    model.set_active_adapters(None)
    assert model.active_adapters == None and model.active_head is None  # noqa: E711  it is no None, and equals it
    assert "logits" not in model(**BATCH)
    assert pickle.loads(pickle.dumps(model)).adapter_summary() == model.adapter_summary()


def test_averages_merging_and_removal():
    model = tiny("gpt2-lm")
    adapters.init(model)
    for name in "ab":
        model.add_adapter(name, config=adapters.LoRAConfig(r=4, alpha=8))
        for parameter in model.get_adapter(name).values():
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
