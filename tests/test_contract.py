"""The contract of every method: what it claims, and what no method may break, at every port and on every architecture.

Methods, presets and options are found, so a new file of `methods/` is under contract because it is there. A method that
has no place on an architecture says so; it must have one on two of them at least. All is computed in double precision,
so that what should be equal but for rounding is within 1e-8.
"""

import copy
import re
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

import docs_methods
import pytest
import torch
from torch import nn

import inarch
from inarch import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from inarch.compose import BLOCKS, names
from inarch.core.errors import InarchError, SetupError
from inarch.methods import AdapterConfig, method_of, methods, placements, presets, read_config
from inarch.methods.unions import UNIONS
from inarch.testing import perturb, tiny, tiny_inputs

ARCHITECTURES = ["vit", "llama-lm", "torch", "t5-lm", "bert", "gpt2-lm", "dinov2"]
"""Pre-norm; a gate, grouped queries and a cache; `nn.MultiheadAttention`, which applies weights itself; encoder and
decoder; post-norm; a fused and transposed projection; layer scale. Each stands beside those unlike it."""
TOKENS = {"vit": 17, "dinov2": 17, "bert": 7, "gpt2-lm": 7, "llama-lm": 7, "torch": 5}
OTHERS = ["beit", "clip-vision", "clip", "swin", "roberta", "distilbert", "qwen2", "bart", "whisper"]
"""Windows, towers, other names and orders: each is held to the contract with methods of all ports."""
JOINED = ["double_seq_bn[reduction_factor=4]|lora[attn_matrices=[q,k,v,o]]|ia3", "seq_bn[reduction_factor=4]"]
GENERATORS = ["llama-lm", "gpt2-lm", "t5-lm"]
CHECKPOINTED = ["vit", "llama-lm", "t5-lm", "bert", "gpt2-lm"]
PLACED = {"mute": "mute[roles=[mlp]]"}
"""Presets whose places are those of architectures that are not here."""
TINY = {"reduction_factor": 4}
"""Settings that leave a model of 32 dimensions something to train."""
CLOSE = 1e-8
ROWS = ("BatchSplit", "MultiTask", "Parallel")
"""The blocks that give rows of a batch to their children."""


# Models, of each one that is shared and one to load into


@cache
def plain(name):
    if name != "torch":
        return tiny(name).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, norm_first=True, batch_first=True, dtype=torch.float64)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        perturb(model)
    return model


def inputs_of(name, batch=2):
    if name == "torch":
        generator = torch.Generator().manual_seed(0)
        return {"src": torch.randn(batch, 5, 32, generator=generator, dtype=torch.float64)}
    found = tiny_inputs(name, batch=batch)
    return {key: value.double() if value.is_floating_point() else value for key, value in found.items()}


@cache
def grafted(name, role="shared"):
    """The handle of a model."""
    assert role in ("shared", "other")
    return inarch.attach(copy.deepcopy(plain(name)), example_inputs=inputs_of(name))


@cache
def base_output(name):
    return still(plain(name), inputs_of(name))


def output(model, inputs, **more):
    """What a model gives for each row, in one tensor (B, ...)."""
    found = model(**inputs, **more)
    if isinstance(found, torch.Tensor):
        return found.flatten(1)
    keys = ("last_hidden_state", "logits", "image_embeds", "text_embeds")
    return torch.cat([found[key].flatten(1) for key in keys if key in found], dim=1)


@torch.no_grad()
def still(model, inputs, **more):
    return output(model, inputs, **more)


def base_tensors(model):
    return {key: value for key, value in model.state_dict().items() if ".inarch." not in key}


# Adapters


def asked(preset):
    """The configuration of a preset, small enough for a tiny model."""
    config = read_config(PLACED.get(preset, preset))
    return AdapterConfig(tuple(_small(part) for part in config.parts))


def _small(part):
    given = part.to_dict()
    return part.replace(**{key: value for key, value in TINY.items() if isinstance(given.get(key), float)})


def all_presets():
    """Every preset by its own name, those of several methods among them."""
    old = {alias for method in methods().values() for alias in method.aliases}
    return [*(preset for preset in presets() if preset not in old), *UNIONS]


def first_presets():
    """One preset of each method."""
    return [next(iter(method.presets)) for method in methods().values()]


def put(adapters, config, name="a"):
    """Add an adapter, and whatever it acts on. Returns the setup in which it is active."""
    if any(method_of(part).name == "fusion" for part in config.parts):
        for child in ("p", "q"):
            if child not in adapters:
                adapters.add(child, "bottleneck[reduction_factor=4]")
        block = Fuse("p", "q", name=name)
        adapters.add_fusion(block, config)
        return block
    unsound = "allow" if config.parts[0] == asked("mute").parts[0] else "refuse"  # a branch taken out is not kept
    adapters.add(name, config, unsound=unsound)
    return name


@contextmanager
def having(name, config, role="shared"):
    """The handle of a model, and the setup of an adapter that it has for the length of the block."""
    adapters = grafted(name, role)
    try:
        yield adapters, put(adapters, config)
    finally:
        adapters.unmerge()
        adapters.deactivate()
        for one in adapters.names:
            adapters.remove(one)


def awake(adapters, name, seed=3, std=0.2):
    """Move an adapter's weights off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters[name].values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * std)


@cache
def taken(config):
    """The architectures on which a configuration has places. The others refuse it, by an error of ours."""
    found, refusals = [], []
    for name in [*ARCHITECTURES, *OTHERS]:
        if name in OTHERS and len(found) > 1:  # asked where a method of one modality has a place on one of the first
            break
        try:
            with having(name, config):
                found.append(name)
        except InarchError as error:
            refusals.append(str(error))
    assert all("got" in refusal for refusal in refusals), refusals
    return found


def some(config, among=ARCHITECTURES, count=2):
    """Some architectures that take a configuration: others for another method."""
    found = [name for name in taken(config) if name in among]
    start = list(methods()).index(method_of(config.parts[0]).name) % max(1, len(found))
    return (found[start:] + found[:start])[:count]


def claims(config, claim, *more):
    return [getattr(method_of(part), claim)(part, *more) for part in config.parts]


# What holds everywhere


def uphold(name, config, folder):
    """Start, training, saving and loading, rows of a batch, merging, and the way back, of one adapter on one model."""
    inputs, base, place = inputs_of(name), base_output(name), f"{config} on {name}"
    with having(name, config) as (adapters, setup):
        model = adapters.model
        adapters.train(setup)
        own = adapters["a"]
        heads = {id(p) for p in adapters.head("a").values()}
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained - heads == {id(p) for p in own.values()}, place
        start = still(model, inputs)
        if not isinstance(setup, Fuse):
            assert torch.equal(start, base) == all(claims(config, "starts_at_base")), place
        awake(adapters, "a")
        expected = still(model, inputs)
        if own:
            assert not torch.allclose(expected, start), place
            model.zero_grad(set_to_none=True)
            adapted = output(model, inputs)
            (adapted * torch.linspace(-1, 1, adapted.shape[1], dtype=adapted.dtype)).sum().backward()
            silent = [key for key, p in own.items() if p.grad is None or not p.grad.abs().sum() > 0]
            assert silent == [], place
            reached = {id(p) for p in model.parameters() if p.grad is not None}
            assert reached - heads == {id(p) for p in own.values()}, place
            model.zero_grad(set_to_none=True)
        rows = [still(model, {key: value[i : i + 1] for key, value in inputs.items()}) for i in range(2)]
        assert torch.allclose(torch.cat(rows), expected, rtol=0, atol=CLOSE), place
        reload(name, setup, adapters, expected, folder)
        if isinstance(setup, str):
            merge_and_back(adapters, config, expected, inputs, place)
        adapters.deactivate()
        assert torch.equal(still(model, inputs), base), place
        assert all(torch.equal(value, base_tensors(model)[key]) for key, value in plain(name).state_dict().items())


def reload(name, setup, adapters, expected, folder):
    """Saved and loaded into another model, an adapter gives the same, bit for bit."""
    other = grafted(name, "other")
    try:
        for one in names(setup):
            adapters.save(one, folder / one)
            other.load(folder / one)
        # Frozen like the first: the last bit of a product may depend on whether its factors require gradients.
        other.train(setup)
        assert torch.equal(still(other.model, inputs_of(name)), expected), (name, setup)
    finally:
        other.deactivate()
        for one in other.names:
            other.remove(one)


def merge_and_back(adapters, config, expected, inputs, place):
    obstacles = [obstacle for obstacle in claims(config, "obstacle_to_merge") if obstacle]
    if obstacles:
        with pytest.raises(SetupError, match=re.escape(obstacles[0])):
            adapters.merge("a", example_inputs=inputs)
        return
    before = {key: value.clone() for key, value in base_tensors(adapters.model).items()}
    try:
        adapters.merge("a", example_inputs=inputs)
    except SetupError as error:
        if "a projection without one" in str(error):  # an adapter's bias needs that of its projection
            return
        raise
    assert torch.allclose(still(adapters.model, inputs), expected, rtol=0, atol=CLOSE), place
    assert adapters.setup is None, place
    adapters.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in base_tensors(adapters.model).items()), place


@pytest.mark.parametrize("preset", all_presets())
def test_every_preset_keeps_the_contract_wherever_it_has_a_place(preset, tmp_path):
    config = asked(preset)
    assert len(taken(config)) >= 2, f"{preset} has a place on {taken(config)} alone"
    for name in taken(config):
        uphold(name, config, tmp_path / name)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "config", ["double_seq_bn[reduction_factor=4]|lora[attn_matrices=[q,k,v,o]]|ia3", "seq_bn[reduction_factor=4]"]
)
def test_methods_of_several_ports_keep_it_on_other_architectures(name, config, tmp_path):
    uphold(name, read_config(config), tmp_path)


def choices(hint):
    """The values that an option may have, as far as its type names them."""
    if hint is bool:
        return [True, False]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) is tuple:
        return [(value,) for value in choices(get_args(hint)[0])]
    return [value for inner in get_args(hint) for value in choices(inner)] if get_origin(hint) is not dict else []


def variants(method):
    """The first preset of a method with each of its options changed, one at a time."""
    preset = asked(next(iter(method.presets))).parts[0]
    for field, hint in get_type_hints(method.config_class).items():
        for value in choices(hint):
            if value != getattr(preset, field, value):
                yield {field: value}


@pytest.mark.parametrize("method", methods())
def test_every_option_keeps_the_contract_or_is_refused(method, tmp_path):
    """An option that means nothing where it is asked for is refused by a message, and changes nothing."""
    preset = asked(next(iter(methods()[method].presets))).parts[0]
    for number, changes in enumerate(variants(methods()[method])):
        try:
            config = AdapterConfig((preset.replace(**changes),))
        except InarchError:
            continue
        for name in some(config, count=1):
            uphold(name, config, tmp_path / str(number))


# Composition


def setups_of(block, tokens):
    """A setup of that block of `a` and `b`."""
    return {
        "Stack": Stack("a", "b"),
        "Fuse": Fuse("a", "b", name="f"),
        "Split": Split("a", "b", splits=[2, tokens - 2]),
        "BatchSplit": BatchSplit("a", "b", batch_sizes=[1, 1]),
        "Parallel": Parallel("a", "b"),
        "Average": Average("a", "b", weights=[1, 3]),
        "MultiTask": MultiTask("a", "b"),
    }[block]


def fusion_for(adapters, config):
    """Static fusion layers for `a` and `b`, or such for others where these have none."""
    try:
        adapters.add_fusion(Fuse("a", "b", name="f"), "static_fusion")
    except SetupError:
        for child in ("p", "q"):
            adapters.add(child, "bottleneck")
        adapters.add_fusion(Fuse("p", "q", name="f"), "static_fusion")


@pytest.mark.parametrize("preset", [preset for preset in first_presets() if preset not in ("dynamic_fusion", "mute")])
def test_every_block_gives_each_row_what_its_adapter_gives_or_is_refused_by_a_rule(preset, tmp_path):
    """Against the adapters alone. Of equal adapters, a mean, a fusion and a split of tokens are one of them."""
    config = asked(preset)
    for name in {*some(config), *[name for name in taken(config) if name == "torch"]}:
        inputs, where = inputs_of(name), f"{config} on {name}"
        with having(name, config) as (adapters, _):
            put(adapters, config, "b")
            fusion_for(adapters, config)
            for seed, key in enumerate("ab"):
                awake(adapters, key, seed)
            alone = {}
            for key in "ab":
                adapters.activate(key)
                alone[key] = still(adapters.model, inputs)
            assert not torch.allclose(alone["a"], alone["b"])
            refused = set()
            for block in BLOCKS:
                setup = setups_of(block, TOKENS.get(name, 7))
                rules = [
                    rule
                    for part in config.parts
                    for place in placements(part, adapters.sites)
                    if (rule := method_of(part).obstacle_to_block(part, place, block))
                ]
                if rules:
                    with pytest.raises(
                        SetupError, match=f"{re.escape(rules[0])}; got .* in a `{block}`. Compose it by"
                    ):
                        adapters.activate(setup)
                    refused.add(block)
                    continue
                if block == "Split" and name not in TOKENS:  # its encoder and decoder see different numbers
                    continue
                works_as_alone(adapters, setup, alone, inputs, f"{block}: {where}")
                if block in ("Fuse", "Average", "Split") and not any(claims(config, "sees_whole_sequences")):
                    found = of_equals(adapters, setup, inputs, tmp_path)
                    assert torch.allclose(found, alone["a"], rtol=0, atol=CLOSE), f"{block}: {where}"
            if name == some(config)[0]:
                nests_as_alone(adapters, alone, name, config, refused)


def nested(outer, inner, tokens):
    """A block of `a` in another block, beside `b` where that one cuts the batch."""
    settings = {
        "Split": {"splits": [1, 1] if outer == "Split" else [2, tokens - 2]},
        "BatchSplit": {"batch_sizes": [1, 1]},
        "Fuse": {"name": "f"},
    }
    if (outer, inner) == ("BatchSplit", "BatchSplit"):
        held = BatchSplit("a", batch_sizes=[1])
    else:
        held = BLOCKS[inner]("a", "a", **settings.get(inner, {})) if inner != "Stack" else Stack("a")
    if outer == "Stack":
        return Stack(held)
    settings["Split"] = {"splits": [2, tokens - 2]}
    return BLOCKS[outer](held, "b" if outer in ROWS else "a", **settings.get(outer, {}))


def nests_as_alone(adapters, alone, name, config, refused):
    """Every block in every block that may hold it, where both have a meaning: each row as its adapter alone."""
    tokens = 0 if any(claims(config, "sees_whole_sequences")) else TOKENS.get(name, 0)
    for outer, block in BLOCKS.items():
        for inner in block.allowed:
            blocks = {outer, inner}
            if blocks & refused or ("Split" in blocks and not tokens):
                continue
            more = {"task_ids": torch.tensor([0, 1])} if "MultiTask" in blocks else {}
            with adapters.using(nested(outer, inner, tokens)):
                found = still(adapters.model, inputs_of(name), **more)
            expected = {
                "BatchSplit": torch.cat([alone["a"][:1], alone["b"][1:]]),
                "MultiTask": torch.cat([alone["a"][:1], alone["b"][1:]]),
                "Parallel": torch.cat([alone["a"], alone["b"]]),
            }.get(outer, torch.cat([alone["a"]] * (2 if inner == "Parallel" else 1)))
            assert torch.allclose(found, expected, rtol=0, atol=CLOSE), f"{inner} in {outer}: {config} on {name}"


def works_as_alone(adapters, setup, alone, inputs, where):
    def close(found, expected):
        assert found.shape == expected.shape, where
        assert torch.allclose(found, expected, rtol=0, atol=CLOSE), (where, (found - expected).abs().max())

    model, block = adapters.model, type(setup).__name__
    rows = torch.cat([alone["a"][:1], alone["b"][1:]])
    with adapters.using(setup):
        if block == "BatchSplit":
            close(still(model, inputs), rows)
        elif block == "MultiTask":
            close(still(model, inputs, task_ids=torch.tensor([0, 1])), rows)
        elif block == "Parallel":
            close(still(model, inputs), torch.cat([alone["a"], alone["b"]]))
        else:
            found = still(model, inputs)
            for one in alone.values():  # with the prompts of both, what an encoder gives is longer
                assert found.shape != one.shape or not torch.allclose(found, one), where
    with adapters.using(Stack("a")):
        close(still(model, inputs), alone["a"])


def of_equals(adapters, setup, inputs, folder):
    """What a setup gives while `b` is what `a` is."""
    with adapters.using(setup):
        adapters.save("b", folder / "b")
        adapters.save("a", folder / "a")
        adapters.load(folder / "a", name="b", overwrite=True)
        found = still(adapters.model, inputs)
        adapters.load(folder / "b", overwrite=True)
    return found


def test_fusion_layers_are_no_adapter_by_themselves():
    with having("vit", asked("dynamic_fusion")) as (adapters, _), pytest.raises(SetupError, match="by itself"):
        adapters.activate("a")


# Copies, types, checkpoints, graphs, caches


@pytest.mark.parametrize("preset", first_presets())
def test_copies_compute_the_same_and_give_their_base_back(preset):
    config = asked(preset)
    for name in some(config):
        inputs = inputs_of(name)
        with having(name, config) as (adapters, setup):
            adapters.train(setup)
            awake(adapters, "a")
            expected = still(adapters.model, inputs)
            twin = copy.deepcopy(adapters.model)
        assert torch.equal(still(twin, inputs), expected), name
        inarch.attach(twin).detach()
        assert torch.equal(still(twin, inputs), base_output(name)), name
        assert twin.state_dict().keys() == plain(name).state_dict().keys()
        assert all(parameter.requires_grad for parameter in twin.parameters())
        assert [key for key, module in twin.named_modules() if module._forward_hooks or module._forward_pre_hooks] == []


@pytest.mark.parametrize("preset", first_presets())
def test_half_precision_is_near_and_takes_adapters_in_full(preset):
    """A model that is cast with its adapters, and adapters in single precision on such a base."""
    config = asked(preset)
    for name in some(config):
        inputs = inputs_of(name)
        half = {key: v.bfloat16() if v.is_floating_point() else v for key, v in inputs.items()}
        with having(name, config) as (adapters, setup):
            awake(adapters, "a", std=0.1)
            adapters.activate(setup)
            expected = still(adapters.model, inputs)
            twin = copy.deepcopy(adapters.model).bfloat16()
        found = still(twin, half)
        assert found.dtype == torch.bfloat16
        distance = (found.double() - expected).norm() / expected.norm()
        assert distance < 0.05, (name, float(distance))
        for parameter in inarch.attach(twin)["a"].values():
            parameter.data = parameter.data.float()
        found = still(twin, half)
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() / expected.norm() < 0.05, name


@pytest.mark.parametrize("preset", [preset for preset in first_presets() if preset != "mute"])  # it has no weights
def test_gradients_are_those_without_checkpointing(preset):
    config = asked(preset)
    for number, name in enumerate(some(config, CHECKPOINTED)):
        inputs = inputs_of(name)
        with having(name, config) as (adapters, setup):
            adapters.train(setup)
            awake(adapters, "a")
            twin = copy.deepcopy(adapters.model).train()
        expected = gradients(twin, inputs)
        renamed = hasattr(twin, "activation_checkpointing_enable")
        enable = twin.activation_checkpointing_enable if renamed else twin.gradient_checkpointing_enable
        enable({"use_reentrant": bool(number)})
        if preset == "vpt_shallow" and not renamed:  # such a release runs our hooks on layers again, in another order
            with pytest.raises(SetupError, match="release of transformers whose checkpointing leaves hooks outside"):
                gradients(twin, inputs)
            continue
        for key, gradient in gradients(twin, inputs).items():
            assert gradient.abs().sum() > 0, (name, key)
            assert torch.allclose(gradient, expected[key], rtol=1e-8, atol=CLOSE), (name, key)


def gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    found = output(model, inputs)
    (found * torch.linspace(-1, 1, found.shape[1], dtype=found.dtype)).sum().backward()
    return {key: parameter.grad for key, parameter in inarch.attach(model)["a"].items()}


@pytest.mark.parametrize("preset", first_presets())
def test_a_cache_and_padding_change_no_logit(preset):
    """Of all methods but those that see whole sequences, and say so."""
    config = asked(preset)
    if any(claims(config, "sees_whole_sequences")):
        return
    for name in some(config, GENERATORS):
        ids = inputs_of(name)["input_ids"]
        mask = torch.ones_like(ids)
        # An encoder that counts distances between tokens of a row has its padding behind them.
        padding, own = (slice(5, 7), slice(0, 5)) if name == "t5-lm" else (slice(0, 2), slice(2, 7))
        mask[1, padding] = ids[1, padding] = 0
        with having(name, config) as (adapters, setup):
            awake(adapters, "a")
            adapters.activate(setup)
            cached = written(adapters.model, ids, mask)
            assert torch.allclose(cached, written(adapters.model, ids, mask, use_cache=False), atol=CLOSE)
            alone = written(adapters.model, ids[1:, own], mask[1:, own])
            # Older releases take T5's softmax in single precision, which sees how long the row is.
            assert torch.allclose(cached[1:], alone, atol=1e-6 if name == "t5-lm" else CLOSE), name
            adapters.deactivate()
            assert not torch.allclose(cached, written(adapters.model, ids, mask)), name


def written(model, ids, mask, **options):
    """The logits of four tokens for each sequence, (B, 4, V)."""
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("name", ["vit", "llama-lm"])
def test_all_methods_together_are_one_graph(name):
    """One compilation for all of them, each at work: without any one the output would be another."""
    others = [one for one in first_presets() if one not in ("bottleneck", "dynamic_fusion", "mute")]
    others = [one for one in others if name in taken(asked(one))]
    behind = {"convpass": "convpass[prefix_tokens=51]"}  # the grid begins behind the prompts and the class token
    with having(name, asked("bottleneck")) as (adapters, _):
        for preset in others:
            put(adapters, asked(behind.get(preset, preset)), preset)
        block = Fuse("a", put_twin(adapters), name="f")
        adapters.add_fusion(block)
        for one in adapters.names:
            awake(adapters, one, std=0.05)
        adapters.activate(Stack(block, *others))
        torch.compiler.reset()
        compiled = torch.compile(adapters.model, backend="eager", fullgraph=True)
        inputs = inputs_of(name)
        assert torch.allclose(still(compiled, inputs), still(adapters.model, inputs), rtol=0, atol=CLOSE)
        torch.compiler.reset()


def put_twin(adapters):
    adapters.add("twin", asked("bottleneck"))
    return "twin"


def test_the_page_of_methods_is_what_they_say():
    for name, method in methods().items():
        known = docs_methods.described(method)
        assert name == "mute" or (known.equations and "arXiv" in known.papers), name
    assert docs_methods.page() == docs_methods.PAGE.read_text(encoding="utf-8"), "run scripts/docs_methods.py"
