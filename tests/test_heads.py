"""Flexible heads: what transformers' own task classes compute with the same weights is what they compute."""

import copy
import inspect
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import inarch
from inarch.core.errors import ConfigError, SetupError
from inarch.heads import KINDS, read_head
from inarch.testing import PlainTransformer, perturb, tiny, tiny_inputs

TEXT = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
           "decoder_start_token_id": 2}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 2, 0, 0]])
LEFT = torch.tensor([[5, 6, 7, 8, 2], [0, 0, 9, 10, 2]])
MASK = (IDS != 0).long()
LEFT_MASK = (LEFT != 0).long()
TEXTS = {"input_ids": IDS, "attention_mask": MASK}
LEFT_TEXTS = {"input_ids": LEFT, "attention_mask": LEFT_MASK}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
SOUND = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
SOUNDS = {"input_values": torch.randn(2, 200, generator=torch.Generator().manual_seed(0)),
          "attention_mask": (torch.arange(200) < torch.tensor([[200], [90]])).long()}  # fmt: skip
ONE = {"out": "classifier"}


def whole(name, config, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
        perturb(model)
    return model


# The class of transformers, its settings; the kind of head and its settings; where its layers come from; a batch.
ORACLES = {
    "bert": (
        ("BertForSequenceClassification", "BertConfig", ENCODER | TEXT | {"num_labels": 3}),
        ("classification", {"num_labels": 3, "layers": 1, "pooling": "pooler"}), ONE,
        TEXTS | {"labels": torch.tensor([2, 0])},
    ),
    "roberta": (  # reads the first token, with a layer of its own
        ("RobertaForSequenceClassification", "RobertaConfig", ENCODER | TEXT | {"num_labels": 3}),
        ("classification", {"num_labels": 3}), {"dense.0": "classifier.dense", "out": "classifier.out_proj"},
        TEXTS | {"labels": torch.tensor([2, 0])},
    ),
    "regression": (
        ("BertForSequenceClassification", "BertConfig", ENCODER | TEXT | {"num_labels": 1}),
        ("classification", {"num_labels": 1, "layers": 1, "pooling": "pooler"}), ONE,
        TEXTS | {"labels": torch.tensor([0.5, -1.0])},
    ),
    "several-labels": (
        ("BertForSequenceClassification", "BertConfig",
         ENCODER | TEXT | {"num_labels": 3, "problem_type": "multi_label_classification"}),
        ("multilabel_classification", {"num_labels": 3, "layers": 1, "pooling": "pooler"}), ONE,
        TEXTS | {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 1]])},
    ),
    "tags": (
        ("BertForTokenClassification", "BertConfig", ENCODER | TEXT | {"num_labels": 4}),
        ("tagging", {"num_labels": 4}), ONE,
        TEXTS | {"labels": torch.tensor([[1, 2, -100, 3, 0], [0, 1, 3, -100, -100]])},
    ),
    "answers": (  # one of the answers lies outside
        ("BertForQuestionAnswering", "BertConfig", ENCODER | TEXT),
        ("question_answering", {}), {"out": "qa_outputs"},
        TEXTS | {"start_positions": torch.tensor([1, 7]), "end_positions": torch.tensor([2, 9])},
    ),
    "choices": (
        ("BertForMultipleChoice", "BertConfig", ENCODER | TEXT),
        ("multiple_choice", {"num_choices": 2, "layers": 1, "pooling": "pooler"}), ONE,
        {"input_ids": torch.stack([IDS, IDS.flip(0)], 1), "attention_mask": torch.stack([MASK, MASK.flip(0)], 1),
         "labels": torch.tensor([1, 0])},
    ),
    "masks": (
        ("BertForMaskedLM", "BertConfig", ENCODER | TEXT),
        ("masked_lm", {}),
        {"dense.0": "cls.predictions.transform.dense", "norms.0": "cls.predictions.transform.LayerNorm",
         "bias": "cls.predictions.bias"},
        TEXTS | {"labels": torch.tensor([[-100, 6, -100, -100, -100], [-100, -100, 2, -100, -100]])},
    ),
    "gpt2-left": (
        ("GPT2ForSequenceClassification", "GPT2Config", GPT2 | TEXT | {"num_labels": 3}),
        ("classification", {"num_labels": 3, "layers": 1, "bias": False}), {"out": "score"},
        LEFT_TEXTS | {"labels": torch.tensor([2, 0])},
    ),
    "gpt2": (
        ("GPT2LMHeadModel", "GPT2Config", GPT2 | TEXT),
        ("causal_lm", {"layers": 1, "bias": False}), {}, TEXTS | {"labels": IDS.masked_fill(IDS == 0, -100)},
    ),
    "llama-untied": (
        ("LlamaForCausalLM", "LlamaConfig", ENCODER | TEXT | {"num_key_value_heads": 2}),
        ("causal_lm", {"layers": 1, "bias": False}), {"embeddings": "lm_head.weight"},
        TEXTS | {"labels": IDS.masked_fill(IDS == 0, -100)},
    ),
    "llama-left": (
        ("LlamaForSequenceClassification", "LlamaConfig", ENCODER | TEXT | {"num_key_value_heads": 2, "num_labels": 3}),
        ("classification", {"num_labels": 3, "layers": 1, "bias": False}), {"out": "score"},
        LEFT_TEXTS | {"labels": torch.tensor([2, 0])},
    ),
    "bart": (
        ("BartForSequenceClassification", "BartConfig", SEQ2SEQ | TEXT | {"num_labels": 3}),
        ("classification", {"num_labels": 3}),
        {"dense.0": "classification_head.dense", "out": "classification_head.out_proj"},
        TEXTS | {"labels": torch.tensor([2, 0])},
    ),
    "bart-answers": (
        ("BartForQuestionAnswering", "BartConfig", SEQ2SEQ | TEXT),
        ("question_answering", {}), {"out": "qa_outputs"},
        TEXTS | {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 1])},
    ),
    "bart-says": (
        ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ | TEXT),
        ("seq2seq_lm", {}), {}, TEXTS | {"labels": torch.tensor([[4, 5, 2], [6, 2, -100]])},
    ),
    "mbart-says": (  # a decoder's first token is the last of its labels, the language
        ("MBartForConditionalGeneration", "MBartConfig", SEQ2SEQ | TEXT | {"decoder_start_token_id": None}),
        ("seq2seq_lm", {}), {}, TEXTS | {"labels": torch.tensor([[4, 5, 2, 9], [6, 2, 9, -100]])},
    ),
    "t5-says": (
        ("T5ForConditionalGeneration", "T5Config", T5 | TEXT),
        ("seq2seq_lm", {}), {}, TEXTS | {"labels": torch.tensor([[4, 5, 2], [6, 2, -100]])},
    ),
    "vit": (
        ("ViTForImageClassification", "ViTConfig", ENCODER | {"image_size": 32, "patch_size": 8, "num_labels": 3}),
        ("image_classification", {"num_labels": 3}), ONE, IMAGES | {"labels": torch.tensor([2, 0])},
    ),
    "sound": (  # the mean of the frames that are there, behind a projection
        ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config",
         ENCODER | SOUND | {"num_labels": 3, "classifier_proj_size": 32}),
        ("classification", {"num_labels": 3, "activation_function": None}),
        {"dense.0": "projector", "out": "classifier"}, SOUNDS | {"labels": torch.tensor([2, 0])},
    ),
    "swin": (
        ("SwinForImageClassification", "SwinConfig",
         {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "image_size": 32, "patch_size": 4,
          "num_labels": 3}),
        ("image_classification", {"num_labels": 3}), ONE, IMAGES | {"labels": torch.tensor([2, 0])},
    ),
    "beit": (
        ("BeitForImageClassification", "BeitConfig",
         ENCODER | {"image_size": 32, "patch_size": 8, "num_labels": 3}),
        ("image_classification", {"num_labels": 3}), ONE, IMAGES | {"labels": torch.tensor([2, 0])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ORACLES)
def test_a_head_computes_what_the_task_class_of_transformers_does(case):
    made, (kind, settings), places, batch = ORACLES[case]
    theirs = whole(*made[:2], **made[2])
    base = theirs.base_model if theirs.base_model is not theirs else _t5_base(theirs)
    ours = copy.deepcopy(base)
    adapters = inarch.attach(ours)
    adapters.add_head("task", kind, **settings)
    for place, source in places.items():
        _copy(ours.inarch.heads["task"], place, theirs, source)
    expected = theirs(**batch)
    found = ours(**batch)
    scores = [key for key in expected if key in ("logits", "start_logits", "end_logits")]
    for key in scores:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert type(found).__module__ == "transformers.modeling_outputs"
    assert "loss" not in ours(
        **{key: value for key, value in batch.items() if key not in ("labels", "start_positions")}
    )


def _t5_base(model):
    base = transformers.T5Model(model.config).eval()
    base.load_state_dict({key: value for key, value in model.state_dict().items() if "lm_head" not in key})
    return base


def _copy(head, place, model, source):
    target = dict([*head.named_modules(), *head.named_parameters()])[place]
    found = dict([*model.named_modules(), *model.named_parameters(remove_duplicate=False)])[source]
    with torch.no_grad():
        if isinstance(found, nn.Module):
            target.load_state_dict(found.state_dict())
        else:
            target.copy_(found)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart"])
def test_padding_on_the_left_changes_no_scores(name):
    model = tiny(name)
    inarch.attach(model).add_head("task", "classification", num_labels=3)
    alone = torch.tensor([[9, 10, 2]])
    row = torch.tensor([[0, 0, 9, 10, 2]])
    positions = {"position_ids": torch.tensor([[0, 0, 0, 1, 2]])} if name != "bart" else {}
    padded = {"input_ids": row, "attention_mask": (row != 0).long(), **positions}
    if name == "bart":  # it has no positions to give: what is compared is the vector that is read
        states = model(**padded, head=()).last_hidden_state
        expected = model.inarch.heads["task"].read(states[:, -1])
    else:
        expected = model(input_ids=alone).logits
    torch.testing.assert_close(model(**padded).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_biaffine_head_is_its_formula():
    model = tiny("bert")
    adapters = inarch.attach(model)
    adapters.add_head("parse", "dependency_parsing", num_labels=2)
    head = model.inarch.heads["parse"]
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        parameter.data.normal_(generator=generator)
    ids = tiny_inputs("bert")["input_ids"]
    starts = torch.tensor([[1, 3, 4, -1], [1, 2, 4, 6]])  # two words and three
    arcs, rels = torch.tensor([[0, 1, -1, -1], [2, 0, 1, -1]]), torch.tensor([[1, 0, -1, -1], [0, 1, 1, -1]])
    found = model(input_ids=ids, word_starts=starts, labels_arcs=arcs, labels_rels=rels)
    adapters.active_head = None
    states = model(input_ids=ids).last_hidden_state
    arc_losses, rel_losses = [], []
    for row, places in enumerate([[(1, 3), (3, 4)], [(1, 2), (2, 4), (4, 6)]]):
        words = [states[row, a:b].mean(0) for a, b in places]
        for number, word in enumerate(words):
            own = torch.cat([word, torch.ones(1)])
            heads = [states[row, 0], *words, *[torch.zeros(32)] * (4 - len(words))]
            scores = torch.stack([own @ head.arcs[0] @ other for other in heads])
            torch.testing.assert_close(found.arc_preds[row, number], scores, rtol=1e-4, atol=1e-3)
            arc = arcs[row, number]
            arc_losses.append(-scores.log_softmax(0)[arc])
            theirs = torch.cat([heads[arc], torch.ones(1)])
            rel = torch.stack([own @ matrix @ theirs for matrix in head.rels])
            rel_losses.append(-rel.log_softmax(0)[rels[row, number]])
    expected = torch.stack(arc_losses).mean() + torch.stack(rel_losses).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-3)
    adapters.active_head = "parse"
    with pytest.raises(SetupError, match="takes `word_starts`; got none"):
        model(input_ids=ids)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "t5"])
def test_a_base_model_generates_with_a_head_as_its_own_class_does(name):
    own = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bart": "BartForConditionalGeneration",
           "t5": "T5ForConditionalGeneration"}[name]  # fmt: skip
    model = tiny(name)
    theirs = getattr(transformers, own)(copy.deepcopy(model.config)).eval()
    theirs.load_state_dict(
        {key: value for key, value in _named_for(theirs, model).items() if key in theirs.state_dict()}, strict=False
    )
    theirs.tie_weights()
    adapters = inarch.attach(model)
    kind = "seq2seq_lm" if model.config.is_encoder_decoder else "causal_lm"
    adapters.add_head("lm", kind, layers=1, bias=False, tied=True)
    if hasattr(theirs, "lm_head"):
        theirs.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "attention_mask": MASK}
    expected = theirs.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, **options), expected)
    assert torch.equal(model.generate(IDS, use_cache=False, **options), expected)
    beams = theirs.generate(IDS, num_beams=3, **options)
    assert torch.equal(model.generate(IDS, num_beams=3, **options), beams)
    adapters.active_head = None
    with pytest.raises(SetupError, match="What generates is a language-modelling head; got none active"):
        model.generate(IDS)
    adapters.detach()
    assert "generate" not in model.__dict__ and "forward" not in model.__dict__


def _named_for(whole_model, base):
    prefix = f"{whole_model.base_model_prefix}." if whole_model.base_model is not whole_model else ""
    return {f"{prefix}{key}": value for key, value in base.state_dict().items()}


def sst(name="bert"):
    model = tiny(name)
    adapters = inarch.attach(model)
    for task, labels in (("a", 3), ("b", 2)):
        adapters.add(task, "seq_bn")
        for parameter in adapters[task].values():
            parameter.data.add_(0.1)
        adapters.add_head(task, "classification", num_labels=labels)
    return model, adapters


def test_heads_share_a_batch_as_their_adapters_do():
    model, adapters = sst()
    adapters.add("c", "lora")
    ids = tiny_inputs("bert", batch=4)["input_ids"]
    labels = torch.tensor([0, 1, 1, 0])
    alone = {}
    for task in "ab":
        adapters.activate(task)
        alone[task] = model(input_ids=ids, labels=labels)
    adapters.activate(inarch.Parallel("a", "b"))
    assert adapters.active_head == ("a", "b")
    both = model(input_ids=ids, labels=labels)
    for number, task in enumerate("ab"):
        torch.testing.assert_close(both[number].logits, alone[task].logits)
    torch.testing.assert_close(both.loss, alone["a"].loss + alone["b"].loss)
    assert [score.shape for score in both.logits] == [(4, 3), (4, 2)]

    adapters.activate(inarch.Stack("c", inarch.BatchSplit("a", "b", batch_sizes=[1, 3])))
    split = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(split[0].logits, alone["a"].logits[:1])
    torch.testing.assert_close(split[1].logits, alone["b"].logits[1:])
    expected = nn.functional.cross_entropy(alone["b"].logits[1:], labels[1:])
    torch.testing.assert_close(split[1].loss, expected)

    adapters.activate(inarch.MultiTask("a", "b"))
    tasks = model(input_ids=ids, labels=labels, task_ids=torch.tensor([1, 0, 1, 0]))
    torch.testing.assert_close(tasks[0].logits, alone["a"].logits[[1, 3]])
    torch.testing.assert_close(tasks[1].logits, alone["b"].logits[[0, 2]])


def test_heads_of_one_width_give_one_tensor_in_the_order_of_the_rows():
    model, adapters = sst()
    adapters.add_head("a", "classification", num_labels=2, overwrite=True)
    adapters.activate(inarch.MultiTask("a", "b"))
    ids = tiny_inputs("bert", batch=3)["input_ids"]
    found = model(input_ids=ids, task_ids=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(found.logits[[1]], found[0].logits)
    torch.testing.assert_close(found.logits[[0, 2]], found[1].logits)


def test_several_heads_without_a_cut_see_all_rows():
    model, adapters = sst()
    adapters.active_head = ["a", "b"]
    ids = tiny_inputs("bert")["input_ids"]
    found = model(input_ids=ids)
    assert [one.logits.shape for one in found.head_outputs] == [(2, 3), (2, 2)]
    torch.testing.assert_close(model(input_ids=ids, head="b").logits, found[1].logits)


def test_what_several_heads_return_is_lost_by_no_copy_in_silence():
    """accelerate makes a new mapping of the values where it changes their precision."""
    model, adapters = sst()
    adapters.active_head = ["a", "b"]
    with torch.no_grad():
        found = model(input_ids=tiny_inputs("bert")["input_ids"])
    for kept in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert len(kept) == 2 and torch.equal(kept[1].logits, found[1].logits)
    made = type(found)(found.items())
    assert torch.equal(made.logits[1], found[1].logits)
    with pytest.raises(SetupError, match="got a copy of its logits. Read these"):
        list(made)


def test_parts_of_clip_take_heads_and_the_whole_says_so():
    model = tiny("clip")
    inarch.attach(model).add_head("a", "image_classification")
    with pytest.raises(SetupError, match="got CLIPOutput without any from CLIPModel. Give the head to the part of it"):
        model(**tiny_inputs("clip"))
    vision = tiny("clip-vision")
    adapters = inarch.attach(vision)
    adapters.add_head("a", "image_classification", num_labels=3)
    states = vision(**tiny_inputs("clip-vision"), head=()).last_hidden_state
    expected = vision.inarch.heads["a"].out(states[:, 0])
    torch.testing.assert_close(vision(**tiny_inputs("clip-vision")).logits, expected)


def test_a_sound_is_classified_by_its_encoder():
    """Whisper's decoder has no tokens of a sound to be read."""
    settings = SEQ2SEQ | TEXT | {"max_source_positions": 10, "num_mel_bins": 8, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**settings, suppress_tokens=None, begin_suppress_tokens=None)
    model = transformers.WhisperModel(config).eval()
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    inarch.attach(model).add_head("a", "classification")
    with pytest.raises(SetupError, match="got no `decoder_input_ids`, nor `input_ids` .* for WhisperModel"):
        model(input_features=sound)
    encoder = transformers.WhisperModel(config).eval().encoder
    inarch.attach(encoder, example_inputs={"input_features": sound}).add_head("a", "classification", layers=1)
    states = encoder(input_features=sound, head=()).last_hidden_state
    expected = encoder.inarch.heads["a"].out(states.mean(dim=1))
    torch.testing.assert_close(encoder(input_features=sound).logits, expected)


def test_the_trainer_knows_the_targets_of_the_heads(tmp_path):
    model = tiny("bert")
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.add_head("a", "question_answering")
    adapters.train("a")
    ids = tiny_inputs("bert", batch=4)["input_ids"]
    rows = [{"input_ids": row, "start_positions": 1, "end_positions": 2} for row in ids]
    made = {"report_to": [], "use_cpu": True, "save_strategy": "no", "max_steps": 1}
    trainer = inarch.AdapterTrainer(model, transformers.TrainingArguments(str(tmp_path), **made), eval_dataset=rows)
    assert trainer.label_names == ["start_positions", "end_positions"]
    found = trainer.predict(rows)
    assert found.metrics["test_loss"] > 0
    assert [part.shape for part in found.label_ids] == [(4,), (4,)]
    args = transformers.TrainingArguments(str(tmp_path), label_names=["start_positions"], **made)
    assert inarch.AdapterTrainer(model, args).label_names == ["start_positions"]


def test_an_adapter_without_a_head_leaves_the_active_one(caplog):
    model, adapters = sst()
    adapters.add("language", "lora")
    adapters.activate("a")
    adapters.activate("language")
    assert adapters.active_head == "a"
    adapters.activate(inarch.Parallel("b", "language"))
    assert adapters.active_head == "a"
    assert "`language` has no head" in caplog.text
    adapters.deactivate()
    assert adapters.active_head is None
    assert "logits" not in model(**tiny_inputs("bert"))


def test_training_trains_the_head_of_the_adapter_and_no_other(tmp_path):
    model, adapters = sst()
    adapters.train("b")
    assert adapters.active_head == "b"
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key in trained if ".heads." in key} == {
        f"inarch.heads.b.{key}" for key in ("dense.0.weight", "dense.0.bias", "out.weight", "out.bias")
    }
    model(**tiny_inputs("bert"), labels=torch.tensor([1, 0])).loss.backward()
    assert all(parameter.grad is not None for parameter in adapters.head("b").values())
    assert "(head)" in adapters.summary()


def test_a_head_is_saved_and_loaded_with_its_adapter(tmp_path):
    model, adapters = sst()
    adapters.train("a")
    expected = model(**tiny_inputs("bert")).logits
    adapters.save("a", tmp_path / "a")
    fresh = tiny("bert")
    other = inarch.attach(fresh)
    assert other.load(tmp_path / "a", name="again") == "again"
    assert other.active_head is None and set(other.flexible_heads) == {"again"}
    other.activate("again")
    assert torch.equal(fresh(**tiny_inputs("bert")).logits, expected)
    other.add_head("a", "tagging")
    with pytest.raises(SetupError, match="The heads of a model have different names; got `a` again"):
        other.load(tmp_path / "a")
    other.remove_head("a")
    assert other.load(tmp_path / "a", head=False) == "a"
    assert set(other.flexible_heads) == {"again"}
    assert inarch.check(tiny("bert"), str(tmp_path / "a"), measure=False).sound


def test_what_saves_the_base_saves_no_head_in_it(tmp_path):
    model, adapters = sst()
    adapters.train("a")
    model.save_pretrained(tmp_path)
    fresh, report = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert (tmp_path / "adapters" / "a").is_dir()
    other = inarch.attach(fresh.eval())
    other.load(tmp_path / "adapters" / "a")
    other.activate("a")
    assert torch.equal(fresh(**tiny_inputs("bert")).logits, model(**tiny_inputs("bert")).logits)


def test_a_head_without_an_adapter_is_saved_beside_the_base(tmp_path):
    model, adapters = sst()
    adapters.add_head("probe", "tagging", num_labels=3)
    assert adapters.lone_heads == ("probe",)
    expected = model(**tiny_inputs("bert")).logits
    model.save_pretrained(tmp_path)
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {"a", "b"}
    fresh = transformers.BertModel.from_pretrained(tmp_path).eval()
    other = inarch.attach(fresh)
    other.active_head = other.load_head(tmp_path / "heads" / "probe")
    assert torch.equal(fresh(**tiny_inputs("bert")).logits, expected)
    with pytest.raises(SetupError, match="is published in two parts"):
        fresh.push_to_hub("a/b")


def test_outputs_have_no_other_fields_than_theirs():
    model, adapters = sst()
    adapters.activate(inarch.Parallel("a", "b"))
    found = model(**tiny_inputs("bert"))
    assert found.loss is None and found.hidden_states is None
    with pytest.raises(AttributeError, match="An output of heads has logits; got `logit`"):
        _ = found.logit


def test_one_head_reads_all_copies_of_a_batch():
    """Its loss is the mean over the adapters."""
    model, adapters = sst()
    for name in "ab":
        adapters.remove_head(name)
    adapters.add_head("one", "classification", num_labels=3)
    batch = {**tiny_inputs("bert", batch=4), "labels": torch.tensor([0, 1, 2, 0])}
    alone = []
    for name in "ab":
        adapters.activate(name)
        alone.append(model(**batch))
    adapters.activate(inarch.Parallel("a", "b"))
    both = model(**batch)
    torch.testing.assert_close(both.logits, torch.cat([one.logits for one in alone]))
    torch.testing.assert_close(both.loss, (alone[0].loss + alone[1].loss) / 2)


def test_copies_have_heads_of_their_own():
    model, adapters = sst()
    adapters.activate("a")
    expected = model(**tiny_inputs("bert")).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(**tiny_inputs("bert")).logits, expected)
        inarch.attach(again).head("a")
        again.inarch.heads["a"].out.weight.data.zero_()
    assert torch.equal(model(**tiny_inputs("bert")).logits, expected)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**tiny_inputs("bert")).logits, expected)


def test_detaching_gives_the_model_back():
    model = tiny("bert")
    expected, own = model(**tiny_inputs("bert")).last_hidden_state, inspect.signature(model.forward)
    adapters = inarch.attach(model)
    adapters.add_head("a", "tagging")
    assert "labels" in inspect.signature(model.forward).parameters
    adapters.detach()
    assert torch.equal(model(**tiny_inputs("bert")).last_hidden_state, expected)
    assert inspect.signature(model.forward) == own
    assert not [key for key, _ in model.named_modules() if "inarch" in key]


def test_a_model_with_a_head_of_its_own_runs_a_flexible_one_on_its_base():
    model = tiny("bert-classifier")
    adapters = inarch.attach(model)
    own = model(**tiny_inputs("bert")).logits
    adapters.add_head("tags", "tagging", num_labels=5)
    assert model(**tiny_inputs("bert")).logits.shape == (2, 7, 5)
    adapters.active_head = None
    assert torch.equal(model(**tiny_inputs("bert")).logits, own)


def test_the_head_of_a_model_changes_with_its_adapter():
    model = tiny("bert-classifier")
    adapters = inarch.attach(model)
    outputs = {}
    for task in "ab":
        adapters.add(task, "lora")
        adapters.train(task)
        model.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(ord(task)))
        outputs[task] = model(**tiny_inputs("bert")).logits
    for task in "abab":
        adapters.activate(task)
        assert torch.equal(model(**tiny_inputs("bert")).logits, outputs[task])


def test_a_model_of_no_library_takes_heads():
    model = PlainTransformer()
    model.head = nn.Identity()
    adapters = inarch.attach(model, example_inputs=torch.randn(2, 5, 32))
    adapters.add_head("a", "classification", num_labels=3)
    x = torch.randn(2, 5, 32)
    found = model(x, labels=torch.tensor([0, 1]))
    assert found.logits.shape == (2, 3) and found["loss"] is found.loss and found[1] is found.logits


def test_targets_are_columns_for_a_trainer(tmp_path):
    model, adapters = sst()
    adapters.train("b")
    rows = [
        {"input_ids": row, "label": number % 2} for number, row in enumerate(tiny_inputs("bert", batch=4)["input_ids"])
    ]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, label_names=["labels"], save_strategy="no"
    )
    trainer = transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    before = adapters.head("b")["head.inarch.heads.b.out.weight"].detach().clone()
    trainer.train()
    assert not torch.equal(adapters.head("b")["head.inarch.heads.b.out.weight"], before)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_each_of_several_heads_of_tokens_undoes_its_own_invertible_map(name):
    model = tiny(name)
    adapters = inarch.attach(model)
    generator = torch.Generator().manual_seed(0)
    for task in "ab":
        adapters.add(task, "seq_bn_inv")
        adapters.add_head(task, "masked_lm" if name == "bert" else "seq2seq_lm")
        for parameter in (*adapters[task].values(), *model.inarch.heads[task].parameters()):
            parameter.data.normal_(std=0.3, generator=generator)
    batch = tiny_inputs(name, batch=4)
    labels = batch["input_ids"] if name == "bert" else batch["decoder_input_ids"]
    alone = {}
    for task in "ab":
        adapters.activate(task)
        alone[task] = model(**batch, labels=labels)
    adapters.activate(inarch.Parallel("a", "b"))
    both = model(**batch, labels=labels)
    adapters.activate(inarch.BatchSplit("a", "b", batch_sizes=[1, 3]))
    split = model(**batch, labels=labels)
    adapters.activate(inarch.MultiTask("a", "b"))
    tasks = model(**batch, task_ids=torch.tensor([1, 0, 1, 0]))
    assert not torch.allclose(alone["a"].logits, alone["b"].logits, atol=0.1)
    for number, task in enumerate("ab"):
        torch.testing.assert_close(both[number].logits, alone[task].logits)
        torch.testing.assert_close(both[number].loss, alone[task].loss)
        torch.testing.assert_close(split[number].logits, alone[task].logits[[slice(0, 1), slice(1, 4)][number]])
        torch.testing.assert_close(tasks[number].logits, alone[task].logits[[[1, 3], [0, 2]][number]])


def test_an_invertible_adapter_is_undone_before_the_embeddings_of_a_head():
    own = whole("BertForMaskedLM", "BertConfig", **ENCODER, **TEXT)
    base = copy.deepcopy(own.base_model)
    outputs = []
    for model in (own, base):
        adapters = inarch.attach(model)
        adapters.add("language", "seq_bn_inv")
        for number, parameter in enumerate(adapters["language"].values()):
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
        adapters.activate("language")
        if model is base:
            adapters.add_head("language", "masked_lm")
            for place, source in ORACLES["masks"][2].items():
                _copy(model.inarch.heads["language"], place, own, source)
        outputs.append(model(**TEXTS).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


HUB = Path(__file__).parent / "fixtures" / "adapterhub_heads"
"""What the library `adapters` computes; made by `scripts/make_adapterhub_head_fixtures.py`."""


def hub_base(name="bert"):
    shared, own = HUB.parent / "adapterhub" / name / "base", HUB / "bases" / name
    return transformers.AutoModel.from_pretrained(shared if shared.is_dir() else own).eval()


def hub_tensors(file, name):
    """The tensors of one head in a file of the fixtures."""
    return {key.partition(".")[2]: value for key, value in load_file(HUB / file).items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize(
    ("base", "names"),
    [
        ("bert", ["sentiment", "pooler", "topics", "tags", "answers", "choices", "parse", "masks", "grade"]),
        ("vit", ["pictures", "objects"]),
        ("gpt2", ["next", "mood"]),
        ("bart", ["says", "kind"]),
    ],
)
def test_heads_of_adapterhub_compute_what_they_did(base, names):
    """Scores and losses of all kinds."""
    model = hub_base(base)
    adapters = inarch.attach(model)
    for name in names:
        assert adapters.load(HUB / name) == name
        adapters.activate(name)
        inputs, targets = IMAGES if base == "vit" else TEXTS, hub_tensors("targets.safetensors", name)
        if name == "parse":
            inputs = inputs | {"word_starts": torch.tensor([[1, 3, 4, -1, -1], [1, 2, -1, -1, -1]])}
            padding = targets["labels_arcs"] == 0  # as it is there
            targets = {key: value.masked_fill(padding, -1) for key, value in targets.items()}
        found = model(**inputs, **targets)
        expected = hub_tensors("outputs.safetensors", name)
        assert "loss" in expected and len(expected) > 1
        for key, wanted in expected.items():
            near = 1e-5 * max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(found[key], wanted, rtol=0, atol=near)
    if base == "bert":
        assert adapters.flexible_heads["sentiment"].labels == ("bad", "so", "good")
        assert "head.inarch.heads.masks.embeddings" not in adapters.head("masks")  # they are the model's


def test_a_head_of_adapterhub_takes_the_name_that_is_asked_for():
    adapters = inarch.attach(hub_base())
    assert adapters.load(HUB / "sentiment", name="mine") == "mine"
    assert set(adapters.flexible_heads) == {"mine"}
    assert adapters.load(HUB / "tags", head=False) == "tags"
    assert set(adapters.flexible_heads) == {"mine"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_type": "poetry"}, "of one of the types .*; got `tags` of type `poetry`"),
        ({"mood": 3}, "Every setting of a prediction head has a meaning; got `mood=3` for `tagging`"),
    ],
)
def test_a_head_that_is_none_of_ours_is_told(tmp_path, caplog, change, words):
    folder = shutil.copytree(HUB / "tags", tmp_path / "tags")
    record = json.loads((folder / "head_config.json").read_text())
    record["config"] |= change
    (folder / "head_config.json").write_text(json.dumps(record))
    adapters = inarch.attach(hub_base())
    assert adapters.load(folder) == "tags"
    assert not adapters.flexible_heads
    assert re.search(words, caplog.text)


def test_the_head_of_a_task_class_is_read_into_that_class(tmp_path):
    folder = shutil.copytree(HUB / "tags", tmp_path / "tags")
    record = json.loads((folder / "head_config.json").read_text())
    del record["config"]
    (folder / "head_config.json").write_text(json.dumps(record | {"model_class": "BertForTokenClassification"}))
    own = {"classifier.weight": torch.randn(4, 16), "classifier.bias": torch.randn(4)}
    save_file(own, folder / "model_head.safetensors")
    base = HUB.parent / "adapterhub" / "bert" / "base"
    model = transformers.BertForTokenClassification.from_pretrained(base, num_labels=4)
    inarch.attach(model).load(folder)
    assert torch.equal(model.classifier.weight, own["classifier.weight"])


def test_heads_are_refused_by_name():
    model = tiny("vit")
    adapters = inarch.attach(model)
    with pytest.raises(ConfigError, match="A head is known by its kind; got `clasification`. Did you mean"):
        adapters.add_head("a", "clasification")
    with pytest.raises(ConfigError, match="a model with embeddings of tokens; got ViTModel without any"):
        adapters.add_head("a", "masked_lm")
    with pytest.raises(ConfigError, match="names each label once; got 2 names for 3 labels"):
        adapters.add_head("a", "image_classification", num_labels=3, labels=["x", "y"])
    with pytest.raises(SetupError, match="A head must be added before it is used; got 'a'"):
        adapters.active_head = "a"
    adapters.add_head("a", "image_classification[num_labels=3]")
    with pytest.raises(SetupError, match="The heads of a model have different names; got `a` again"):
        adapters.add_head("a", "image_classification")


def test_every_kind_comes_back_from_its_data():
    for kind in KINDS:
        config = read_head(kind)
        assert read_head({"kind": kind, **config.to_dict()}) == config
