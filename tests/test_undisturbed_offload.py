"""A base that accelerate keeps on the disk between forwards: its adapters are in memory, and train."""

import pytest
import torch
from accelerate import disk_offload, dispatch_model

import inarch
from inarch import SetupError, SiteError, StateError
from inarch.core.errors import ConfigError
from inarch.methods import methods
from inarch.testing import tiny, tiny_inputs

CONFIG = "double_seq_bn[original_ln_before=True,scaling=learned]|lora[init_weights=bert]"
PLACES = {"vit.embeddings": "cpu", "vit.layers.0": "cpu", "vit.layers.1": "disk", "vit.layernorm": "cpu"}

VECTORS = "bitfit|layernorm_tuning|ia3[attn_matrices=[k,v],input_matrices=[k]]|prefix_tuning"
EXPERTS = "lora[selfattn_lora=False,experts_lora=True,init_weights=bert,init_weights_seed=1]"
CONFIGS = [next(iter(method.presets)) for name, method in methods().items() if name != "fusion"]
CONFIGS[CONFIGS.index("mute")] = "mute[roles=[mlp]]"
CONFIGS += ["compacter[reduction_factor=4]", "unipelt", "ia3[attn_matrices=[k,v],input_matrices=[k]]"]

pytestmark = pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")


@pytest.fixture
def offload(tmp_path):
    """Keeps the second of two layers on the disk, and the head in memory unless told."""

    def offloaded(model, head="cpu"):
        places = PLACES | {"classifier": head}
        return dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "offload"), force_hooks=True)

    return offloaded


def base():
    return tiny("vit-classifier")


def output(model):
    with torch.no_grad():
        return model(**tiny_inputs("vit-classifier")).logits


def gradients(model, adapters):
    model(**tiny_inputs("vit-classifier"), labels=torch.tensor([1, 2])).loss.backward()
    return {key: p.grad for key, p in adapters["a"].items()}


@pytest.mark.parametrize("config", [CONFIG, VECTORS])
def test_an_adapter_of_an_offloaded_base_trains_as_one_of_a_base_in_memory(offload, tmp_path, config):
    model, plain = offload(base()), base()
    assert model.vit.layers[1].mlp.fc1.weight.is_meta
    adapters, handle = inarch.attach(model), inarch.attach(plain)
    assert adapters.sites == handle.sites
    assert torch.equal(output(model), output(plain))
    adapters.add("a", config)
    assert {(p.device.type, p.dtype) for p in adapters["a"].values()} == {("cpu", torch.float32)}
    adapters.train("a")
    adapters.save("a", tmp_path / "a")
    handle.load(tmp_path / "a")
    handle.train("a")
    assert torch.equal(output(model), output(plain))
    found, expected = gradients(model, adapters), gradients(plain, handle)
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())
    assert model.vit.layers[1].mlp.fc1.weight.is_meta
    assert [p.requires_grad for p in model.vit.layers.parameters()].count(True) == len(adapters["a"])
    adapters.detach()
    assert torch.equal(output(model), output(base()))


def test_an_adapter_that_was_offloaded_with_its_base_runs_and_is_not_trained_silently(offload, tmp_path):
    model = base()
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn[scaling=learned]|lora[init_weights=bert]")
    adapters.save("a", tmp_path / "a")
    adapters.activate("a")
    expected = output(model)
    model = offload(model)
    assert torch.equal(output(model), expected)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SetupError, match=r"What is trained stays in memory; got offloaded weights at `image0\.1\."):
        adapters.train("a")
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(StateError, match=r"saved from memory; got \d+ tensors without values, first `image0\.1\."):
        adapters.save("a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    adapters.load(tmp_path / "a", overwrite=True)
    assert torch.equal(output(model), expected)
    adapters.train("a")
    assert all(gradient is not None for gradient in gradients(model, adapters).values())


def attached(config):
    """A tiny model that has a place for a configuration, with an adapter of it that does something, active."""
    for name in ("vit", "llama-lm"):
        model = tiny(name)
        adapters = inarch.attach(model)
        try:
            adapters.add("a", config, unsound="allow" if "mute" in config else "refuse")
        except ConfigError:  # it has no place in this one
            continue
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in adapters["a"].values():
                torch.nn.init.normal_(parameter, std=0.1)
        adapters.activate("a")
        return model, adapters, tiny_inputs(name)
    raise AssertionError(config)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_method_runs_where_it_was_offloaded_with_its_base(tmp_path, config):
    model, adapters, inputs = attached(config)
    with torch.no_grad():
        expected = model(**inputs)[0]
    disk_offload(model, str(tmp_path), execution_device="cpu", offload_buffers=True)
    assert all(parameter.is_meta for parameter in adapters["a"].values())
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected)
    if adapters["a"]:
        with pytest.raises(SetupError, match=r"What is trained stays in memory; got offloaded weights at `"):
            adapters.train("a")


def test_a_base_that_is_offloaded_whole_is_no_base_without_weights(tmp_path):
    model, plain = tiny("llama-lm"), tiny("llama-lm")
    disk_offload(model, str(tmp_path), execution_device="cpu")
    outputs = []
    for one in (model, plain):
        adapters = inarch.attach(one)
        adapters.add("a", "prompt_tuning[prompt_init=from_tokens,prompt_init_ids=[1,2,3]]|layernorm_tuning")
        adapters.train("a")
        assert {parameter.device.type for parameter in adapters["a"].values()} == {"cpu"}
        outputs.append(one(**tiny_inputs("llama-lm"))[0])
    assert torch.equal(*outputs)


def test_experts_of_an_offloaded_base_are_adapted(tmp_path):
    """Their module applies its parameters itself: the adapted ones stand before those that are brought in."""
    model, plain = tiny("mixtral-lm"), tiny("mixtral-lm")
    disk_offload(model, str(tmp_path), execution_device="cpu")
    outputs = []
    for one in (model, plain):
        adapters = inarch.attach(one)
        adapters.add("a", EXPERTS)
        adapters.activate("a")
        with torch.no_grad():
            outputs.append(one(**tiny_inputs("mixtral-lm"))[0])
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], tiny("mixtral-lm")(**tiny_inputs("mixtral-lm"))[0])


def test_an_offloaded_head_is_not_trained_silently(offload):
    adapters = inarch.attach(offload(base(), head="disk"))
    adapters.add("a", CONFIG)
    with pytest.raises(SetupError, match=r"got offloaded weights at `head\.classifier\.weight`.*or pass `head=False`"):
        adapters.train("a")
    adapters.train("a", head=False)


def test_weights_on_the_meta_device_for_no_known_reason_get_no_adapter():
    model = base()
    adapters = inarch.attach(model)
    model.vit.layers[1].to("meta")
    with pytest.raises(SiteError, match=r"got a weight that is on the meta device at `image0\.1\.mlp`"):
        adapters.add("a", "seq_bn")
    assert adapters.names == ()
