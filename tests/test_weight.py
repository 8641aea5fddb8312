"""The port for weights that a module applies itself: LoRA on `nn.MultiheadAttention` is a change of its weights."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import inarch
from inarch.attach import modules_at, slot_of
from inarch.core.errors import ConfigError, SiteError
from inarch.fingerprint import fingerprint

WIDTH, HEADS = 16, 2
EVERY_ROLE = "lora[r=3,alpha=5,attn_matrices=[q,k,v,o],init_weights=bert,init_weights_seed=1]"


class CLIPBlock(nn.Module):
    """The residual block of CLIP as open_clip writes it, on torch's attention; (L, B, D) or (B, L, D)."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def attention(self, x):
        return self.attn(x, x, x, need_weights=False)[0]

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TwiceAttention(nn.MultiheadAttention):
    def forward(self, x, again=True):
        q = self(x, again=False) if again else x
        return super().forward(q, x, x, need_weights=False)[0]


class RecursiveBlock(nn.Module):
    """An attention that calls itself for its queries."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), TwiceAttention(WIDTH, HEADS, batch_first=True)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return x + self.drop(self.attn(self.norm(x)))


class Lookup(nn.Module):
    """Cross-attention to keys and values of other widths, whose three weights are separate parameters."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=4, bias=False, batch_first=True)

    def forward(self, x, keys, values):
        return x + self.attn(self.norm(x), keys, values)[0]


class Functional(nn.Module):
    """An attention that applies its weights by `F.linear`, one of them stored as (in, out) and applied by `@`."""

    def __init__(self):
        super().__init__()
        self.qk = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 4)
        self.v = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k = nn.functional.linear(x, self.qk).chunk(2, dim=-1)
        h = nn.functional.scaled_dot_product_attention(q, k, x @ self.v)
        return nn.functional.linear(h, self.out.weight, self.out.bias)


class FunctionalBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Functional()

    def forward(self, x):
        return x + self.attn(self.norm(x))


MODELS = {
    "fused": (lambda: nn.Sequential(CLIPBlock(), CLIPBlock()), lambda: (torch.randn(3, 5, WIDTH),)),
    "sequence first": (lambda: nn.Sequential(CLIPBlock(False), CLIPBlock(False)), lambda: (torch.randn(5, 3, WIDTH),)),
    "separate": (Lookup, lambda: (torch.randn(3, 5, WIDTH), torch.randn(3, 7, 6), torch.randn(3, 7, 4))),
    "functional": (
        lambda: nn.Sequential(FunctionalBlock(), FunctionalBlock()),
        lambda: (torch.randn(3, 5, WIDTH),),
    ),
    "recursive": (lambda: nn.Sequential(RecursiveBlock(), RecursiveBlock()), lambda: (torch.randn(3, 5, WIDTH),)),
}  # fmt: skip


def attached(name, config=EVERY_ROLE):
    """A model in float64 with an adapter `a` that is not active, and its inputs."""
    make, inputs = MODELS[name]
    model = make().double().eval()
    args = tuple(x.double() for x in inputs())
    adapters = inarch.attach(model, example_inputs=args)
    adapters.add("a", config)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapters["a"].values():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model, args, adapters


def merged(model, adapters):
    """A copy of the base model with the updates added to its weights by hand (Hu et al. 2021, section 4.1)."""
    twin = copy.deepcopy(model)
    inarch.attach(twin).detach()
    with torch.no_grad():
        for site in adapters.sites:
            for role, (projection,) in site.projections.items():
                if role not in "qkvo":
                    continue
                update = adapters["a"][f"{site.key}.lora.{role}.B"] @ adapters["a"][f"{site.key}.lora.{role}.A"]
                weight = twin.get_submodule(site.absolute(projection.path)).get_parameter(projection.weight)
                (start, stop), *_ = projection.rows or [(0, projection.out_features)]
                (weight.T if projection.transposed else weight)[start:stop] += update * 5 / 3
    return twin


@pytest.mark.parametrize("name", list(MODELS)[:4])
def test_lora_equals_the_change_of_the_weight(name):
    """Output and gradients against the formula, in float64; the model itself keeps its parameters."""
    model, args, adapters = attached(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    base = model(*args)
    adapters.train("a")
    found = model(*args)
    assert torch.allclose(found, merged(model, adapters)(*args), atol=1e-12, rtol=0)
    assert not torch.allclose(found, base, atol=1e-3)
    with torch.no_grad():  # where torch would take its fused inference
        assert torch.allclose(model(*args), found, atol=1e-12, rtol=0)
    found.square().sum().backward()
    twin = merged(model, adapters)
    twin.requires_grad_(True)
    twin(*args).square().sum().backward()
    for site in adapters.sites:
        for role, (projection,) in site.projections.items():
            if role not in "qkvo":
                continue
            weight = twin.get_submodule(site.absolute(projection.path)).get_parameter(projection.weight)
            (start, stop), *_ = projection.rows or [(0, projection.out_features)]
            gradient = (weight.grad.T if projection.transposed else weight.grad)[start:stop] * 5 / 3
            A, B = (adapters["a"][f"{site.key}.lora.{role}.{letter}"] for letter in "AB")
            assert torch.allclose(A.grad, B.T @ gradient, atol=1e-10)
            assert torch.allclose(B.grad, gradient @ A.T, atol=1e-10)
    assert all(parameter.grad is None for key, parameter in model.named_parameters() if ".inarch." not in f".{key}")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    adapters.detach()
    assert torch.equal(model(*args), base)
    assert list(model.state_dict()) == [key for key in before if "inarch" not in key]


@pytest.mark.parametrize("name", list(MODELS)[:4])
def test_an_adapter_of_weights_is_saved_and_loaded(name, tmp_path):
    model, args, adapters = attached(name)
    adapters.activate("a")
    expected = model(*args)
    adapters.save("a", tmp_path / "a")
    adapters.deactivate()
    adapters.load(tmp_path / "a", name="b")
    adapters.activate("b")
    assert torch.equal(model(*args), expected)
    adapters.activate(inarch.Stack("a", "b"))  # the updates add up
    doubled = model(*args)
    for parameter in [p for key, p in adapters["a"].items() if key.endswith(".B")]:
        parameter.data *= 2
    adapters.activate("a")
    assert torch.allclose(model(*args), doubled, atol=1e-12)


def test_one_graph_is_compiled_and_follows_a_change_of_adapters():
    model, args, adapters = attached("fused")
    base = model(*args)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(*args), base)
    adapters.train("a")
    expected = model(*args)
    found = compiled(*args)
    assert torch.allclose(found, expected, atol=1e-12)
    found.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters["a"].values())
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(*args), found)
    adapters.deactivate()
    assert torch.allclose(compiled(*args), base)


def test_checkpointing_copies_pickles_and_autocast():
    """What computes the forward again, or elsewhere, reads the effective weights too."""
    model, args, adapters = attached("fused")
    adapters.train("a")
    expected = model(*args)
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in adapters["a"].values()]
    for reentrant in (True, False):
        model.zero_grad(set_to_none=True)
        x = args[0].clone().requires_grad_()
        for block in model:
            x = checkpoint(block, x, use_reentrant=reentrant)
        x.sum().backward()
        assert all(torch.allclose(p.grad, g) for p, g in zip(adapters["a"].values(), gradients, strict=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*args), expected)
        inarch.attach(twin)["a"]["data0.0.self_attention.lora.q.A"].data.zero_()
        assert not torch.equal(twin(*args), expected)
    assert torch.equal(model(*args), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model.float()(args[0].float()), expected.float(), atol=0.3)


def test_an_exception_in_the_forward_leaves_nothing_behind():
    model, (x,), adapters = attached("fused")
    adapters.activate("a")
    expected = model(x)
    with pytest.raises(AssertionError, match="key shape"):
        model[0].attn(x, x[:, :2], x[:, :3])
    assert "in_proj_weight" not in vars(model[0].attn)
    assert "weight" not in vars(model[0].attn.out_proj)
    assert torch.equal(model(x), expected)


def test_an_interrupted_forward_leaves_nothing_behind_either():
    """Ctrl-C passes by every hook; the weights of the base are back when the adapter is not active any more."""
    model, (x,), adapters = attached("fused")
    base = model(x)
    adapters.activate("a")
    expected = model(x)
    known = fingerprint(model, adapters.sites)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model[0].attn.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    assert "in_proj_weight" in vars(model[0].attn)
    assert torch.equal(model(x), expected)
    assert fingerprint(model, adapters.sites) == known
    adapters.deactivate()
    assert torch.equal(model(x), base)
    assert not {"in_proj_weight", "weight"} & (vars(model[0].attn).keys() | vars(model[0].attn.out_proj).keys())


def test_threads_have_graphs_of_their_own():
    """A forward without gradients beside a training step takes no gradient from it."""
    model, (x,), adapters = attached("fused")
    adapters.train("a")
    model(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in adapters["a"].values()]
    stop, failures = threading.Event(), []

    def infer():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    model(x)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=infer)
    thread.start()
    try:
        for _ in range(40):
            model.zero_grad(set_to_none=True)
            model(x).sum().backward()
            assert all(torch.equal(p.grad, g) for p, g in zip(adapters["a"].values(), expected, strict=True))
    finally:
        stop.set()
        thread.join()
    assert failures == []


def test_an_attention_that_calls_itself_reads_the_same_weights():
    """The inner call takes away what it put there, not what the outer one did."""
    model, args, adapters = attached("recursive")
    adapters.activate("a")
    assert torch.allclose(model(*args), merged(model, adapters)(*args), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("setting", "obstacle"),
    [
        ("dropout=0.1", r"`dropout=0\.1`, which acts on the input"),
        ("use_gating=True", r"`use_gating=True`, which reads"),
    ],
)
def test_what_needs_the_input_of_a_weight_is_refused_by_name(setting, obstacle):
    _, _, adapters = attached("fused")
    with pytest.raises(
        ConfigError,
        match=rf"only the weight can be changed; got {obstacle}.*`q` of `data0.0.self_attention`, which is "
        r"`in_proj_weight` of `0.attn` \(CLIPBlock\). Change that setting",
    ):
        adapters.add("b", f"lora[{setting}]")
    adapters.add("b", f"lora[{setting},selfattn_lora=False,output_lora=True]")  # the MLP is of linear modules


def test_offloaded_weights_are_refused_in_the_forward():
    model, args, adapters = attached("fused")
    adapters.activate("a")
    model[1].attn.in_proj_weight = nn.Parameter(model[1].attn.in_proj_weight.to("meta"))
    with pytest.raises(SiteError, match=r"on `meta` for an adapter on `cpu` at `in_proj_weight` of `1.attn`"):
        model(*args)


def test_a_layout_names_the_weight():
    """What the probe writes is read back; a wrong name or shape is told."""
    model, args, adapters = attached("fused")
    layout = adapters.sites.to_dict()
    adapters.detach()
    assert inarch.probe(model, layout=layout).sites == inarch.probe(model, example_inputs=args).sites
    q = layout["sites"][0]["projections"]["q"][0]
    q["weight"] = "in_proj_wait"
    with pytest.raises(SiteError, match=r"`weight` of `projections.q` names a matrix .* got `in_proj_wait` at data0.0"):
        inarch.probe(model, layout=layout)
    q |= {"weight": "in_proj_weight", "in_features": 7}
    with pytest.raises(SiteError, match=r"`projections.q` has the features of its module; got .*7, 48, False"):
        inarch.probe(model, layout=layout)


def test_the_scale_of_an_update_survives_inductor():
    """On two dimensions it makes one operator of the product and the sum; `aot_eager` does not."""
    model, _, adapters = attached("fused")
    lora = modules_at(slot_of(model, adapters.sites["data0.0.self_attention"]), "a").find("lora.q")
    assert lora.scaling == pytest.approx(5 / 3)
    x, y, weight = (torch.randn(4, WIDTH, dtype=torch.float64) for _ in range(3))

    def run(x, y, weight):
        return lora(x, y), lora.effective(weight)

    expected = x @ (lora.B @ lora.A).T * 5 / 3 + y, weight + (lora.B @ lora.A)[:4] * 5 / 3
    with torch.no_grad():
        found = torch.compile(run, fullgraph=True)(x, y, torch.cat([weight] * 4))
    assert torch.allclose(found[0], expected[0])
    assert torch.allclose(found[1][:4], expected[1])
