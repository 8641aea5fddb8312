"""Several processes: DistributedDataParallel and FSDP2 give the gradients and the adapter of one process."""

import json
import multiprocessing
import os
import socket

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn

import inarch
from inarch import SiteError, StateError
from inarch.fingerprint import fingerprint
from inarch.testing import tiny, tiny_inputs

CONFIG = "double_seq_bn[original_ln_before=True,scaling=learned]|lora[init_weights=bert]"
CONFIGS = {
    "vit-classifier": CONFIG,
    "bert-classifier": "vera[r=4]|dora[r=2,attn_matrices=[k]]|lora[r=2,attn_matrices=[o],init_weights=pissa]",
    "llama-lm": CONFIG,
}
"""By model; the second keeps frozen values beside those that are trained, and reads the base."""
NAMES = list(CONFIGS)
WAIT = 100
"""Seconds after which something is wrong."""


def trainable(name, dtype=torch.float32):
    """A tiny model with an awake adapter, the same in every process."""
    model = tiny(name).to(dtype)
    adapters = inarch.attach(model)
    torch.manual_seed(1)
    adapters.add("a", CONFIGS[name])
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    adapters.train("a")
    return model, adapters


def loss_of(model, inputs):
    """A mean over the batch, so that the mean of two halves is that of the whole."""
    logits = model(**inputs).logits
    return (logits * torch.linspace(-1, 1, logits.shape[-1])).flatten(1).sum(dim=1).square().mean()


def whole(name, dtype=torch.float32):
    inputs = tiny_inputs(name, batch=4)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def half(name, rank, dtype=torch.float32):
    return {key: value[2 * rank : 2 * rank + 2] for key, value in whole(name, dtype).items()}


def train(model, inputs, steps=3):
    """Some steps of plain gradient descent, which keeps the differences of gradients as they are."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        loss_of(model, inputs).backward()
        optimiser.step()
        optimiser.zero_grad()


def shard(model):
    """One unit for each layer, and one for the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for layer in module:
                fully_shard(layer)
    fully_shard(model)


def in_parallel(rank, folder):
    for name in NAMES:
        model, adapters = trainable(name, torch.float64)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert inarch.attach(wrapped) is adapters
        loss_of(wrapped, half(name, rank, torch.float64)).backward()
        if rank == 0:
            gradients = {key: p.grad for key, p in {**adapters["a"], **adapters.head("a")}.items()}
            torch.save(gradients, folder / f"{name}.pt")


def in_shards(rank, folder):
    for name in NAMES:
        model, adapters = trainable(name)
        shard(model)
        train(model, half(name, rank))
        adapters.save("a", folder / name)  # every process calls it
        adapters.save_setup(folder / f"{name}-setup", "a")
        assert (folder / name / "inarch.json").exists() and (folder / f"{name}-setup/setup.json").exists()
        with torch.no_grad():
            expected = model(**whole(name)).logits
            for parameter in adapters["a"].values():
                parameter.zero_()
        stale = model(**whole(name)).logits
        assert not torch.allclose(stale, expected, atol=1e-3)
    with pytest.raises(SiteError, match=r"got a weight that is spread over processes at .*before `fully_shard` is"):
        adapters.add("b", "seq_bn")
    (folder / "occupied").mkdir(exist_ok=True)
    (folder / "occupied/other.txt").write_text("other")
    with pytest.raises(StateError, match="which holds other.txt"):
        adapters.save("a", folder / "occupied")


def run(work, rank, port, folder):
    """What one process does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        work(rank, folder)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def in_two_processes(work, folder):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # Forked from a process that has imported everything and done nothing; this file is no module that it could import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inarch.testing", "transformers.models.vit.modeling_vit"])
    code = f"import runpy; here = runpy.run_path({__file__!r}); here['run'](here[{work.__name__!r}], *arguments)"
    processes = [context.Process(target=exec, args=(code, {"arguments": (rank, port, folder)})) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT)
    assert [process.exitcode for process in processes] == [0, 0]


def test_gradients_of_data_parallel_processes_are_those_of_one(tmp_path):
    in_two_processes(in_parallel, tmp_path)
    for name in NAMES:
        model, adapters = trainable(name, torch.float64)
        loss_of(model, whole(name, torch.float64)).backward()
        found = torch.load(tmp_path / f"{name}.pt")
        for key, parameter in {**adapters["a"], **adapters.head("a")}.items():
            assert parameter.grad.abs().sum() > 0, (name, key)
            assert torch.allclose(found[key], parameter.grad, rtol=0, atol=1e-6), (name, key)


def test_an_adapter_trained_in_shards_is_the_one_of_one_process(tmp_path):
    in_two_processes(in_shards, tmp_path)
    for name in NAMES:
        model, adapters = trainable(name)
        start = {key: value.detach().clone() for key, value in adapters.tensors("a").items()}
        train(model, whole(name))
        found = load_file(tmp_path / name / "adapter.safetensors")
        own = adapters.tensors("a")
        assert found.keys() == {**own, **adapters.head("a")}.keys()
        for key, value in own.items():
            assert torch.equal(start[key], value) == (key not in adapters["a"]), (name, key)
            assert torch.allclose(found[key], value, rtol=1e-5, atol=1e-6), (name, key)
        other = tiny(name)
        handle = inarch.attach(other)
        record = json.loads((tmp_path / name / "inarch.json").read_text())
        assert record["base"]["fingerprint"] == fingerprint(other, handle.sites, handle.heads)
        handle.activate(handle.load(tmp_path / name))
        with torch.no_grad():
            assert torch.allclose(other(**whole(name)).logits, model(**whole(name)).logits, rtol=1e-4, atol=1e-5)
