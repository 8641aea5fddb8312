"""MTL-LoRA against its equations in float64; tasks share their outer matrices and are told apart by `task_ids`."""

import copy

import pytest
import torch
from little_adapters import EVERY, awake, by_hand, grafted, output
from transformers import BertConfig, BertModel

import inarch
from inarch import MultiTask
from inarch.methods import read_config
from inarch.plan import plan
from inarch.testing import tiny, tiny_inputs


@pytest.mark.parametrize("kind", ["singular_values", "linear"])
def test_mtl_lora_is_a_weighted_sum_of_updates(kind):
    config = (
        f"mtl_lora[r=3,alpha=5,n_up_projection=2,weights_sharpness=0.5,task_specific_matrix_type={kind},"
        f"init_weights=lora,{EVERY}]"
    )
    model = tiny("gpt2").double()
    base = output(model, "gpt2")
    adapters = inarch.attach(model)
    adapters.add("a", config)
    adapters.activate("a")
    assert torch.equal(output(model, "gpt2"), base)
    awake(adapters, "a")
    found = output(model, "gpt2")

    def change(weight, t, _role):
        p = (t["weights"] / 0.5).exp()
        p = p / p.sum()
        task = t["task"].diag() if kind == "singular_values" else t["task"]
        return weight + 5 / 3 * sum(p[i] * t["B"][i] @ task @ t["A"] for i in range(2))

    assert torch.allclose(output(by_hand(model, adapters, "mtl_lora", change), "gpt2"), found, atol=1e-10)
    assert adapters.merge("a") < 1e-9
    assert torch.allclose(output(model, "gpt2"), found, atol=1e-10)


def test_tasks_share_their_outer_matrices_and_train_them_together(tmp_path):
    model, adapters = grafted("bert", a="mtl_lora[r=2,n_up_projection=2]", b="mtl_lora[r=2,n_up_projection=2]")
    key = "text0.0.self_attention.mtl_lora.q"
    adapters.share(["a", "b"])
    assert adapters["a"][f"{key}.A"] is adapters["b"][f"{key}.A"]
    assert adapters["a"][f"{key}.task"] is not adapters["b"][f"{key}.task"]
    adapters.train(MultiTask("a", "b"))
    with torch.no_grad():
        adapters["b"][f"{key}.task"].mul_(3)
    inputs = tiny_inputs("bert")
    rows = [model(**{k: v[i : i + 1] for k, v in inputs.items()}, task_ids=[i]).last_hidden_state for i in (0, 1)]
    for name, row in zip("ab", rows, strict=True):
        with adapters.using(name):
            index = "ab".index(name)
            alone = model(**{k: v[index : index + 1] for k, v in inputs.items()}).last_hidden_state
        assert torch.allclose(row, alone, atol=1e-10)
    (rows[0].square().sum() + rows[1].square().sum()).backward()
    together = adapters["a"][f"{key}.A"].grad.clone()
    model.zero_grad()
    model(**inputs, task_ids=[0, 1]).last_hidden_state.square().sum().backward()
    assert torch.allclose(adapters["a"][f"{key}.A"].grad, together, atol=1e-10)
    twin = inarch.attach(copy.deepcopy(model))
    assert twin["a"][f"{key}.B"] is twin["b"][f"{key}.B"]
    assert sum(1 for name, _ in model.named_parameters() if name.endswith("mtl_lora.q.A")) == 2  # one for each layer
    adapters.save("b", tmp_path / "b")
    adapters.deactivate()
    adapters.load(tmp_path / "b", name="c")
    assert all(torch.equal(value, adapters["b"][key]) for key, value in adapters["c"].items())
    adapters.unshare(["a"])
    with torch.no_grad():
        adapters["a"][f"{key}.A"].zero_()
    assert adapters["b"][f"{key}.A"].abs().sum() > 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "d"], "have one configuration; got `a` .* and `d`"),
        (["a", "e"], "where their method has some for several tasks; got `e` .*Use `mtl_lora`"),
    ],
)
def test_what_cannot_be_shared_is_told(names, message):
    _, adapters = grafted("vit", a="mtl_lora", d="mtl_lora[r=2]", e="lora")
    with pytest.raises(inarch.SetupError, match=message):
        adapters.share(names)


def test_tasks_make_their_matrices_differ():
    """Equal weights would give all matrices B one gradient, so that they would stay one matrix for ever."""
    model = tiny("bert").double()
    adapters = inarch.attach(model)
    for name in "ab":
        adapters.add(name, "mtl_lora[r=2,n_up_projection=3,weights_sharpness=0.5]")
    adapters.share(["a", "b"])
    adapters.train(MultiTask("a", "b"))
    inputs, key = tiny_inputs("bert"), "text0.0.self_attention.mtl_lora.q"
    weights = torch.stack([adapters[name][f"{key}.weights"].detach().clone() for name in "ab"])
    assert len(weights.unique()) == 6
    assert weights.abs().max() <= 3**-0.5
    B = adapters["a"][f"{key}.B"]
    assert not B.any()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(**inputs, task_ids=[0, 1]).last_hidden_state[:, 0, :4].square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert min((B[i] - B[j]).norm() / B.norm() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2
    assert (adapters["a"][f"{key}.weights"] - weights[0]).abs().min() > 0


def test_the_size_of_the_known_model():
    """That of the library `adapters` on BERT-base, 295,128, has a weight for each projection, which with one matrix B
    is always one and gets no gradient."""
    with torch.device("meta"):
        sites = inarch.probe(BertModel(BertConfig()))
    assert plan(sites, {"a": read_config("mtl_lora")}).num_parameters == 295_128 - 24
    expected = 24 * (8 * 768 + 3 * 768 * 8 + 8 + 3)
    assert plan(sites, {"a": read_config("mtl_lora[n_up_projection=3]")}).num_parameters == expected
