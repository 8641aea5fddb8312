"""Visual prompts against forwards written by hand, in the order of the paper: class token, prompts, patches."""

import copy

import pytest
import torch
import transformers
from little_adapters import prompted

import inarch
from inarch import Average, BatchSplit, Parallel, Stack
from inarch.core.site import Sites
from inarch.methods import read_config
from inarch.testing import perturb, tiny, tiny_inputs

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"image_size": 32, "patch_size": 8}


def model_of(name, config, **settings):
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**SMALL, **settings)).eval()
    perturb(model)
    return model


def layers_of(adapters):
    """In their order; releases of transformers call them by other names."""
    paths = dict.fromkeys(site.layer_path for site in adapters.sites)
    return [adapters.model.get_submodule(path) for path in paths]


def prompts(adapters, name="a"):
    """By layer."""
    return {int(key.split(".")[1]): vectors for key, vectors in adapters[name].items()}


def by_hand(layers, embedded, own, special=1, **arguments):
    """Equations 4 to 7: a layer's own prompts in the place of what the layer before made of its own."""
    x, front = embedded, None
    for number, layer in enumerate(layers):
        if number in own:
            front = own[number].expand(len(x), -1, -1)
        count = 0 if front is None else front.shape[1]
        whole = x if front is None else torch.cat((x[:, :special], front, x[:, special:]), dim=1)
        given = {key: value[number] if isinstance(value, list) else value for key, value in arguments.items()}
        whole = layer(whole, **given)
        front = whole[:, special : special + count] if count else None
        x = torch.cat((whole[:, :special], whole[:, special + count :]), dim=1)
    return x


PRESETS = ["vpt_shallow[prompt_length=5]", "vpt_deep[prompt_length=5]", "vpt_deep[prompt_length=5,leave_out=[1]]"]


@pytest.mark.parametrize("config", PRESETS)
def test_a_vision_transformer_computes_the_equations(config):
    model = model_of("ViTForImageClassification", "ViTConfig", num_labels=4)
    pixels = torch.randn(2, 3, 32, 32)
    base = model(pixel_values=pixels, output_hidden_states=True)
    adapters = prompted(model, config)
    found = model(pixel_values=pixels, output_hidden_states=True)
    adapters.deactivate()
    vit = model.vit
    states = by_hand(layers_of(adapters), vit.embeddings(pixels), prompts(adapters))
    assert torch.allclose(found.logits, model.classifier(vit.layernorm(states)[:, 0]), atol=1e-5)
    assert not torch.allclose(found.logits, base.logits, atol=1e-2)
    assert [one.shape for one in found.hidden_states] == [one.shape for one in base.hidden_states]
    assert torch.equal(found.hidden_states[0], base.hidden_states[0])
    assert torch.equal(model(pixel_values=pixels).logits, base.logits)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("config", PRESETS[:2])
def test_relative_positions_of_beit_stay_as_they_are(config, shared):
    key = "use_shared_relative_position_bias" if shared else "use_relative_position_bias"
    model = model_of("BeitModel", "BeitConfig", vocab_size=9, **{key: True})
    if not hasattr(model, "shared_position_bias"):
        pytest.skip("in this release of transformers the layers of BEiT get their positions in another way")
    pixels = torch.randn(2, 3, 32, 32)
    adapters = prompted(model, config)
    found = model(pixel_values=pixels).last_hidden_state
    adapters.deactivate()
    order = [0, *range(6, 22)]  # where the class token and the patches stand

    def extended(module):
        bias = torch.zeros(1, 4, 22, 22)
        bias[:, :, torch.tensor(order)[:, None], torch.tensor(order)] = module((4, 4))
        return bias

    modules = [model.shared_position_bias or layer.relative_position_bias for layer in model.layers]
    biases = [extended(module) for module in modules]
    for layer in model.layers:
        layer.relative_position_bias = None
    states = by_hand(model.layers, model.embeddings(pixels), prompts(adapters), attention_mask=biases)
    assert torch.allclose(found, model.layernorm(states), atol=1e-5)


@pytest.mark.parametrize("config", PRESETS[:2])
def test_registers_and_rotary_positions_of_dinov3_stay_as_they_are(config):
    model = model_of("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2)
    pixels = torch.randn(2, 3, 32, 32)
    adapters = prompted(model, config)
    found = model(pixel_values=pixels).last_hidden_state
    adapters.deactivate()
    rotary = model.rope_embeddings(pixels)
    layers, embedded = model.model.layer, model.embeddings(pixels)
    states = by_hand(layers, embedded, prompts(adapters), 3, position_embeddings=rotary)
    assert torch.allclose(found, model.norm(states), atol=1e-5)


@pytest.mark.parametrize("name", ["Beit", "Dinov2", "DINOv3ViT"])
def test_feature_maps_are_those_of_patches(name):
    """The first stage is what enters the layers, so the prompts change nothing of it."""
    extra = {"vocab_size": 9, "use_relative_position_bias": True} if name == "Beit" else {}
    model = model_of(f"{name}Backbone", f"{name}Config", out_features=["stem", "stage1", "stage3"], **extra)
    pixels = torch.randn(2, 3, 32, 32)
    base = model(pixel_values=pixels).feature_maps
    prompted(model, "vpt_shallow[prompt_length=5]")
    found = model(pixel_values=pixels).feature_maps
    assert [one.shape for one in found] == [one.shape for one in base]
    assert torch.equal(found[0], base[0])
    assert not torch.allclose(found[1], base[1], atol=1e-3)


def test_padding_of_images_is_seen_by_no_prompt():
    """Siglip 2 takes patches of images of several sizes: those of padding change nothing."""
    config = transformers.Siglip2VisionConfig(
        **{key: value for key, value in SMALL.items() if key != "image_size"}, num_patches=16
    )
    torch.manual_seed(0)
    model = transformers.Siglip2VisionModel(config).eval()
    pixels = torch.randn(2, 16, 192)
    mask = torch.tensor([[1] * 16, [1] * 12 + [0] * 4])
    inputs = {"pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4], [3, 4]])}
    adapters = inarch.attach(model, example_inputs={"pixel_values": pixels, **inputs})
    adapters.add("a", "vpt_shallow[prompt_length=5]")
    adapters.activate("a")
    first = model(pixel_values=pixels, **inputs).last_hidden_state
    other = pixels.clone()
    other[1, 12:] = 7.0
    second = model(pixel_values=other, **inputs).last_hidden_state
    assert torch.allclose(first[1, :12], second[1, :12], atol=1e-6)
    adapters.deactivate()
    assert not torch.allclose(model(pixel_values=pixels, **inputs).last_hidden_state, first, atol=1e-3)


def test_the_start_is_that_of_the_authors():
    """Uniform in ±sqrt(6 / (3 · 8² + 32)); in training, a tenth of the numbers is dropped, for each image anew."""
    adapters = inarch.attach(tiny("vit"))
    adapters.add("a", "vpt_shallow[prompt_length=512]")
    (vectors,) = adapters["a"].values()
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    assert 0.99 * bound < vectors.abs().max() <= bound
    assert vectors.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    module = next(m for m in adapters.model.modules() if getattr(m, "name", "") == "visual_prompt").train()
    front = module(torch.zeros(2, 3, 32))[:, :512]
    assert (front == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not torch.equal(front[0] == 0, front[1] == 0)


def test_rows_copies_stacks_and_averages():
    model = tiny("vit")
    adapters = prompted(model, *["vpt_deep[prompt_length=4]"] * 2)
    inputs = tiny_inputs("vit")

    def run(setup):
        adapters.activate(setup)
        return model(**inputs).last_hidden_state

    one, other = run("a"), run("b")
    assert torch.allclose(run(BatchSplit("a", "b", batch_sizes=[1, 1])), torch.cat((one[:1], other[1:])), atol=1e-5)
    assert torch.allclose(run(Parallel("a", "b")), torch.cat((one, other)), atol=1e-5)
    assert torch.allclose(run(Average("a", "a")), one, atol=1e-5)
    stacked = run(Stack("a", "b"))
    adapters.add("c", "vpt_deep[prompt_length=8]")
    for vectors, first, second in zip(*(adapters[key].values() for key in "cab"), strict=True):
        vectors.data = torch.cat((first, second)).detach()
    assert torch.allclose(run("c"), stacked, atol=1e-5)
    with pytest.raises(inarch.SetupError, match=r"equally many tokens in front of them; got \[4, 8\]"):
        adapters.activate(BatchSplit("a", "c", batch_sizes=[1, 1]))
    adapters.add("shallow", "vpt_shallow[prompt_length=4]")
    with pytest.raises(inarch.SetupError, match="new at the same layers; got `image0.1.self_attention` for only one"):
        adapters.activate(Stack("a", "shallow"))


@pytest.mark.parametrize("config", PRESETS[:2])
def test_checkpointing_copies_and_half_precision(config):
    model = tiny("vit")
    adapters = prompted(model, config)
    adapters.train("a")
    inputs = tiny_inputs("vit")
    adapters.model.eval()
    twin = copy.deepcopy(model)
    expected = model(**inputs).last_hidden_state
    assert torch.equal(twin(**inputs).last_hidden_state, expected)
    expected.square().sum().backward()
    gradients = [vectors.grad.clone() for vectors in adapters["a"].values()]
    for vectors in adapters["a"].values():
        vectors.grad = None
        assert vectors.abs().sum() > 0
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    for module in model.modules():  # all as in evaluation but for the layers, which would not be checkpointed
        module.dropout = 0.0 if isinstance(getattr(module, "dropout", None), float) else getattr(module, "dropout", 0.0)
    loss = model(**inputs).last_hidden_state.square().sum()
    if "deep" not in config and not hasattr(model, "activation_checkpointing_enable"):
        with pytest.raises(
            inarch.SetupError, match="a release of transformers whose checkpointing leaves hooks outside"
        ):
            loss.backward()
        return
    loss.backward()
    found = [vectors.grad for vectors in adapters["a"].values()]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, gradients, strict=True))
    model.eval().to(torch.bfloat16)
    halved = model(pixel_values=inputs["pixel_values"].bfloat16()).last_hidden_state
    assert halved.dtype == torch.bfloat16


def test_models_without_one_plain_sequence_are_refused():
    for name, reason in (("swin", "stages of different widths"), ("bert", "no stack of layers that sees images")):
        with pytest.raises(inarch.ConfigError, match=f"one sequence of tokens, of any length.*got {reason}"):
            inarch.attach(tiny(name)).add("a", "vpt_deep")
    swin = transformers.SwinConfig(embed_dim=8, depths=[2], num_heads=[2], window_size=2, image_size=32, patch_size=4)
    adapters = inarch.attach(transformers.SwinModel(swin).eval())
    before = list(adapters.model.state_dict())
    with pytest.raises(
        inarch.SiteError, match="needs a model that takes others; got RuntimeError.*SwinModel with `vpt_"
    ):
        adapters.add("a", "vpt_shallow")
    assert adapters.names == ()
    assert list(adapters.model.state_dict()) == before
    maps = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    vitdet = inarch.attach(transformers.VitDetModel(transformers.VitDetConfig(**maps)).eval())
    with pytest.raises(inarch.InarchError, match=r"sequence \(B, L, D\); got \(1, 32, \d, \d\)|layers on feature maps"):
        vitdet.add("a", "vpt_shallow")


def test_layers_that_are_left_out_are_those_of_a_deep_one():
    with pytest.raises(inarch.ConfigError, match=r"leave_out.*got \[1\] with `deep=False`"):
        read_config("vpt_shallow[leave_out=[1]]")
    adapters = inarch.attach(tiny("vit"))
    with pytest.raises(inarch.ConfigError, match=r"at one layer at least; got `leave_out=\[0, 1\]`"):
        adapters.add("a", "vpt_deep[leave_out=[0,1]]")


def test_prompts_have_keys_of_sites(tmp_path):
    model = tiny("vit")
    adapters = prompted(model, PRESETS[1])
    keys = [f"image0.{layer}.self_attention.visual_prompt.vectors" for layer in range(2)]
    assert list(adapters["a"]) == keys
    expected = model(**tiny_inputs("vit")).last_hidden_state
    adapters.save("a", tmp_path / "a")
    other = inarch.attach(tiny("vit"))
    other.activate(other.load(tmp_path / "a"))
    assert torch.equal(other.model(**tiny_inputs("vit")).last_hidden_state, expected)
    assert isinstance(other.sites, Sites)
