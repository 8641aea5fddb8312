"""Models that no library wrote: odd spellings of a Transformer, and code that comes with its weights."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import inarch
from inarch.core.errors import SiteError
from inarch.sites import ProbeError

WIDTH, HEADS, INNER = 16, 2, 24
EVERYTHING = "double_seq_bn[original_ln_before=True]|lora[attn_matrices=[q,k,v,o],init_weights=bert,output_lora=True]"


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class FunctionalAttention(nn.Module):
    """Every weight is a parameter, every operator a function."""

    def __init__(self):
        super().__init__()
        self.w_qkv, self.w_out = (nn.Parameter(torch.randn(n * WIDTH, WIDTH) / 4) for n in (3, 1))
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        x = F.layer_norm(x, (WIDTH,), self.scale, self.shift)
        q, k, v = F.linear(x, self.w_qkv).chunk(3, dim=-1)
        weights = (heads(q) @ heads(k).transpose(-1, -2) / 4).softmax(dim=-1)
        return F.linear((weights @ heads(v)).transpose(1, 2).flatten(2), self.w_out)


class FunctionalMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_up, self.w_down = (
            nn.Parameter(torch.randn(INNER, WIDTH) / 4),
            nn.Parameter(torch.randn(WIDTH, INNER) / 4),
        )

    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self.w_up)), self.w_down)


class FunctionalModel(nn.Module):
    """Blocks in a plain loop over attributes, named and without a list; adds in place."""

    def __init__(self):
        super().__init__()
        for number in range(3):
            self.add_module(f"attention_{number}", FunctionalAttention())
            self.add_module(f"mlp_{number}", FunctionalMLP())

    def forward(self, x):
        for number in range(3):
            for part in ("attention", "mlp"):
                h = getattr(self, f"{part}_{number}")(x)
                h += x
                x = h
        return x


class Attention(nn.Module):
    """Returns a tuple, as those do that can show their weights."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, *, hidden, mask=None):
        q, k, v = (heads(part(hidden)) for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.o(h), None, {"weights": None}


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))


class KeywordBlock(nn.Module):
    """Takes the stream by keyword, returns it in a dict."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.attention, self.norm_2, self.mlp = (
            nn.LayerNorm(WIDTH),
            Attention(),
            nn.LayerNorm(WIDTH),
            MLP(),
        )

    def forward(self, *, hidden):
        attended, *_ = self.attention(hidden=self.norm_1(hidden))
        hidden = torch.add(attended, hidden)
        return {"hidden": self.mlp(self.norm_2(hidden)).add_(hidden)}


class KeywordModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({name: KeywordBlock() for name in ("first", "second", "third")})

    def forward(self, x):
        for block in self.blocks.values():
            x = block(hidden=x)["hidden"]
        return (x,)


class ParallelBlock(nn.Module):
    """Attention and MLP beside each other, under learned scales."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), Attention(), MLP()
        self.alpha, self.beta = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        normed = self.norm(x)
        return x + self.alpha * self.attention(hidden=normed)[0] + self.mlp(normed) * self.beta


class PostNormBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm_1, self.mlp, self.norm_2 = (
            Attention(),
            nn.LayerNorm(WIDTH),
            MLP(),
            nn.LayerNorm(WIDTH),
        )

    def forward(self, x):
        x = self.norm_1(x + self.attention(hidden=x)[0])
        return self.norm_2(x + self.mlp(x))


class SharedModel(nn.Module):
    """One post-norm block that runs three times."""

    def __init__(self):
        super().__init__()
        self.block = PostNormBlock()

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return x


MODELS = {
    "functional": FunctionalModel,
    "keywords": KeywordModel,
    "parallel": lambda: nn.Sequential(*(ParallelBlock() for _ in range(3))),
    "shared": SharedModel,
}


def result(model, x):
    found = model(x)
    return found[0] if isinstance(found, tuple) else found


def awake(adapters, name):
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters[name].values():
        nn.init.normal_(parameter, std=0.2, generator=generator)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", ["inputs", "layout"])
def test_an_odd_model_goes_the_whole_way(name, by, tmp_path):
    """By example inputs, and by a layout file; then saved, loaded and detached."""
    model, x = MODELS[name]().eval(), torch.randn(2, 5, WIDTH)
    base = result(model, x)
    if by == "layout":
        path = tmp_path / "layout.json"
        path.write_text(json.dumps(inarch.probe(model, example_inputs=x).to_dict()), encoding="utf-8")
        adapters = inarch.attach(model, layout=str(path), example_inputs=x)
    else:
        adapters = inarch.attach(model, example_inputs=x)
    assert sorted({site.kind for site in adapters.sites}) == ["mlp", "self_attention"]
    assert {role for site in adapters.sites for role in site.projections} == {"q", "k", "v", "o", "up", "down"}
    assert torch.equal(result(model, x), base)
    adapters.add("a", EVERYTHING)
    adapters.train("a")
    awake(adapters, "a")
    adapted = result(model, x)
    assert not torch.allclose(adapted, base, atol=1e-3)
    adapted.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters["a"].values())
    own = {id(parameter) for parameter in adapters["a"].values()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in own)
    adapters.save("a", tmp_path / "a")
    adapters.detach()
    assert torch.equal(result(model, x), base)
    again = inarch.attach(model, example_inputs=x)
    again.load(tmp_path / "a")
    again.activate("a")
    assert torch.allclose(result(model, x), adapted, atol=1e-6)


class InlineBlock(nn.Module):
    """No module returns what is added: there is nothing to hook."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(INNER, WIDTH) / 4), nn.Parameter(torch.randn(WIDTH, INNER) / 4)

    def forward(self, x):
        return x + F.relu(x @ self.up.T) @ self.down.T


def test_a_branch_inside_one_forward_is_refused_by_name():
    model = nn.Sequential(*(InlineBlock() for _ in range(2)))
    with pytest.raises(
        ProbeError, match=r"got none for mlp of `0` \(InlineBlock\), which is added in the forward of `0`"
    ):
        inarch.attach(model, example_inputs=torch.randn(2, 5, WIDTH))


class Routed(nn.Module):
    """Its forward reads the data, and cannot run without."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "mlp": MLP()}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            if x.abs().max().item() > 0:
                x = x + block["mlp"](block["norm"](x))
        return x


def test_a_forward_that_reads_its_data_is_probed_on_the_users_inputs():
    model, x = Routed().eval(), torch.randn(2, 5, WIDTH)
    with pytest.raises(SiteError, match=r"whose inputs cannot be told from it. Pass `example_inputs=`"):
        inarch.attach(model)
    sites = inarch.attach(model, example_inputs=x).sites
    assert sites.source == "forward"
    assert [site.key for site in sites] == ["data0.0.mlp", "data0.1.mlp"]


CONFIGURATION = """
from transformers import PreTrainedConfig


class PocketConfig(PreTrainedConfig):
    model_type = "pocket"

    def __init__(self, vocab_size=50, hidden_size=16, num_layers=2, num_labels=3, **kwargs):
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        super().__init__(num_labels=num_labels, **kwargs)
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_pocket import PocketConfig


class PocketLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(self.norm_2(x))))


class PocketModel(PreTrainedModel):
    config_class = PocketConfig
    base_model_prefix = "pocket"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PocketLayer(config.hidden_size) for _ in range(config.num_layers))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)
"""


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder with a model whose code transformers does not have, and a cache of its own for that code."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "pocket"
    folder.mkdir()
    (folder / "configuration_pocket.py").write_text(CONFIGURATION, encoding="utf-8")
    (folder / "modeling_pocket.py").write_text(MODELING, encoding="utf-8")
    maps = {"AutoConfig": "configuration_pocket.PocketConfig", "AutoModel": "modeling_pocket.PocketModel"}
    config = {"model_type": "pocket", "auto_map": maps, "architectures": ["PocketModel"], "hidden_size": WIDTH}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)
    model.save_pretrained(folder)
    return folder


def test_a_model_with_code_of_its_own_goes_the_whole_way(remote, tmp_path):
    """As from the hub with `trust_remote_code`; its inputs are told from its configuration."""
    from transformers import AutoModel

    def load(folder=remote):
        return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()

    model, ids = load(), torch.arange(12).reshape(2, 6)
    assert type(model).__module__.startswith("transformers_modules")
    base = model(ids).last_hidden_state
    adapters = inarch.attach(model)
    assert adapters.sites.num_layers == {"text0": 2}
    adapters.add("a", EVERYTHING)
    adapters.train("a")
    awake(adapters, "a")
    adapted = model(ids).last_hidden_state
    assert not torch.allclose(adapted, base, atol=1e-3)
    adapted.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters["a"].values())
    adapters.save("a", tmp_path / "a")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(ids).last_hidden_state, base)
    adapters.detach()
    assert torch.equal(model(ids).last_hidden_state, base)
    fresh = load()
    again = inarch.attach(fresh)
    again.load(tmp_path / "a")
    again.activate("a")
    assert torch.allclose(fresh(ids).last_hidden_state, adapted, atol=1e-6)
