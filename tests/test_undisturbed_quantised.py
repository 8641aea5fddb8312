"""A quantised base trains adapters: torchao's and bitsandbytes' integers, on the CPU.

The libraries lie beside the environment, in a folder of their own, since torchao logs as soon as transformers sees it.
The last test runs the others in a process that has this folder on its path.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)  # fmt: skip
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

import inarch
from inarch import SetupError
from inarch.testing import perturb, tiny_inputs

CONFIG = "double_seq_bn[original_ln_before=True]|lora[attn_matrices=[q,k,v,o],intermediate_lora=True,output_lora=True]"

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt:UserWarning",  # bitsandbytes says that it casts
    "ignore:.*:DeprecationWarning:torchao",
)


def torchao_int8(keep):
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)


def bitsandbytes_int8(keep):
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)


def bitsandbytes_nf4(keep):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=keep,
    )


SITE = Path(sys.prefix) / "quantised-site"

KINDS = {torchao_int8: "torchao", bitsandbytes_int8: "bitsandbytes", bitsandbytes_nf4: "bitsandbytes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base in full precision; its width is a block of four-bit codes."""
    where = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32,
            patch_size=8, num_labels=5,
        )  # fmt: skip
        model = ViTForImageClassification(config)
        perturb(model)
        model.save_pretrained(where)
    return where


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def load(request, folder):
    """Loads the base, quantised; without a quantised head unless told."""
    library = KINDS[request.param]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")

    def loaded(keep=("classifier",)):
        options = request.param(list(keep))
        # Not in eval mode: there, bitsandbytes packs four-bit weights in a form that only runs forwards. (No dropout.)
        return AutoModelForImageClassification.from_pretrained(folder, quantization_config=options).train()

    return loaded


@pytest.fixture
def inputs():
    return tiny_inputs("vit-classifier")


@torch.no_grad()
def output(model, inputs):
    return model(**inputs).logits


def test_sites_are_those_of_the_base_in_full_precision(load, folder):
    plain = AutoModelForImageClassification.from_pretrained(folder)
    assert inarch.probe(load()) == inarch.probe(plain)


def test_adapters_train_save_and_load(load, inputs, tmp_path, folder):
    model = load()
    base = output(model, inputs)
    full = output(AutoModelForImageClassification.from_pretrained(folder).eval(), inputs)
    assert 0 < (base - full).abs().max() < 0.2  # it is quantised, and still the same model
    adapters = inarch.attach(model)
    adapters.add("a", CONFIG)
    assert torch.equal(output(model, inputs), base)
    assert {p.dtype for p in adapters["a"].values()} == {torch.float32}
    adapters.train("a")
    codes = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=torch.tensor([1, 3])).loss
        loss.backward()
        assert all(p.grad is not None for p in adapters["a"].values())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for key, parameter in model.named_parameters():
        if key in codes:
            assert torch.equal(_values(parameter), _values(codes[key])), key
    expected = output(model, inputs)
    adapters.save("a", tmp_path / "a")
    other = load()
    handle = inarch.attach(other)
    handle.activate(handle.load(tmp_path / "a"))
    assert torch.equal(output(other, inputs), expected)
    assert torch.equal(output(copy.deepcopy(other), inputs), expected)
    plain = AutoModelForImageClassification.from_pretrained(folder).eval()
    inarch.attach(plain).load(tmp_path / "a")  # the weights that both have agree
    inarch.attach(plain).activate("a")
    assert (output(plain, inputs) - expected).abs().max() < 0.5
    handle.detach()
    with torch.no_grad():
        other.classifier.load_state_dict(plain.classifier.state_dict())
    assert not torch.allclose(output(other, inputs), expected, atol=1e-3)


def _values(tensor):
    return tensor.dequantize() if hasattr(tensor, "qdata") else tensor.detach()


def test_lora_on_a_quantised_projection_is_the_formula(load):
    model = load()
    adapters = inarch.attach(model)
    adapters.add("a", "lora[init_weights=bert,attn_matrices=[q],alpha=4]")
    adapters.activate("a")
    projection, x = model.vit.layers[0].attention.q_proj, torch.randn(2, 5, 64)
    found = projection(x)
    adapters.deactivate()
    A, B = (adapters["a"][f"image0.0.self_attention.lora.q.{key}"] for key in "AB")
    assert torch.allclose(found, projection(x) + x @ A.T @ B.T * 0.5, atol=1e-6)


READING = "dora[r=2,attn_matrices=[q]]|vera[r=4,attn_matrices=[k]]|lora[r=2,attn_matrices=[v],init_weights=pissa]"


def dense(projection):
    """The values of a quantised weight, by its library."""
    weight = projection.weight
    if hasattr(weight, "qdata"):
        return weight.dequantize()
    return dequantize_bnb_weight(weight, getattr(projection, "state", None)).float()


def test_methods_that_read_the_base_read_what_its_codes_mean(load, inputs):
    """They start at the base, bit for bit, and are their formulas on the values that the library gives."""
    model = load()
    base = output(model, inputs)
    adapters = inarch.attach(model)
    adapters.add("a", READING)
    adapters.train("a")
    assert torch.equal(output(model, inputs), base)
    model(**inputs).logits.square().sum().backward()
    assert all(p.grad is not None for p in adapters["a"].values())
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    own = {key.removeprefix("image0.0.self_attention."): value for key, value in adapters.tensors("a").items()}
    attention, x = model.vit.layers[0].attention, torch.randn(2, 5, 64)
    found = [getattr(attention, f"{role}_proj")(x) for role in "qkv"]
    adapters.deactivate()
    q, k, v = (getattr(attention, f"{role}_proj") for role in "qkv")
    with torch.no_grad():
        assert torch.allclose(dense(q), (q(torch.eye(64)) - q.bias).T, atol=1e-5)
    A, B, m = (own[f"dora.q.{leaf}"] for leaf in ("A", "B", "magnitude"))
    factor = m / (dense(q) + 4 * B @ A).norm(dim=1)
    expected = [
        (q(x) - q.bias) * factor + q.bias + 4 * x @ A.T @ B.T * factor,
        k(x) + x @ own["vera.k.A"].T * own["vera.k.d"] @ own["vera.k.B"].T * own["vera.k.b"],
    ]
    A, B, A0, B0 = (own[f"lora.v.{leaf}"] for leaf in ("A", "B", "A0", "B0"))
    expected.append(v(x) + 4 * (x @ A.T @ B.T - x @ A0.T @ B0.T))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    u, s, vh = torch.linalg.svd(dense(v), full_matrices=False)
    assert torch.allclose(4 * B0 @ A0, u[:, :2] * s[:2] @ vh[:2], atol=1e-4)
    with pytest.raises(SetupError, match=r"whole weights in floating point, in memory; got quantised ones at `vit.lay"):
        adapters.merge("a", example_inputs=inputs)


def test_a_quantised_head_is_not_trained_silently(load):
    model = load(keep=())
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SetupError, match=r"A task head is trained in floating point; got quantised weights at `head.c"):
        adapters.train("a")
    assert [p.requires_grad for p in model.parameters()] == before
    adapters.train("a", head=False)


class Images(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 5}


def test_the_plain_trainer_takes_it_only_with_adapters(load, inputs, tmp_path):
    def trainer(model):
        word = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            disable_tqdm=True, save_steps=2, learning_rate=1e-2, **{f"{word}_checkpointing": True},
        )  # fmt: skip
        return Trainer(model, args, train_dataset=Images())

    model = load()
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(model)
    adapters = inarch.attach(model)
    adapters.add("a", CONFIG)
    adapters.train("a")
    start = {key: p.detach().clone() for key, p in adapters["a"].items()}
    trainer(model).train()
    assert all(not torch.equal(start[key], p) for key, p in adapters["a"].items())
    names = json.loads((tmp_path / "checkpoint-2/model.safetensors.index.json").read_text())["weight_map"]
    assert names and not any("inarch" in key for key in names)
    other = load()
    handle = inarch.attach(other)
    handle.activate(handle.load(tmp_path / "checkpoint-2/adapters/a"))
    assert torch.equal(output(other, inputs), output(model, inputs))
    adapters.deactivate()
    adapters.remove("a")
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(model)
    adapters.add("a", CONFIG)
    adapters.detach()
    assert "_hf_peft_config_loaded" not in vars(model)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="the tests above run by themselves")
@pytest.mark.skipif(not SITE.is_dir(), reason=f"needs {SITE}, which `make venv` installs")
def test_the_tests_above_pass_with_the_libraries():
    path = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "18 passed, 1 skipped" in result.stdout
