"""Families of timm, tiny and random, through the whole way; and what timm must not change in the rest."""

import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.utils import import_utils

import inarch
from inarch.sites import ProbeError
from inarch.testing import perturb

SCRIPTS = Path(__file__).parent.parent / "scripts"

TOKENS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
PATCHES = TOKENS | {"img_size": 32, "patch_size": 8}
WINDOWS = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
STAGES = {"embed_dims": (16, 16, 16, 16), "num_heads": (2, 2, 2, 2), "depths": (1, 1, 1, 1)}

FAMILIES = {
    # name: (model or file:class, settings, attentions, mixers, MLPs, what is refused)
    "ViT": ("vit_tiny_patch16_224", PATCHES, 2, 0, 2, ""),
    "DeiT": ("deit_tiny_distilled_patch16_224", PATCHES, 2, 0, 2, ""),
    "BEiT": ("beit_base_patch16_224", PATCHES, 2, 0, 2, ""),
    "EVA": ("eva02_tiny_patch14_224", PATCHES, 2, 0, 2, ""),
    "ConViT": ("convit_tiny", PATCHES | {"local_up_to_layer": 1}, 2, 0, 2, ""),
    "CaiT": ("cait_xxs24_224", PATCHES, 4, 0, 4, ""),
    "Swin": ("swin_tiny_patch4_window7_224", WINDOWS, 4, 0, 4, ""),
    "Swin 2": ("swinv2_tiny_window8_256", WINDOWS, 4, 0, 4, ""),
    "SwinV2-CR": ("swinv2_cr_tiny_224", WINDOWS, 4, 0, 4, ""),
    "GCViT": (
        "gcvit:GlobalContextVit",
        {"img_size": 64, "embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 2, 2)}
        | {"window_ratio": (16, 16, 16, 32)},
        8, 5, 8, "",  # blocks in turns with local and global queries; the mixers make the global ones
    ),
    "MViTv2": ("mvitv2:MultiScaleVit", {"img_size": (64, 64)}, 2, 0, 4, "MultiScaleBlock"),
    "Hiera": ("hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 2, 2, 1)}, 6, 0, 6, ""),
    "DaViT": ("davit_tiny", STAGES | {"window_size": 2}, 8, 0, 8, "SpatialBlock"),
    "Twins": ("twins_svt_small", STAGES | {"img_size": 64, "depths": (2, 2, 1, 1)}, 6, 0, 6, "PosConv"),
    "VOLO": (
        "volo:VOLO",
        {"img_size": 64, "layers": (1, 1, 2, 1), "embed_dims": (32,) * 4, "num_heads": (2,) * 4},
        6, 1, 7, "",
    ),
    "XCiT": ("xcit_nano_12_p16_224", TOKENS | {"img_size": 32}, 4, 2, 4, ""),
    "TNT": (
        "tnt_s_patch16_224",
        {"img_size": 32, "embed_dim": 32, "inner_dim": 16, "depth": 2, "num_heads_inner": 2, "num_heads_outer": 2},
        4, 0, 4, "",
    ),
    "PiT": ("pit_ti_224", {"img_size": 64, "base_dims": (16,) * 3, "depth": (1,) * 3, "heads": (1, 2, 4)}, 3, 0, 3, ""),
    "NesT": (
        "nest:Nest",
        {"img_size": 32, "patch_size": 2, "embed_dims": (16,) * 3, "num_heads": (2,) * 3, "depths": (1, 1, 1)},
        3, 0, 3, "",
    ),
    "LeViT": (
        "levit_128s",
        {"img_size": 128, "embed_dim": (16,) * 3, "key_dim": 8, "num_heads": (2,) * 3, "depth": (1, 1, 1)},
        3, 0, 3, "LevitDownsample",
    ),
    "MaxViT": ("test_maxvit", {"img_size": 32}, 8, 0, 8, ""),
    "NaFlexViT": ("naflexvit_base_patch16_gap", TOKENS, 2, 0, 2, ""),
    "SAM": ("samvit_base_patch16", PATCHES | {"window_size": 3, "global_attn_indexes": (1,)}, 2, 0, 2, ""),
    "Gemma 4 tower": ("gemma4_vit_167m", TOKENS, 2, 0, 2, ""),
    "Qwen 3 tower": ("qwen3_vit_306m", TOKENS, 2, 0, 2, ""),
    "TinyViT": ("tiny_vit_5m_224", STAGES | {"window_sizes": (2, 2, 2, 2)}, 3, 0, 3, ""),
    "CoaT-Lite": (
        "coat_lite_tiny",
        {"img_size": 64, "embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "num_heads": 4}
        | {"crpe_window": {3: 1, 5: 1, 7: 2}},
        0, 4, 4, "SerialBlock",
    ),
    "CoaT": (
        "coat_tiny",
        {"img_size": 64, "embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "parallel_depth": 1, "num_heads": 4}
        | {"crpe_window": {3: 1, 5: 1, 7: 2}},
        0, 7, 7, "SerialBlock",
    ),
    "MLP-Mixer": ("mlp_mixer:MlpMixer", {"img_size": 32, "patch_size": 8, "num_blocks": 2}, 0, 2, 2, ""),
    "MambaOut": ("test_mambaout", {}, 0, 6, 0, ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def timm():
    """timm, which transformers sees neither before nor after."""
    seen = import_utils.is_timm_available(), import_utils.is_torchvision_available()  # remembers what it finds first
    spec = importlib.util.spec_from_file_location("timm_site", SCRIPTS / "timm_site.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    yield script.import_timm()
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]
    assert seen == (False, False) == (import_utils.is_timm_available(), import_utils.is_torchvision_available())


def build(timm, family):
    """A tiny model in eval mode, its weights moved off their initial values, and pictures for it."""
    name, settings = FAMILIES[family][:2]
    file, _, class_name = name.partition(":")
    if family == "MViTv2":
        config = importlib.import_module("timm.models.mvitv2").MultiScaleVitCfg
        settings = settings | {"cfg": config(depths=(1, 2, 1), embed_dim=16, num_heads=1)}
    if class_name:
        model = getattr(importlib.import_module(f"timm.models.{file}"), class_name)(num_classes=3, **settings)
    else:
        model = timm.create_model(name, num_classes=3, **settings)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    perturb(model)
    size = settings.get("img_size", 64)
    return model.eval(), torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_adapts(timm, family):
    """Every block has its sites; adapters start at the base, learn, and go without a trace."""
    model, image = build(timm, family)
    model.requires_grad_(False)  # torch multiplies a frozen matrix in another order, with another last bit
    with torch.no_grad():
        base = model(image)
    keys = list(model.state_dict())
    adapters = inarch.attach(model, example_inputs=image)
    kinds = Counter(site.kind for site in adapters.sites)
    *_, attentions, mixers, mlps, refused = FAMILIES[family]
    assert (kinds["self_attention"] + kinds["cross_attention"], kinds["mixer"], kinds["mlp"]) == (
        attentions,
        mixers,
        mlps,
    )
    assert bool(refused) == bool(adapters.sites.refused)
    assert any(refused in reason for reason in adapters.sites.refused) or not refused
    roles = {role for site in adapters.sites for role in site.projections}
    lora = f"|lora[attn_matrices=[{','.join(r for r in 'qkvo' if r in roles)}]]" if "q" in roles else ""
    adapters.add(
        "a",
        f"seq_bn[mh_adapter={bool(attentions + mixers)},output_adapter={bool(mlps)},reduction_factor=8,"
        f"original_ln_before=False,non_linearity=gelu,init_weights=mam_adapter]{lora}",
    )
    adapters.train("a")
    with torch.no_grad():
        assert torch.equal(model(image), base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted = model(image)
    assert (adapted - base).abs().max() > 1e-4
    adapted.square().sum().backward()
    own = {id(p) for p in adapters["a"].values()} | {id(p) for p in adapters.head("a").values()}
    silent = [key for key, p in adapters["a"].items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert [key for key, p in model.named_parameters() if p.grad is not None and id(p) not in own] == []
    adapters.detach()
    with torch.no_grad():
        assert torch.equal(model(image), base)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("name", "counts", "refused"),
    [
        # attentions, mixers, MLPs by the sums in the blocks' source times the blocks of the configuration
        ("convnext_atto", (0, 12, 0), ""),
        ("edgenext_xx_small", (3, 9, 0), ""),
        ("efficientvim_m1", (0, 18, 6), ""),
        ("nextvit_small", (4, 0, 20), "a sum of feature maps that convolutions make"),
        ("poolformer_s12", (0, 12, 12), ""),
        ("coatnet_pico_rw_224", (7, 3, 7), ""),
    ],
)
def test_blocks_on_feature_maps_adapt_but_for_dense_convolutions(timm, name, counts, refused):
    with torch.device("meta"):
        model = timm.create_model(name)
    sites = inarch.probe(model)
    kinds = Counter(site.kind for site in sites)
    assert (kinds["self_attention"], kinds["mixer"], kinds["mlp"]) == counts
    assert bool(sites.refused) == bool(refused)
    assert all(refused in reason for reason in sites.refused)


def test_a_network_of_convolutions_is_refused_by_name(timm):
    with torch.device("meta"):
        model = timm.create_model("darknet17")
    with pytest.raises(ProbeError, match=r"got none in CspNet \(.*: a sum of feature maps that convolutions make"):
        inarch.probe(model)


@pytest.mark.parametrize("family", ["ViT", "DeiT", "EVA", "BEiT", "Swin"])
def test_visual_prompts_on_plain_sequences_alone(timm, family):
    """Those of timm without positions inside the attention take prompts; the others are refused by name."""
    model, image = build(timm, family)
    adapters = inarch.attach(model, example_inputs=image)
    base = model(image)
    if family in ("ViT", "DeiT"):
        adapters.add("a", "vpt_shallow[prompt_length=3]")
        adapters.activate("a")
        (vectors,) = adapters["a"].values()
        features = model.forward_features(image)
        blocks, tokens = model.blocks, []
        handle = blocks.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
        assert not torch.allclose(model(image), base, atol=1e-4)
        handle.remove()
        adapters.deactivate()
        whole = blocks(torch.cat((tokens[0], vectors.expand(2, -1, -1)), dim=1))  # in whatever order
        assert torch.allclose(features, model.norm(whole[:, :-3]), atol=1e-5)
        return
    with pytest.raises(inarch.InarchError, match="needs a model that takes others|one sequence of tokens"):
        adapters.add("a", "vpt_shallow[prompt_length=3]")
    assert torch.equal(model(image), base)
