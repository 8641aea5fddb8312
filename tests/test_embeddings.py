"""Token embeddings for other vocabularies: tables that stand before the base's own."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

import inarch
from inarch.testing import tiny, tiny_inputs


class Words:
    """A tokenizer, as far as its vocabulary goes."""

    def __init__(self, words):
        self.vocabulary = {word: number for number, word in enumerate(words)}

    def __len__(self):
        return len(self.vocabulary)

    def get_vocab(self):
        return self.vocabulary


OLD = Words([f"w{number}" for number in range(99)])
NEW = Words(["new", *(f"w{number}" for number in reversed(range(80))), "newer"])


@torch.no_grad()
def result(model, inputs):
    found = model(**inputs)
    return found["logits"] if "logits" in found else found["last_hidden_state"]


@pytest.mark.parametrize("name", ["bert", "llama-lm", "gpt2-lm", "bart", "t5-lm", "clip-text"])
def test_a_table_is_what_overwriting_the_weight_would_be(name):
    """Scaled embeddings, shared ones, and tied output layers included; the base keeps its own."""
    model = tiny(name)
    inputs = tiny_inputs(name)
    inputs = {key: value.clamp(max=81) for key, value in inputs.items()}
    base, keys = result(model, inputs), set(model.state_dict())
    adapters = inarch.attach(model)
    torch.manual_seed(0)
    adapters.add_embeddings("other", NEW, reference="default", reference_tokenizer=OLD)
    assert (adapters.active_embeddings, adapters.embeddings) == ("other", ("default", "other"))
    table = adapters._embeddings.weight("other")
    own = adapters._embeddings.weight("default")
    for word in ("w0", "w5", "w79"):
        assert torch.equal(table[NEW.get_vocab()[word]], own[OLD.get_vocab()[word]])
    assert 0.01 < table[0].std() < 0.03
    found = result(model, inputs)
    twin = result(copy.deepcopy(model), inputs)
    adapters.activate_embeddings("default")
    assert torch.equal(result(model, inputs), base)
    adapters.detach()
    assert set(model.state_dict()) == keys
    is_tied = name.endswith("-lm") and model.get_output_embeddings().weight is own
    plain = tiny(name)
    plain.resize_token_embeddings(len(NEW), mean_resizing=False)
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(table)
    expected = result(plain, inputs)
    if name.endswith("-lm") and not is_tied:  # resizing cut its own output layer, which a table leaves alone
        found, twin = found[..., : len(NEW)], twin[..., : len(NEW)]
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(found, twin)


def test_tied_embeddings_train_with_the_loss_of_their_vocabulary():
    model = tiny("gpt2-lm")
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.add_embeddings("other", NEW)
    assert model.config.vocab_size == len(NEW)
    adapters.train("a", embeddings=True)
    ids = tiny_inputs("gpt2-lm")["input_ids"].clamp(max=81)
    model(input_ids=ids, labels=ids).loss.backward()
    assert adapters._embeddings.weight("other").grad.abs().sum() > 0
    assert adapters._embeddings.weight("default").grad is None
    adapters.remove_embeddings("other")
    assert (adapters.active_embeddings, model.config.vocab_size) == ("default", 99)


@pytest.mark.parametrize("is_ours", [True, False])
def test_tables_are_read_from_our_files_and_those_of_adapters(tmp_path, is_ours):
    model = tiny("bert")
    adapters = inarch.attach(model)
    adapters.add_embeddings("other", NEW)
    inputs = {"input_ids": torch.tensor([[3, 80, 81]])}
    expected = result(model, inputs)
    if is_ours:
        adapters.save_embeddings("other", tmp_path)
    else:
        torch.save(torch.nn.Parameter(adapters._embeddings.weight("other")), tmp_path / "embedding.pt")
    adapters.remove_embeddings("other")
    assert adapters.load_embeddings(tmp_path, name="again") is None
    assert torch.equal(result(model, inputs), expected)
    save_file({"weight": torch.zeros(4, 16)}, tmp_path / "embedding.safetensors")
    with pytest.raises(inarch.StateError, match=r"as wide as those of the model, 32; got a table of shape \(4, 16\)"):
        adapters.load_embeddings(tmp_path, name="narrow")


class Kept(Words):
    """One that can be saved."""

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "words.txt").write_text("\n".join(self.vocabulary))


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    """No tokenizer of an old table stays beside a new one, and what fails leaves the old folder."""
    adapters = inarch.attach(tiny("bert"))
    adapters.add_embeddings("one", NEW)
    adapters.add_embeddings("two", OLD)
    adapters.save_embeddings("one", tmp_path / "here", tokenizer=Kept(["a"]))
    assert (tmp_path / "here" / "tokenizer" / "words.txt").read_text() == "a"

    class Full(Words):
        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / "words.txt").write_text("half")
            raise OSError(28, "No space left on device")

    before = {path: path.is_file() and path.read_bytes() for path in sorted(tmp_path.rglob("*"))}
    with pytest.raises(inarch.StateError, match="table of embeddings must be writable; got .*here.*No space left"):
        adapters.save_embeddings("two", tmp_path / "here", tokenizer=Full(["b"]))
    assert {path: path.is_file() and path.read_bytes() for path in sorted(tmp_path.rglob("*"))} == before
    adapters.save_embeddings("two", tmp_path / "here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["embedding.safetensors"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(inarch.StateError, match="saved into a new folder, an empty one, or over a table.*mine.txt"):
        adapters.save_embeddings("two", tmp_path / "other")


def test_a_tokenizer_that_cannot_be_read_leaves_no_table(tmp_path):
    adapters = inarch.attach(tiny("bert"))
    adapters.add_embeddings("one", NEW)
    adapters.save_embeddings("one", tmp_path / "here", tokenizer=Kept(["a"]))
    with pytest.raises(inarch.StateError, match="The tokenizer beside embeddings must be one of transformers; got"):
        adapters.load_embeddings(tmp_path / "here", name="two")
    assert adapters.embeddings == ("default", "one")


def test_an_output_layer_of_its_own_is_told_of_that_keeps_the_old_vocabulary(caplog):
    model = tiny("llama-lm")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    adapters = inarch.attach(model)
    adapters.add_embeddings("other", NEW)
    assert "`lm_head` of LlamaForCausalLM, which is not tied to the token embeddings, goes on" in caplog.text
    caplog.clear()
    inarch.attach(tiny("gpt2-lm")).add_embeddings("other", NEW)
    inarch.attach(tiny("bert")).add_embeddings("other", NEW)
    assert not caplog.text


def test_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Trap(), tmp_path / "embedding.pt")
    with pytest.raises(inarch.StateError, match="nothing but tensors.*Nothing in it was run"):
        inarch.attach(tiny("bert")).load_embeddings(tmp_path, name="x")
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_refused(tmp_path):
    adapters = inarch.attach(tiny("bert"))
    with pytest.raises(inarch.SetupError, match="must be added before they are used; got `x`"):
        adapters.activate_embeddings("x")
    with pytest.raises(inarch.SetupError, match="by its tokenizer; got `reference` alone for `x`"):
        adapters.add_embeddings("x", NEW, reference="default")
    adapters.add_embeddings("x", NEW)
    with pytest.raises(inarch.SetupError, match="have different names.*got 'x'"):
        adapters.add_embeddings("x", NEW)
    with pytest.raises(inarch.SetupError, match="has a table of tokens .*got none in ViTModel"):
        inarch.attach(tiny("vit")).add_embeddings("x", NEW)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=99)
    masked = inarch.attach(BertForMaskedLM(config).eval())
    with pytest.raises(inarch.SetupError, match="bias of its own.*got 99 numbers for the 82 tokens of `x`"):
        masked.add_embeddings("x", NEW)
    assert (masked.active_embeddings, masked.embeddings) == ("default", ("default",))
    adapters.save_embeddings("x", tmp_path)
    with pytest.raises(inarch.SetupError, match="bias of its own"):
        masked.load_embeddings(tmp_path, name="x")
    assert masked.embeddings == ("default",)
