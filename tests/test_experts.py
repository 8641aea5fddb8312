"""LoRA on experts that a module holds in one parameter: each expert's weight changes by its own update."""

import copy

import pytest
import torch
import transformers
from little_adapters import awake
from torch import nn

import inarch
from inarch.sites.experts import find_experts
from inarch.testing import perturb

SMALL = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 99,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
}  # fmt: skip
MODELS = {
    "Mixtral": SMALL,
    "Qwen3Moe": SMALL | {"num_experts": 4, "moe_intermediate_size": 16},
    "GptOss": SMALL,
    "DeepseekV3": SMALL | LATENT | {"num_key_value_heads": 4, "head_dim": 4},
}


def made(name):
    config = getattr(transformers, f"{name}Config")(**MODELS[name], pad_token_id=0)
    model = getattr(transformers, f"{name}Model")._from_config(config, experts_implementation="eager").double().eval()
    perturb(model)
    return model


@torch.no_grad()
def output(model):
    return model(torch.arange(3, 17).reshape(2, 7)).last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_every_expert_has_an_update_of_its_own(name, tmp_path):
    torch.manual_seed(0)
    model = made(name)
    base = output(model)
    adapters = inarch.attach(model)
    adapters.add("a", "lora[selfattn_lora=False,experts_lora=True,r=3,alpha=5]")
    adapters.activate("a")
    assert torch.equal(output(model), base)
    awake(adapters, "a")
    found = output(model)
    assert not torch.allclose(found, base, atol=1e-3)
    twin = copy.deepcopy(model)
    inarch.attach(twin).detach()
    keys = [key for key in adapters["a"] if key.endswith(".A")]
    assert {key.split(".")[-2] for key in keys} == {"expert_up", "expert_down"}
    with torch.no_grad():
        for key in keys:
            A, B = adapters["a"][key], adapters["a"][f"{key[:-1]}B"]
            assert len(A) == len(B) == 4
            experts = twin.layers[int(key.split(".")[1])].mlp.experts
            weight = experts.gate_up_proj if "expert_up" in key else experts.down_proj
            for number in range(4):
                update = 5 / 3 * B[number] @ A[number]
                weight[number] += update.T if name == "GptOss" else update
    assert torch.allclose(output(twin), found, atol=1e-10)
    assert adapters.merge("a") < 1e-9
    assert torch.allclose(output(model), found, atol=1e-10)
    adapters.unmerge()
    adapters.save("a", tmp_path / "a")
    adapters.load(tmp_path / "a", name="b")
    assert adapters.average("m", ["a", "b"], combine="svd", rank=6) < 1e-9
    assert adapters.average("n", ["a", "b"], combine="cat") < 1e-9
    adapters.activate("n")
    assert torch.allclose(output(model), found, atol=1e-9)
    adapters.add("p", "lora[selfattn_lora=False,experts_lora=True,r=3,init_weights=pissa]")
    adapters.activate("p")
    assert torch.allclose(output(model), base, atol=1e-12)
    adapters.train("p")
    model(torch.arange(3, 17).reshape(2, 7)).last_hidden_state.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapters["p"].values())
    layout = adapters.sites.to_dict()
    assert inarch.probe(made(name), layout=layout).sites == adapters.sites.sites


def held(up, down):
    module = nn.Module()
    module.first, module.second = nn.Parameter(torch.empty(up)), nn.Parameter(torch.empty(down))
    return module


@pytest.mark.parametrize(
    ("up", "down", "is_told"),
    [
        ((4, 48, 32), (4, 32, 24), True),
        ((4, 32, 48), (4, 24, 32), True),
        ((4, 24, 32), (4, 32, 24), False),  # an up-projection, or a down-projection stored the other way round
        ((4, 32, 32), (4, 32, 32), False),
        ((4, 48, 32), (5, 32, 24), False),
        ((4, 48, 16), (4, 16, 24), False),
    ],
)
def test_experts_are_read_where_their_shapes_leave_no_doubt(up, down, is_told):
    assert bool(find_experts(held(up, down), "experts", 32)) == is_told


def test_a_model_without_such_experts_says_what_it_has():
    from inarch.testing import tiny

    with pytest.raises(inarch.ConfigError, match="got `expert_up`, `expert_down` from `experts_lora` for ViTModel"):
        inarch.attach(tiny("vit")).add("a", "lora[experts_lora=True]")
    model = made("Mixtral")
    adapters = inarch.attach(model)
    with pytest.raises(
        inarch.ConfigError, match=r"got `dropout=0.1`.*for `expert_up` of `text0.0.mlp`, which is `gate"
    ):
        adapters.add("a", "lora[experts_lora=True,dropout=0.1]")
