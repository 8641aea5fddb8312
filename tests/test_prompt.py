"""Prompt tuning against forwards on embeddings that were put together by hand, and without a cache."""

import json

import pytest
import torch
import transformers
from little_adapters import prompted
from safetensors.torch import save_file
from torch import nn

import inarch
from inarch import Average, BatchSplit, MultiTask, Parallel, Stack
from inarch.methods import read_config
from inarch.testing import tiny, tiny_inputs

COUNT = 3
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def vectors(adapters, name="a"):
    (found,) = adapters[name].values()
    return found.detach()


def in_front(values, front):
    """(B, L, ...) -> (B, P + L, ...)."""
    return torch.cat((front.to(values.dtype).expand(len(values), *front.shape[-values.dim() + 1 :]), values), dim=1)


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-lm", "qwen2-lm"])
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["whole", "left", "right"])
def test_a_decoder_sees_vectors_among_its_words(name, mask):
    model = tiny(name)
    adapters = prompted(model, f"prompt_tuning[prompt_length={COUNT}]")
    ids = tiny_inputs(name)["input_ids"]
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    found = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    adapters.deactivate()
    embedded = in_front(model.get_input_embeddings()(ids), vectors(adapters))
    longer = None if mask is None else in_front(mask, torch.ones(COUNT))
    expected = model(
        inputs_embeds=embedded,
        attention_mask=longer,
        labels=in_front(labels, torch.full((COUNT,), -100)),
        output_hidden_states=True,
    )
    assert torch.allclose(found.logits, expected.logits[:, COUNT:], atol=1e-5)
    pairs = zip(found.hidden_states, expected.hidden_states, strict=True)
    assert all(torch.allclose(one, other[:, COUNT:], atol=1e-5) for one, other in pairs)
    # The loss is that of the user's tokens: the last vector does not have to tell the first of them.
    shifted = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(found.loss, shifted, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-lm", "t5-lm", "bart-lm"])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "left"])
def test_generation_with_a_cache_is_generation_without(name, mask):
    model = tiny(name)
    adapters = prompted(model, f"prompt_tuning[prompt_length={COUNT}]")
    ids = tiny_inputs(name)["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"eos_token_id": None} if "t5" not in name and "bart" not in name else {"min_new_tokens": 5}

    def run(**changes):
        given = {"attention_mask": mask} if mask is not None else {}
        return model.generate(input_ids=ids, **given, **settings, **changes)

    cached, plain = run(use_cache=True), run(use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(cached.logits, plain.logits, strict=True))
    beams = [run(num_beams=2, use_cache=cache).sequences for cache in (True, False)]
    assert torch.equal(*beams)
    adapters.deactivate()
    base = run()
    assert not torch.allclose(base.logits[0], cached.logits[0], atol=1e-2)


def test_padding_on_the_left_changes_nothing():
    """Where positions are counted by the mask, as `generate` does it."""
    model = tiny("gpt2-lm")
    prompted(model, f"prompt_tuning[prompt_length={COUNT}]")
    ids = tiny_inputs("gpt2-lm")["input_ids"][:1]
    padded = torch.cat((torch.full((1, 2), 5), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 2), torch.ones(1, 7)), dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(found[:, 2:], model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["t5-lm", "bart-lm"])
def test_an_encoder_sees_the_vectors_and_so_does_the_decoder(name):
    model = tiny(name)
    adapters = prompted(model, f"prompt_tuning[prompt_length={COUNT}]")
    inputs = tiny_inputs(name)
    found = model(**inputs, attention_mask=RIGHT)
    adapters.deactivate()
    embedded = in_front(model.get_encoder().embed_tokens(inputs["input_ids"]), vectors(adapters))
    mask = in_front(RIGHT, torch.ones(COUNT))
    expected = model(inputs_embeds=embedded, attention_mask=mask, decoder_input_ids=inputs["decoder_input_ids"])
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert found.encoder_last_hidden_state.shape[1] == 7 + COUNT


def test_padding_on_the_left_of_an_encoder_changes_nothing():
    """T5 counts distances between places: the vectors stand behind the padding."""
    model = tiny("t5-lm")
    prompted(model, f"prompt_tuning[prompt_length={COUNT}]")
    inputs = tiny_inputs("t5-lm")
    mask = torch.ones(2, 7, dtype=torch.long)
    padded = {"input_ids": torch.cat((torch.full((2, 2), 5), inputs["input_ids"]), dim=1)}
    padded |= {"attention_mask": torch.cat((torch.zeros(2, 2), mask), dim=1).long()}
    found = model(**inputs | padded).logits
    assert torch.allclose(found, model(**inputs, attention_mask=mask).logits, atol=1e-5)


@pytest.mark.parametrize("mask", [None, RIGHT], ids=["whole", "right"])
@pytest.mark.parametrize("insert", ["auto", "words"])
def test_a_classifier_pools_the_users_first_token(insert, mask):
    """`auto` leaves tokens at their positions; `words` moves them."""
    model = tiny("bert-classifier")
    adapters = prompted(model, f"prompt_tuning[prompt_length={COUNT},insert={insert}]")
    ids = tiny_inputs("bert")["input_ids"]
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    found = model(input_ids=ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
    adapters.deactivate()
    bert, front = model.bert, vectors(adapters)
    if insert == "auto":
        embedded = in_front(bert.embeddings(input_ids=ids, token_type_ids=types), front)
    else:
        words = in_front(bert.embeddings.word_embeddings(ids), front)
        longer = in_front(types, torch.zeros(COUNT, dtype=torch.long))
        embedded = bert.embeddings(inputs_embeds=words, token_type_ids=longer)
    seen = torch.ones(2, 7) if mask is None else mask
    bias = (1 - in_front(seen.float(), torch.ones(COUNT)))[:, None, None, :] * torch.finfo(torch.float32).min
    states = bert.encoder(embedded, attention_mask=bias).last_hidden_state[:, COUNT:]
    assert torch.allclose(found.logits, model.classifier(bert.pooler(states)), atol=1e-5)
    assert {one.shape for one in found.hidden_states} == {(2, 7, 32)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_classifies_by_the_users_last_token(side):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, pad_token_id=0, num_labels=3)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    adapters = prompted(model, f"prompt_tuning[prompt_length={COUNT}]")
    mask = LEFT if side == "left" else RIGHT
    ids = torch.randint(1, 30, (2, 7)) * mask
    found = model(input_ids=ids, attention_mask=mask).logits
    last = torch.tensor([6, 6]) if side == "left" else torch.tensor([4, 6])
    states = model.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(found, model.score(states[torch.arange(2), last]), atol=1e-6)
    assert "a" in adapters.names


def test_the_paper_starts_uniformly_or_at_words():
    model = tiny("llama-lm")
    adapters = inarch.attach(model)
    adapters.add("a", "prompt_tuning[prompt_length=400]")
    assert 0.49 < vectors(adapters).abs().max() <= 0.5
    adapters.add("b", "prompt_tuning[prompt_length=5,prompt_init=from_tokens,prompt_init_ids=[7,9,11]]")
    assert torch.equal(vectors(adapters, "b"), model.model.embed_tokens.weight[[7, 9, 11, 7, 9]])
    with pytest.raises(inarch.ConfigError, match="rows of the table of words; got ids from 3 to 500"):
        adapters.add("c", "prompt_tuning[prompt_init=from_tokens,prompt_init_ids=[3,500]]")
    with pytest.raises(inarch.ConfigError, match=r"and only then; got \[\] with `prompt_init=from_tokens`"):
        read_config("prompt_tuning[prompt_init=from_tokens]")


def test_rows_copies_tasks_stacks_and_averages():
    model = tiny("llama-lm")
    adapters = prompted(model, *[f"prompt_tuning[prompt_length={COUNT}]"] * 2)
    ids = tiny_inputs("llama-lm")["input_ids"]

    def run(setup, **changes):
        adapters.activate(setup)
        return model(input_ids=ids, attention_mask=RIGHT, **changes).logits

    one, other = run("a"), run("b")
    mixed = torch.cat((other[:1], one[1:]))
    assert torch.allclose(run(BatchSplit("b", "a", batch_sizes=[1, 1])), mixed, atol=1e-5)
    assert torch.allclose(run(MultiTask("a", "b"), task_ids=torch.tensor([1, 0])), mixed, atol=1e-5)
    assert torch.allclose(run(Parallel("a", "b")), torch.cat((one, other)), atol=1e-5)
    assert torch.allclose(run(Average("a", "a")), one, atol=1e-5)
    stacked = run(Stack("a", "b"))
    adapters.add("c", f"prompt_tuning[prompt_length={2 * COUNT}]")
    (both,) = adapters["c"].values()
    both.data = torch.cat((vectors(adapters, "b"), vectors(adapters)))  # the second acts on what the first gives
    assert torch.allclose(run("c"), stacked, atol=1e-5)
    with pytest.raises(inarch.SetupError, match=r"equally many tokens in front of them; got \[3, 6\]"):
        adapters.activate(Parallel("a", "c"))
    adapters.add("lora", "lora")
    with pytest.raises(inarch.SetupError, match=r"got \[3, 0\] from BatchSplit"):
        adapters.activate(BatchSplit("a", "lora", batch_sizes=[1, 1]))


def test_an_invertible_adapter_goes_with_it():
    """In one program at the embedding of BERT: what a later part puts in front, an earlier one does not change."""
    model = tiny("bert-classifier")
    adapters = prompted(model, f"invertible|prompt_tuning[prompt_length={COUNT}]")
    inputs = tiny_inputs("bert")
    found = model(**inputs).logits
    adapters.deactivate()
    modules = {m.name: m for m in model.modules() if getattr(m, "name", "") in ("invertible", "prompt")}
    embedded = in_front(modules["invertible"](model.bert.embeddings(**inputs)), modules["prompt"].vectors)
    states = model.bert.encoder(embedded).last_hidden_state[:, COUNT:]
    assert torch.allclose(found, model.classifier(model.bert.pooler(states)), atol=1e-5)


def test_a_decoder_with_an_embedding_of_its_own_has_a_cache():
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    for name in ("Bert", "Roberta"):
        config = getattr(transformers, f"{name}Config")(vocab_size=40, is_decoder=True, pad_token_id=0, **settings)
        model = getattr(transformers, "BertLMHeadModel" if name == "Bert" else "RobertaForCausalLM")(config).eval()
        prompted(model, f"prompt_tuning[prompt_length={COUNT}]")
        ids = torch.randint(3, 40, (2, 6))
        whole = model(input_ids=ids, attention_mask=torch.ones(2, 6)).logits
        start = model(input_ids=ids[:, :4], attention_mask=torch.ones(2, 4), use_cache=True)
        rest = model(input_ids=ids[:, 4:], attention_mask=torch.ones(2, 6), past_key_values=start.past_key_values)
        assert torch.allclose(torch.cat((start.logits, rest.logits), dim=1), whole, atol=1e-5), name


def test_what_cannot_be_told_of_the_vectors_is_refused():
    model = tiny("llama-lm")
    adapters = prompted(model, f"prompt_tuning[prompt_length={COUNT}]")
    ids = tiny_inputs("llama-lm")["input_ids"]
    with pytest.raises(
        inarch.SetupError, match=r"extended by those in front of them; got `attention_mask` of \(2, 1, 7"
    ):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 7, 7))
    adapters.deactivate()
    cache = model(input_ids=ids, use_cache=True).past_key_values
    adapters.activate("a")
    with pytest.raises(
        inarch.SetupError, match="a cache begins with the tokens in front; got a mask of 8 tokens for 5"
    ):
        model(input_ids=ids[:, :1], attention_mask=torch.ones(2, 8), past_key_values=cache)
    with pytest.raises(inarch.SetupError, match="got `per_layer` of shape"):
        model.model(input_ids=ids, per_layer=torch.ones(2, 7, 3))


def test_an_embedding_without_positions_is_among_the_words():
    """ModernBERT has rotary ones, which its model makes for as many tokens as there are ids."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = transformers.ModernBertModel(
        transformers.ModernBertConfig(vocab_size=99, pad_token_id=0, **settings)
    ).eval()
    adapters = prompted(model, f"prompt_tuning[prompt_length={COUNT}]")
    ids = tiny_inputs("bert")["input_ids"]
    found = model(input_ids=ids, attention_mask=RIGHT).last_hidden_state
    adapters.deactivate()
    embedded = in_front(model.get_input_embeddings()(ids), vectors(adapters))
    expected = model(inputs_embeds=embedded, attention_mask=in_front(RIGHT, torch.ones(COUNT))).last_hidden_state
    assert torch.allclose(found, expected[:, COUNT:], atol=1e-5)


@pytest.mark.parametrize(("name", "config"), [("t5-lm", "prompt_tuning"), ("vit-classifier", "vpt_shallow")])
def test_a_check_knows_that_the_input_reaches_all_layers(name, config):
    """And measures what has the same shape with and without."""
    report = inarch.check(tiny(name), config)
    assert report.sound
    assert "partial-reach" not in {finding.code for finding in report.findings}
    assert report.evidence is not None
    assert report.evidence.drift > 0
    assert report.evidence.dead == ()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vit", "prompt_tuning", "no stack of layers gets token ids.*`vpt_deep` for images"),
        ("gpt2-lm", "prompt_tuning[insert=embedding]", "need a module at which it ends; got none.*`insert=words`"),
        ("clip", "prompt_tuning[insert=words]", "takes no `inputs_embeds`. Set `insert=embedding`"),
    ],
)
def test_a_place_that_a_model_does_not_have_is_refused(name, config, message):
    adapters = inarch.attach(tiny(name))
    if name == "clip":
        skip_where_no_table_is_told(adapters)
    with pytest.raises(inarch.ConfigError, match=message):
        adapters.add("a", config)


def skip_where_no_table_is_told(adapters):
    """In older releases of transformers the text model inside of CLIP is a class without `get_input_embeddings`."""
    if adapters.sites.entries["text0"].words is None:
        with pytest.raises(inarch.ConfigError, match="embeds them by one table"):
            adapters.add("a", "prompt_tuning")
        pytest.skip("in this release of transformers CLIP does not tell its table of words")


def test_a_model_with_a_table_for_each_of_several_tokens_is_refused(monkeypatch):
    """What makes sounds of codebooks: a place in the sequence is the sum of several tokens."""
    model = tiny("gpt2-lm")
    tables = nn.ModuleList([nn.Embedding(99, 32), nn.Embedding(99, 32)])
    monkeypatch.setattr(type(model), "get_input_embeddings", lambda _: tables)
    monkeypatch.setattr(type(model.transformer), "get_input_embeddings", lambda _: tables)
    model.transformer.tables = tables
    adapters = inarch.attach(model)
    with pytest.raises(inarch.ConfigError, match="no stack of layers gets token ids and embeds them by one table"):
        adapters.add("a", "prompt_tuning")
    adapters.add("a", "seq_bn")


def test_the_tokens_of_clip_stay_where_they_are():
    """The text is pooled at the position of its last token, which the ids tell."""
    model = tiny("clip")
    skip_where_no_table_is_told(inarch.attach(model))
    adapters = prompted(model, f"prompt_tuning[prompt_length={COUNT}]")
    inputs = tiny_inputs("clip")
    found = model(**inputs).text_embeds
    states = model.text_model(input_ids=inputs["input_ids"])
    assert states.last_hidden_state.shape[1] == 7
    assert found.shape == (2, 512)
    adapters.deactivate()
    assert not torch.allclose(model(**inputs).text_embeds, found, atol=1e-3)


@pytest.mark.parametrize(("name", "prefix"), [("bert-classifier", "bert."), ("vit-classifier", "vit.")])
def test_a_folder_of_the_library_adapters_is_read(tmp_path, name, prefix):
    model = tiny(name)
    preset = "prompt_tuning" if prefix == "bert." else "vpt_shallow[dropout=0]"
    adapters = prompted(
        model, preset.replace("]", ",prompt_length=4]") if "]" in preset else f"{preset}[prompt_length=4]"
    )
    expected = model(**tiny_inputs(name)).logits
    tensors = {f"{prefix}prompt_tuning.prompt_tunings.x.prompt_embedding.weight": vectors(adapters)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    config = {"architecture": "prompt_tuning", "combine": "prefix", "prompt_length": 4}
    config |= {"prompt_init": "random_uniform", "prompt_init_text": None, "init_weights_seed": None}
    record = {"name": "x", "model_type": prefix[:-1], "version": "adapters.1.3.0", "config": config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(record))
    adapters.activate(adapters.load(tmp_path))
    assert torch.equal(model(**tiny_inputs(name)).logits, expected)


def test_prompts_behind_the_first_token_are_not_read(tmp_path):
    save_file(
        {"prompt_tuning.prompt_tunings.x.prompt_embedding.weight": torch.ones(4, 32)}, tmp_path / "adapter.safetensors"
    )
    config = {"architecture": "prompt_tuning", "combine": "prefix_after_bos", "prompt_length": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"name": "x", "model_type": "bert", "config": config}))
    with pytest.raises(inarch.StateError, match="prompts behind the first token"):
        inarch.attach(tiny("bert")).load(tmp_path)


def peft_folder(folder, rows, **changes):
    save_file({"prompt_embeddings": rows}, folder / "adapter_model.safetensors")
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": 32}
    config |= {"num_transformer_submodules": 1, "base_model_name_or_path": "", "prompt_tuning_init": "RANDOM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def test_a_folder_of_peft_is_read(tmp_path):
    model = tiny("gpt2-lm")
    adapters = prompted(model, "prompt_tuning[prompt_length=4]")
    expected = model(**tiny_inputs("gpt2-lm")).logits
    peft_folder(tmp_path, vectors(adapters))
    adapters.activate(adapters.load(tmp_path, name="x"))
    assert torch.equal(model(**tiny_inputs("gpt2-lm")).logits, expected)


def test_of_an_encoder_and_decoder_peft_uses_the_first_half(tmp_path):
    model = tiny("t5-lm")
    adapters = prompted(model, "prompt_tuning[prompt_length=4]")
    expected = model(**tiny_inputs("t5-lm")).logits
    rows = torch.cat((vectors(adapters), torch.ones(4, 32)))
    peft_folder(tmp_path, rows, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=2)
    adapters.activate(adapters.load(tmp_path, name="x"))
    assert torch.equal(model(**tiny_inputs("t5-lm")).logits, expected)


def test_a_classifier_that_pools_a_prompt_is_not_read(tmp_path):
    adapters = inarch.attach(tiny("bert-classifier"))
    peft_folder(tmp_path, torch.ones(4, 32), task_type="SEQ_CLS")
    with pytest.raises(inarch.StateError, match="pools the first prompt; got `SEQ_CLS`"):
        adapters.load(tmp_path)
