"""AdaptFormer and Convpass against their equations, written as plain sums over a ViT in float64."""

import pytest
import torch
from little_adapters import active
from torch import nn

import inarch
from inarch import Fuse, Split, Stack
from inarch.core.errors import ConfigError, SetupError, SiteError
from inarch.methods.convpass import Convpass
from inarch.testing import tiny, tiny_inputs

EVERY = "convpass[channels=3,scale=0.5]"


def attached(name, config):
    """A model in float64 with an active adapter `a` off its initial weights; and its inputs."""
    model = tiny(name).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny_inputs(name).items()}
    adapters = active(model, config)
    return model, inputs, adapters


def weights(adapters, key, method):
    prefix = f"{key}.{method}."
    return {name.removeprefix(prefix): value for name, value in adapters["a"].items() if name.startswith(prefix)}


def by_hand(model, inputs, of_attention, of_mlp):
    """A ViT with what two functions of layer, stream and normed stream add to the branches, in plain sums."""
    x = model.embeddings(inputs["pixel_values"])
    for number, layer in enumerate(model.layers):
        normed = layer.layernorm_before(x)
        x = x + layer.attention(normed)[0] + of_attention(number, x, normed)
        normed = layer.layernorm_after(x)
        x = x + layer.mlp(normed) + of_mlp(number, x, normed)
    return model.layernorm(x)


def _nothing(number, x, normed):
    return 0


@pytest.mark.parametrize("normed", [False, True])
def test_adaptformer(normed):
    """Chen et al. 2022, equations 2 and 3."""
    model, inputs, adapters = attached("vit", f"adaptformer[bottleneck=5,scale=0.3,normed={normed}]")
    found = model(**inputs)[0]

    def beside(number, x, behind):
        w = weights(adapters, f"image0.{number}.mlp", "adaptformer")
        u = torch.relu((behind if normed else x) @ w["down.weight"].T + w["down.bias"])
        return 0.3 * (u @ w["up.weight"].T + w["up.bias"])

    adapters.deactivate()
    expected = by_hand(model, inputs, _nothing, beside)
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)


def convolved(maps, kernel, bias):
    """A 3 x 3 convolution with zeros around (B, H, W, C), place by place and tap by tap."""
    samples, height, width, _ = maps.shape
    out = bias.expand(samples, height, width, len(bias)).clone()
    for i in range(height):
        for j in range(width):
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    if 0 <= i + a < height and 0 <= j + b < width:
                        out[:, i, j] += maps[:, i + a, j + b] @ kernel[:, :, a + 1, b + 1].T
    return out


@torch.no_grad()
@pytest.mark.parametrize("before", [1, 2])
def test_convpass(before):
    """Jie and Deng 2022, section 3.2: a class token alone, the others on a grid of 4 x 4; with and without a register
    token, here a second one that stands before the patches."""
    model = tiny("vit").double()
    embed = model.embeddings.forward
    extra = torch.linspace(-1, 1, 32, dtype=torch.float64)

    def with_register(pixel_values, *args, **kwargs):
        x = embed(pixel_values, *args, **kwargs)
        return torch.cat([x[:, :1], extra.expand(len(x), 1, -1), x[:, 1:]], dim=1) if before == 2 else x

    model.embeddings.forward = with_register
    inputs = {"pixel_values": tiny_inputs("vit")["pixel_values"].double()}
    adapters = inarch.attach(model, example_inputs=inputs)
    adapters.add("a", f"convpass[channels=3,scale=0.5,prefix_tokens={before}]")
    generator = torch.Generator().manual_seed(3)
    for parameter in adapters["a"].values():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    adapters.activate("a")
    found = model(**inputs)[0]

    def gelu(u):
        return u / (1 + torch.exp(-1.702 * u))

    def beside(role):
        def add(number, x, normed):
            w = weights(adapters, f"image0.{number}.{role}", "convpass")
            u = gelu(normed @ w["down.weight"].T + w["down.bias"])
            single = [u[:, i : i + 1, None] for i in range(before)]
            grid = u[:, before:].reshape(len(u), 4, 4, 3)
            parts = [convolved(part, w["conv.weight"], w["conv.bias"]).flatten(1, 2) for part in (*single, grid)]
            return 0.5 * (gelu(torch.cat(parts, dim=1)) @ w["up.weight"].T + w["up.bias"])

        return add

    adapters.deactivate()
    expected = by_hand(model, inputs, beside("self_attention"), beside("mlp"))
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)


def test_convpass_starts_from_the_identity_inside():
    """With an up-projection, what an untrained bypass makes of a token depends on that token alone."""
    module = Convpass(
        inarch.methods.read_config(EVERY).parts[0],
        Convpass.placements(inarch.methods.read_config(EVERY).parts[0], inarch.probe(tiny("vit")))[0],
        0,
    )
    nn.init.normal_(module.up.weight)
    module.eval()
    z = torch.randn(1, 17, 32)
    other = z.clone()
    other[:, 5] += 1
    changed = (module.branch(z) - module.branch(other)).abs().sum(-1) > 0
    assert changed.nonzero().tolist() == [[0, 5]]
    assert module.conv.weight.sum().item() == 3


def test_feature_maps_and_tokens_in_the_first_dimension_are_grids_too():
    config = inarch.methods.read_config(EVERY).parts[0]
    place = Convpass.placements(config, inarch.probe(tiny("vit")))[0]
    module = Convpass(config, place, 0).eval()
    nn.init.normal_(module.up.weight)
    nn.init.normal_(module.conv.weight)
    z = torch.randn(2, 16, 32)
    expected = module.branch(z)
    assert torch.allclose(module.branch(z.reshape(2, 4, 4, 32)).flatten(1, 2), expected, atol=1e-6)
    module.batch_dim = 1
    assert torch.allclose(module.branch(z.transpose(0, 1)).transpose(0, 1), expected, atol=1e-6)


def test_dropout_acts_in_training_only():
    for config in (EVERY, "adaptformer"):
        model, inputs, _ = attached("vit", config)
        assert torch.equal(model(**inputs)[0], model(**inputs)[0])
        model.train()
        assert not torch.equal(model(**inputs)[0], model(**inputs)[0])


def test_they_stack_with_a_bottleneck_and_the_proof_says_so():
    model, inputs, adapters = attached("vit", "convpass_attn[channels=3]|adaptformer[bottleneck=4,normed=True]")
    alone = model(**inputs)[0]
    adapters.add("b", "seq_bn[reduction_factor=4]")
    adapters.activate(Stack("a", "b"))
    assert not torch.allclose(model(**inputs)[0], alone)
    adapters.activate("a")
    text = str(adapters.check())
    assert "y = x + h + A(LN(x))" in text
    assert "lost" not in text


def test_a_second_token_before_the_grid_has_to_be_counted():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "mlp_ratio": 2}
    settings = Dinov2WithRegistersConfig(**sizes, image_size=32, patch_size=8, num_register_tokens=3)
    model = Dinov2WithRegistersModel(settings).eval()
    adapters = inarch.attach(model)
    adapters.add("a", "convpass")
    adapters.activate("a")
    inputs = tiny_inputs("vit")
    with pytest.raises(SiteError, match=r"square grid of them, behind at most one; got 20 tokens at `image0.0."):
        model(**inputs)
    adapters.add("b", "convpass[prefix_tokens=4]")
    adapters.activate("b")
    model(**inputs)
    adapters.add("c", "convpass[prefix_tokens=2]")
    adapters.activate("c")
    with pytest.raises(SiteError, match="behind `prefix_tokens=2`; got 20 tokens"):
        model(**inputs)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "bert",
            "convpass",
            "A convolution over tokens needs those of an image; got `text0.0.self_attention`",
        ),
        ("vit", "convpass[mh_adapter=False,output_adapter=False]", "must be true; got none at `ConvpassConfig`"),
        ("vit", "adaptformer[leave_out=[0,1]]", r"at least one site; got `leave_out=\[0, 1\]`"),
        ("vit", "adaptformer[leave_out_roles=[mlp_2]]", "`leave_out_roles` names sites"),
    ],
)
def test_what_is_refused(name, config, message):
    with pytest.raises(ConfigError, match=message):
        inarch.attach(tiny(name)).add("a", config)


def test_a_fusion_of_one_is_that_one():
    """A static fusion weighs the outputs of branches: of twice the same, it is the same."""
    model, inputs, adapters = attached("vit", "convpass_attn[channels=3]")
    expected = model(**inputs)[0]
    adapters.add("b", "convpass_attn[channels=3]")
    with torch.no_grad():
        for mine, other in zip(adapters["a"].values(), adapters["b"].values(), strict=True):
            other.copy_(mine)
    adapters.add_fusion(Fuse("a", "b", name="f"), "static_fusion")
    assert {key.split(".")[2] for key in adapters["f"]} == {"self_attention"}
    adapters.activate(Fuse("a", "b", name="f"))
    assert torch.allclose(model(**inputs)[0], expected, atol=1e-12, rtol=0)


def test_a_grid_is_not_split():
    adapters = inarch.attach(tiny("vit"))
    for key in "ab":
        adapters.add(key, "convpass")
    with pytest.raises(SetupError, match="A convolution runs over whole grids, of which a `Split` has none; got"):
        adapters.activate(Split("a", "b", splits=[5, 12]))
