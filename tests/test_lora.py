"""rsLoRA and PiSSA against their formulas in float64, on every port, and through merging, averages and files."""

import math

import pytest
import torch
from little_adapters import EVERY, awake, by_hand, grafted, output, rows_of
from torch import nn
from transformers import LongformerConfig, LongformerModel

import inarch
from inarch.testing import tiny


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_rslora_is_scaled_by_the_root_of_its_rank(name):
    """Kalajdzievski 2023, theorem 3.2: alpha / sqrt(r), of each rank."""
    config = f"lora[r=3,alpha=5,use_rslora=True,{EVERY},rank_pattern={{'*.q':7}},alpha_pattern={{'*.v':2}}]"
    model, adapters = grafted(name, a=config)
    adapters.activate("a")
    found = output(model, name)
    scales = {key.split(".")[4]: 5 / math.sqrt(3) for key in adapters["a"]} | {
        "q": 5 / math.sqrt(7),
        "v": 2 / math.sqrt(3),
    }
    for role, scale in scales.items():
        module = next(m for key, m in model.named_modules() if key.endswith(f".a.lora.{role}"))
        assert module.scaling == pytest.approx(scale)
    twin = by_hand(model, adapters, "lora", lambda w, t, role: w + scales[role] * t["B"] @ t["A"])
    assert torch.allclose(output(twin, name), found, atol=1e-10)
    assert adapters.merge("a") < 1e-9
    assert torch.allclose(output(model, name), found, atol=1e-10)


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_pissa_starts_at_the_base_and_trains_its_principal_part(name, tmp_path):
    """Meng et al. 2024, section 3: A = S_r^1/2 V_r^T, B = U_r S_r^1/2, beside the residual."""
    model = tiny(name).double()
    base = output(model, name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    adapters = inarch.attach(model)
    adapters.add("a", f"lora[r=3,alpha=6,init_weights=pissa,{EVERY}]")
    adapters.activate("a")
    assert torch.equal(output(model, name), base)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    start = {key: tensor.detach().clone() for key, tensor in adapters.tensors("a").items()}
    for key in [key for key in start if key.endswith(".A")]:
        site = adapters.sites[key.split(".lora.")[0]]
        view, rows = rows_of(model, site, site.projections[key.split(".")[-2]][0])
        u, s, vh = torch.linalg.svd(view[rows].detach(), full_matrices=False)
        A, B = start[key], start[f"{key[:-1]}B"]
        assert torch.allclose(2 * B @ A, u[:, :3] @ s[:3].diag() @ vh[:3], atol=1e-10)
        assert torch.allclose(A @ A.T, (s[:3] / 2).diag(), atol=1e-10)  # half of each singular value in each factor
        assert torch.equal(start[f"{key}0"], A)
    awake(adapters, "a")
    found = output(model, name)
    assert all(torch.equal(t, start[k]) for k, t in adapters.tensors("a").items() if k.endswith("0"))

    def residual(weight, t, _role):
        return (weight - 2 * t["B0"] @ t["A0"]) + 2 * t["B"] @ t["A"]

    assert torch.allclose(output(by_hand(model, adapters, "lora", residual), name), found, atol=1e-10)
    adapters.save("a", tmp_path / "a")
    adapters.deactivate()
    adapters.load(tmp_path / "a", name="b")
    adapters.activate("b")
    assert torch.equal(output(model, name), found)
    assert adapters.merge("a") < 1e-9
    assert torch.allclose(output(model, name), found, atol=1e-10)
    adapters.unmerge()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_only_the_trained_factors_of_pissa_are_parameters():
    model, adapters = grafted("vit", a="lora[r=2,init_weights=pissa]")
    adapters.train("a")
    assert {key.rpartition(".")[2] for key in adapters["a"]} == {"A", "B"}
    assert {key.rpartition(".")[2] for key in adapters.tensors("a")} == {"A", "B", "A0", "B0"}
    assert not any(tensor.requires_grad for key, tensor in adapters.tensors("a").items() if key.endswith("0"))
    assert model.state_dict().keys() >= {key for key, _ in model.named_buffers() if key.endswith("A0")}


def test_pissa_reads_a_weight_that_its_module_applies_itself():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).double().eval()
    x = torch.randn(2, 5, 16).double()
    base = model(x)
    adapters = inarch.attach(model, example_inputs=x)
    adapters.add("a", f"lora[r=3,init_weights=pissa,{EVERY}]")
    adapters.activate("a")
    assert torch.allclose(model(x), base, atol=1e-12)
    q = adapters["a"]["data0.0.self_attention.lora.q.A"]
    weight = model.layers[0].self_attn._parameters["in_proj_weight"][:16]
    s = torch.linalg.svdvals(weight.detach())[:3]
    assert torch.allclose((q @ q.T).diagonal(), s * 3 / 8, atol=1e-10)


def test_gates_and_pissa_exclude_each_other():
    with pytest.raises(inarch.ConfigError, match="PiSSA splits the base by a fixed scale; got .*`use_gating=True`"):
        inarch.attach(tiny("vit")).add("a", "lora[init_weights=pissa,use_gating=True]")


def updates(adapters, name, scale):
    tensors = adapters.tensors(name)
    found = {}
    for key in [key for key in tensors if key.endswith(".A")]:
        product = tensors[f"{key[:-1]}B"] @ tensors[key]
        if f"{key}0" in tensors:
            product = product - tensors[f"{key[:-1]}B0"] @ tensors[f"{key}0"]
        found[key] = (scale * product).detach()
    return found


def dense(combine, a, b):
    """The rule of an average with weights 1 and 3, number by number, of two whole updates or biases."""
    pairs = [(0.25, a.flatten().tolist()), (0.75, b.flatten().tolist())]
    if combine != "ties":
        return sum(weight * update for weight, update in zip((0.25, 0.75), (a, b), strict=True))
    kept = []
    for weight, values in pairs:
        largest = set(sorted(range(len(values)), key=lambda i: -abs(values[i]))[: round(0.4 * len(values))])
        kept.append((weight, [value if i in largest else 0.0 for i, value in enumerate(values)]))
    found = []
    for numbers in zip(*(values for _, values in kept), strict=True):
        sign = math.copysign(1, sum(weight * x for (weight, _), x in zip(kept, numbers, strict=True)))
        agree = [(weight, x) for (weight, _), x in zip(kept, numbers, strict=True) if x * sign > 0]
        found.append(sum(weight * x for weight, x in agree) / sum(weight for weight, _ in agree) if agree else 0.0)
    return torch.tensor(found, dtype=a.dtype).view_as(a)


@pytest.mark.parametrize(
    ("combine", "options"),
    [
        ("cat", {}),
        ("svd", {"rank": 32}),
        ("ties", {"rank": 32, "density": 0.4}),
        ("dare", {"rank": 32, "density": 1.0}),
    ],
)
def test_sums_of_updates_know_scales_splits_and_biases(combine, options):
    """What PEFT's `add_weighted_adapter` gets wrong: alpha / sqrt(r), learned biases, other starts."""
    model, adapters = grafted(
        "vit",
        a="lora[r=4,alpha=6,use_rslora=True,bias=True]",
        b="lora[r=2,alpha=3,init_weights=pissa,bias=True]",
    )
    assert adapters.average("m", ["a", "b"], [1, 3], combine=combine, **options) < 1e-8
    a, b, m = updates(adapters, "a", 3), updates(adapters, "b", 1.5), updates(adapters, "m", 1)
    assert all(torch.allclose(m[key], dense(combine, a[key], b[key]), atol=1e-8) for key in a)
    biases = [key for key in adapters["m"] if key.endswith("bias")]
    assert biases
    for key in biases:
        assert torch.allclose(adapters["m"][key], dense(combine, adapters["a"][key], adapters["b"][key]))
    adapters.activate("m")
    outputs = output(model, "vit")
    adapters.merge("m")
    assert torch.allclose(output(model, "vit"), outputs, atol=1e-10)


def test_linear_averages_of_other_starts_and_scales_are_refused():
    _, adapters = grafted("vit", a="lora[init_weights=pissa]", b="lora", c="lora[use_rslora=True]")
    with pytest.raises(inarch.SetupError, match="differ in `init_weights`. Sum their updates, with `svd`"):
        adapters.average("m", ["a", "b"])
    with pytest.raises(inarch.SetupError, match="differ in `use_rslora`. Sum their updates, with `svd`"):
        adapters.average("m", ["b", "c"])
    adapters.add("d", "lora[init_weights=pissa]")
    adapters.average("m", ["a", "d"])
    with torch.no_grad():
        next(t for k, t in adapters.tensors("d").items() if k.endswith("A0")).add_(1)
    with pytest.raises(
        inarch.SetupError, match=r"keep the same values frozen; got `a` and `d`, which differ in `.*A0`"
    ):
        adapters.average("m", ["a", "d"], overwrite=True)


@pytest.mark.parametrize("config", ["lora[use_gating=True]", "ia3[use_gating=True]"])
def test_a_gate_of_a_projection_whose_samples_may_lie_elsewhere_is_refused(config):
    """Longformer computes q, k and v of (L, B, D); a mean over the other dimension would mix samples."""
    settings = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = LongformerModel(LongformerConfig(vocab_size=16, attention_window=4, **settings)).eval()
    tokens = {"input_ids": torch.arange(4, 12).reshape(2, 4)}
    adapters = inarch.attach(model, example_inputs=tokens)
    adapters.add("a", config)
    adapters.activate("a")
    message = r"mean over the tokens of a sample.*got a transposed tensor of shape \(4, 2, 8\) .*`use_gating=False`"
    with pytest.raises(inarch.SiteError, match=message):
        model(**tokens)
    adapters.add("b", config.partition("[")[0])
    adapters.activate("b")
    model(**tokens)
