"""ReFT: the formula of the paper at the right tokens, whatever is padded, cached, copied or cut."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import inarch
from inarch import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from inarch.testing import PlainTransformer, tiny, tiny_inputs

CONFIG = "loreft[prefix_positions=2,suffix_positions=1,r=2,dropout=0]"
NAMES = ["vit", "bert", "llama", "bart", "t5"]


def adapted(name, config=CONFIG, adapter="a", model=None):
    model = tiny(name) if model is None else model
    adapters = inarch.attach(model)
    torch.manual_seed(1)
    adapters.add(adapter, config)
    adapters.activate(adapter)
    return model, adapters


def by_hand(adapters, name, touched, subtract=True, f=lambda z: z):
    """Forward hooks that compute the equation in the paper's notation, in double precision, at given tokens."""
    last = {(site.stack, site.layer): site for site in adapters.sites}
    handles = []
    for site in last.values():

        def hook(module, args, output, site=site):
            x = output[0] if isinstance(output, tuple) else output
            y = x.double().clone()
            for end, rows in touched(site, x).items():
                own = {leaf: adapters[name][f"{site.key}.reft.{end}.{leaf}"].double() for leaf in "RWb"}
                for row, places in enumerate(rows):
                    for place in places:
                        h = x[row, place].double()
                        source = f(own["W"] @ h + own["b"]) - (own["R"] @ h if subtract else 0)
                        y[row, place] = h + own["R"].T @ source
            y = y.to(x.dtype)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handles.append(adapters.model.get_submodule(site.layer_path).register_forward_hook(hook))
    return handles


@torch.no_grad()
def last(model, **inputs):
    found = model(**inputs)
    return found["last_hidden_state"] if "last_hidden_state" in found else found["logits"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["loreft", "direft", "noreft"])
def test_interventions_compute_the_equation_at_first_and_last_tokens(name, kind):
    settings = "prefix_positions=2,suffix_positions=1,r=2,dropout=0,non_linearity=gelu"
    model, adapters = adapted(name, f"{kind}[{settings}]")
    found = last(model, **tiny_inputs(name))
    adapters.deactivate()

    def touched(site, x):
        return {"prefix": [[0, 1]] * len(x), "suffix": [[x.shape[1] - 1]] * len(x)}

    handles = by_hand(adapters, "a", touched, subtract=kind != "direft", f=nn.functional.gelu)
    assert torch.allclose(found, last(model, **tiny_inputs(name)), atol=2e-5)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(found, last(model, **tiny_inputs(name)), atol=1e-2)


MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_does_not_count(name, side):
    """A token in both ends, as in the shortest sample, gets the suffix."""
    mask = MASK.flip(1) if side == "left" else MASK
    inputs = tiny_inputs(name, batch=3) | {"attention_mask": mask}
    model, adapters = adapted(name)
    found = last(model, **inputs)
    adapters.deactivate()

    def touched(site, x):
        if site.stack == "text1":  # the decoder has no padding
            return {"prefix": [[0, 1]] * 3, "suffix": [[x.shape[1] - 1]] * 3}
        real = [row.nonzero().flatten().tolist() for row in mask]
        return {"prefix": [row[:2] if len(row) > 2 else [] for row in real], "suffix": [row[-1:] for row in real]}

    by_hand(adapters, "a", touched)
    expected = last(model, **inputs)
    kept = torch.ones(found.shape[:2], dtype=torch.bool) if name == "bart" else mask.bool()
    assert torch.allclose(found[kept], expected[kept], atol=2e-5)


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm", "t5-lm", "bart-lm", "whisper-lm"])
def test_generation_with_a_cache_is_generation_without(name):
    """Of a batch that is padded on the left; the prompt ends where generation begins."""
    model, _ = adapted(name)
    inputs = {k: v for k, v in tiny_inputs(name, batch=3).items() if k != "decoder_input_ids"}
    if "input_ids" in inputs:
        inputs["attention_mask"] = MASK.flip(1)
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, whole = (model.generate(**inputs, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.logits, whole.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    if name == "llama-lm":  # row by row, without padding; and with a cache of fixed size
        alone = model.generate(inputs["input_ids"][1:2, 3:], **settings)
        for one, other in zip(alone.logits, cached.logits, strict=False):
            assert torch.allclose(one[0], other[1], atol=1e-4)
        fixed = model.generate(**inputs, **settings, cache_implementation="static")
        assert torch.equal(fixed.sequences, cached.sequences)


def test_the_prompt_of_generation_is_its_suffix():
    """The first step changes the last token of the prompt; later steps no token that was generated."""
    model, adapters = adapted("llama-lm", "loreft[prefix_positions=0,suffix_positions=1,dropout=0]")
    ids = tiny_inputs("llama-lm")["input_ids"]
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(ids, max_new_tokens=2, **settings)
    assert torch.allclose(found.logits[0], last(model, input_ids=ids)[:, -1], atol=1e-5)
    longer = last(model, input_ids=found.sequences[:, :-1])[:, -1]
    assert not torch.allclose(found.logits[1], longer, atol=1e-2)
    adapters.deactivate()
    by_hand(adapters, "a", lambda _, x: {"suffix": [[6]] * len(x)})
    assert torch.allclose(found.logits[1], last(model, input_ids=found.sequences[:, :-1])[:, -1], atol=1e-5)


def test_a_prompt_in_chunks_has_no_known_end():
    model, _ = adapted("llama-lm")
    with pytest.raises(inarch.SetupError, match="prompt comes in one call; got `prefill_chunk_size=2`"):
        model.generate(tiny_inputs("llama-lm")["input_ids"], prefill_chunk_size=2, max_new_tokens=2)


def test_recorded_hidden_states_are_those_after_interventions():
    model, adapters = adapted("llama")
    ids = tiny_inputs("llama")
    for _ in range(2):  # recording begins after, and before the hooks
        with torch.no_grad():
            states = model(**ids, output_hidden_states=True).hidden_states
        seen = []
        handle = model.layers[1].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        last(model, **ids)
        handle.remove()
        assert torch.equal(states[1], seen[0])
        adapters.activate("a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_stay_orthonormal_through_training_copies_and_files(dtype, tmp_path):
    model, adapters = adapted("vit", "loreft[r=4,dropout=0]", model=tiny("vit").to(dtype))
    adapters.train("a")
    pixels = tiny_inputs("vit")["pixel_values"].to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(pixel_values=pixels).last_hidden_state.square().mean().backward()
        optimizer.step()
    expected = last(model, pixel_values=pixels)
    adapters.save("a", tmp_path / "a")
    other = inarch.attach(tiny("vit").to(dtype))
    other.load(tmp_path / "a")
    other.activate("a")
    twin = copy.deepcopy(model)
    for one in (model, other.model, twin):
        assert torch.allclose(last(one, pixel_values=pixels), expected, rtol=0, atol=1e-5)
        units = [module for module in one.modules() if type(module).__name__ == "Intervention"]
        assert len(units) == 2
        for unit in units:
            rows = unit.rows().double()
            assert rows.dtype != unit.R.dtype or dtype == torch.float64
            tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-13}[dtype]
            assert torch.allclose(rows @ rows.T, torch.eye(4, dtype=torch.float64), atol=tolerance)
            assert not torch.allclose(unit.R.double() @ unit.R.double().T, torch.eye(4, dtype=torch.float64), atol=1e-2)


def test_tied_ends_have_one_intervention():
    model, adapters = adapted("bert", "loreft[suffix_positions=3,tied_weights=True,dropout=0]")
    assert {key.split(".")[-2] for key in adapters["a"]} == {"both"}
    found = last(model, **tiny_inputs("bert"))
    adapters.deactivate()
    by_hand(adapters, "a", lambda _, x: {"both": [[0, 1, 2, 4, 5, 6]] * len(x)})
    assert torch.allclose(found, last(model, **tiny_inputs("bert")), atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_blocks_give_each_sample_its_adapter(name):
    model, adapters = adapted(name)
    adapters.add("b", "direft[prefix_positions=1,dropout=0]")
    inputs = tiny_inputs(name, batch=3) | ({"attention_mask": MASK.flip(1)} if name == "llama" else {})
    alone = {}
    for key in "ab":
        adapters.activate(key)
        alone[key] = last(model, **inputs)
    adapters.activate(BatchSplit("a", "b", batch_sizes=[1, 2]))
    expected = torch.cat([alone["a"][:1], alone["b"][1:]])
    assert torch.allclose(last(model, **inputs), expected, atol=1e-5)
    adapters.activate(MultiTask("a", "b"))
    assert torch.allclose(last(model, **inputs, task_ids=torch.tensor([0, 1, 1])), expected, atol=1e-5)
    adapters.activate(Parallel("a", "b"))
    assert torch.allclose(last(model, **inputs), torch.cat([alone["a"], alone["b"]]), atol=1e-5)
    adapters.activate(Average("a", "a"))
    assert torch.allclose(last(model, **inputs), alone["a"], atol=1e-5)
    adapters.activate(Stack("a", "b"))
    assert not torch.allclose(last(model, **inputs), alone["a"], atol=1e-2)


@pytest.mark.parametrize("block", [Fuse("a", "b"), Split("a", "b", splits=[3, 4])])
def test_blocks_without_a_meaning_are_refused(block):
    _, adapters = adapted("bert")
    adapters.add("b", CONFIG)
    with pytest.raises(inarch.SetupError, match=f"`{type(block).__name__}`"):
        adapters.activate(block)


class Checkpointed(PlainTransformer):
    """Runs every layer again in the backward pass, where it does not see the mask."""

    reentrant = None

    def forward(self, x, attention_mask):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.norm(x) * attention_mask.unsqueeze(-1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_positions_of_its_forward(reentrant):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 7, 32, requires_grad=True), "attention_mask": MASK.flip(1)}
    model = Checkpointed()
    adapters = inarch.attach(model, example_inputs=inputs)
    adapters.add("a", CONFIG)
    adapters.train("a")
    weights = torch.randn(3, 7, 32)
    gradients = []
    for model.reentrant in (None, reentrant):
        loss = (model(**inputs) * weights).sum()
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in adapters["a"].values()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    first, second = model(**inputs), model(inputs["x"], MASK)
    with pytest.raises(inarch.SetupError, match="take the padding of the last forward; got forwards of other masks"):
        (first.mean() + second.mean()).backward()


def test_layers_are_numbered_through_all_stacks():
    model, adapters = adapted("bart", "loreft[layers=[1,2]]")
    assert {key.rsplit(".", 3)[0] for key in adapters["a"]} == {"text0.1.mlp", "text1.0.mlp"}
    del model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("loreft[layers=[2]]", "`layers` names layers of the model, 0 to 1; got 2"),
        ("loreft[layers=[]]", "must name a layer; got an empty list"),
        ("loreft[prefix_positions=0]", "must be above zero; got neither"),
        ("loreft[r=33]", "At most as many rows as the stream is wide.*got `r=33` for a width of 32 at `text0.0.mlp`"),
    ],
)
def test_wrong_configurations_are_refused(config, message):
    with pytest.raises(inarch.ConfigError, match=message):
        inarch.attach(tiny("bert")).add("a", config)


def test_what_gives_no_sequence_is_refused():
    model, adapters = adapted("vit")
    block = adapters.sites.sites[0].layer_path
    model.get_submodule(block).register_forward_hook(lambda *call: {"x": call[-1]}, prepend=True)
    with pytest.raises(inarch.SiteError, match=r"give a sequence \(B, L, D\) each.*got dict of"):
        last(model, **tiny_inputs("vit"))
    with pytest.raises(inarch.SiteError, match=r"a column for every token so far, \(2, 7\); got one of shape \(2, 9\)"):
        adapted("bert")[0](input_ids=torch.ones(2, 7, dtype=torch.long), attention_mask=torch.ones(2, 9))


def test_the_report_names_what_the_stream_becomes():
    report = inarch.check(tiny("bert"), "direft[suffix_positions=2]")
    assert report.sound
    assert "y = x + Rᵀ (W x + b) at the 3 first and the 2 last tokens" in str(report)


def folder_of_adapters(place, **changes):
    """What the library `adapters` writes for a ReFT of tiny BERT, and the R, W and b of its formula by our keys."""
    torch.manual_seed(2)
    config = {
        "architecture": "reft",
        "layers": "all",
        "prefix_positions": 2,
        "suffix_positions": 0,
        "r": 3,
        "orthogonality": True,
        "tied_weights": False,
        "dropout": 0.05,
        "non_linearity": None,
        "output_reft": True,
    }
    config |= changes
    tensors, expected = {}, {}
    for layer in range(2):
        for unit, end in enumerate(("prefix", "suffix")):
            source, free = nn.Linear(32, 3), nn.Linear(32, 3, bias=False)
            projection = nn.utils.parametrizations.orthogonal(free) if config["orthogonality"] else free
            with torch.no_grad():
                for name, parameter in projection.named_parameters():
                    if name.endswith("original"):  # as training moves it: the diagonal has no gradient
                        parameter.add_(torch.randn_like(parameter).triu(1) * 0.3)
            state = {f"learned_source.{k}": v for k, v in source.state_dict().items()}
            state |= {f"projection.{k}": v for k, v in projection.state_dict().items()}
            prefix = f"bert.encoder.layer.{layer}.reft_layer.refts.old.units.{unit}"
            tensors |= {f"{prefix}.{key}": value.clone() for key, value in state.items()}
            if end == "prefix":
                own = {"R": projection.weight, "W": source.weight, "b": source.bias}
                expected |= {f"text0.{layer}.mlp.reft.{end}.{key}": value.detach() for key, value in own.items()}
    place.mkdir()
    record = {"config": config, "name": "old", "model_type": "bert", "version": "adapters.1.3.0"}
    (place / "adapter_config.json").write_text(json.dumps(record))
    torch.save(tensors, place / "pytorch_adapter.bin")
    return tensors, expected


@pytest.mark.parametrize("changes", [{}, {"orthogonality": False, "subtract_projection": True}, {"layers": [1]}])
def test_folders_of_adapters_compute_the_same(tmp_path, changes):
    tensors, expected = folder_of_adapters(tmp_path / "a", **changes)
    if "layers" in changes:
        kept = {key: value for key, value in tensors.items() if ".layer.1." in key}
        torch.save(kept, tmp_path / "a" / "pytorch_adapter.bin")
        expected = {key: value for key, value in expected.items() if key.startswith("text0.1.")}
    adapters = inarch.attach(tiny("bert"))
    name = adapters.load(tmp_path / "a")
    assert adapters[name].keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(adapters[name][key], value, atol=1e-6), key
    units = [module for module in adapters.model.modules() if type(module).__name__ == "Intervention"]
    for unit in units:
        assert torch.allclose(unit.rows(), unit.R, atol=1e-6)


def test_rows_that_weight_decay_took_in_the_other_library_stay_away(tmp_path, caplog):
    """Its signs on the diagonal are cut to whole numbers, so a little less than one is zero."""
    tensors, expected = folder_of_adapters(tmp_path / "a")
    decayed = {k: v * 0.999 if k.endswith("original") else v for k, v in tensors.items()}
    torch.save(decayed, tmp_path / "a" / "pytorch_adapter.bin")
    adapters = inarch.attach(tiny("bert"))
    name = adapters.load(tmp_path / "a")
    assert "has lost orthonormal rows to weight decay" in caplog.text
    assert adapters.config(name).parts[0].orthogonality is False
    assert not any(adapters[name][key].any() for key in expected if key.endswith(".R"))


def test_a_folder_that_is_noreft_or_direft_must_say_which(tmp_path):
    folder_of_adapters(tmp_path / "a", orthogonality=False)
    with pytest.raises(inarch.StateError, match="got no `subtract_projection`.*true` for NoReFT"):
        inarch.attach(tiny("bert")).load(tmp_path / "a")
