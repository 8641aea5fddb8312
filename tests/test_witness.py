"""Verification: every wrong claim about a model is refused before anything is attached."""

import dataclasses

import pytest
import torch

import inarch
from inarch import SiteError, Sites
from inarch.core.site import Tap
from inarch.testing import PlainTransformer, tiny, tiny_inputs


def changed(model, key, **changes):
    """The model's sites with one of them changed."""
    sites = inarch.probe(model)
    rows = [dataclasses.replace(site, **changes) if site.key == key else site for site in sites]
    return dataclasses.replace(sites, sites=tuple(rows))


def verify(model, sites, inputs):
    from inarch.witness import verify as run

    run(model, sites, (), inputs)


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("image0.0.mlp", {"width": 48}, "has the width of its site, 48; got 32"),
        # The stream of the attention is not the one the MLP is added to.
        (
            "image0.0.self_attention",
            {"stream": Tap(path="layernorm_after", side="in", key=(0,))},
            "The stream is seen once before each branch output",
        ),
        (
            "image0.0.self_attention",
            {"stream": Tap(path="layernorm_before", side="out")},
            "got something else in the stream of `image0.0.mlp`",
        ),
        (
            "image0.0.self_attention",
            {"output": "q"},
            "got something else in the stream of `image0.0.mlp`",
        ),
    ],
)
def test_a_tap_in_the_wrong_place_is_named(key, changes, message):
    model = tiny("vit")
    if changes.get("output") == "q":
        path = inarch.probe(model)[key].projections["q"][0].path
        changes = {"output": Tap(path=path, side="out")}
    with pytest.raises(SiteError, match=message):
        verify(model, changed(model, key, **changes), tiny_inputs("vit"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_norm_after_a_sum_must_receive_the_sum():
    model = tiny("bert")
    sites = changed(model, "text0.1.mlp", output=Tap(path="output.dense", side="out"))
    verify(model, sites, tiny_inputs("bert"))  # without dropout the same tensor
    sites = changed(model, "text0.1.mlp", stream=Tap(path="attention.self.query", side="in", key=(0,)))
    with pytest.raises(SiteError, match="what its norm receives"):
        verify(model, sites, tiny_inputs("bert"))


def test_a_site_that_never_runs_is_named():
    class Half(PlainTransformer):
        def forward(self, x, whole=True):
            for block in self.blocks if whole else self.blocks[:1]:
                x = block(x)
            return self.head(self.norm(x).mean(dim=1))

    model = Half().eval()
    sites = inarch.probe(model, example_inputs={"x": torch.randn(1, 4, 32)})
    with pytest.raises(SiteError, match="got no call of `blocks.1.out`"):
        verify(model, sites, {"x": torch.randn(1, 4, 32), "whole": False})


def test_verification_leaves_mode_and_random_state_as_they_were():
    model = tiny("vit").train()
    model.get_submodule(inarch.probe(model)["image0.0.mlp"].layer_path).eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    verify(model, inarch.probe(model), tiny_inputs("vit"))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_verification_leaves_what_a_forward_changes_as_it_was():
    class Remembers(PlainTransformer):
        length, shape = 9, (9, 9)

        def forward(self, x):
            self.length, self.shape = x.shape[1], tuple(x.shape)
            return super().forward(x)

    model = Remembers().eval()
    model.length, model.shape = 9, (9, 9)
    x = torch.randn(1, 4, 32)
    verify(model, inarch.probe(model, example_inputs={"x": x}), {"x": x})
    assert (model.length, model.shape) == (9, (9, 9))
    model(x)
    assert model.length == 4


def test_a_wrong_layout_attaches_nothing():
    model = tiny("vit")
    wrong = changed(model, "image0.1.self_attention", stream=Tap(path="layernorm_before", side="out"))
    assert isinstance(wrong, Sites)
    with pytest.raises(SiteError, match="got something else"):
        inarch.attach(model, layout=wrong)
    assert not [name for name, _ in model.named_modules() if "inarch" in name]
    inarch.attach(model)


def test_a_layout_that_no_forward_can_show_right_is_taken_with_a_warning(caplog):
    model, x = PlainTransformer().eval(), {"x": torch.randn(1, 4, 32)}
    sites = inarch.probe(model, example_inputs=x)
    rows = [dataclasses.replace(s, output=s.stream) if s.kind == "mlp" else s for s in sites]
    wrong = dataclasses.replace(sites, sites=tuple(rows))
    inarch.attach(model, layout=sites, example_inputs=x).detach()
    assert not caplog.records
    inarch.attach(model, layout=wrong).detach()
    assert "No forward of PlainTransformer was watched" in caplog.text
    with pytest.raises(SiteError):
        inarch.attach(model, layout=wrong, example_inputs=x)


def images_seen(model):
    """The shapes of the images that the patch embedding gets, from now on."""
    shapes = []
    projection = model.get_submodule("embeddings.patch_embeddings.projection")
    projection.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


def test_attaching_looks_at_a_small_image():
    model = tiny("vit")
    shapes = images_seen(model)
    inarch.attach(model)
    assert shapes == [(1, 3, 16, 16)]


def test_a_model_that_refuses_a_small_image_gets_its_own():
    model = tiny("vit")
    model.embeddings.interpolate_pos_encoding = None  # called for an image of another size only
    shapes = images_seen(model)
    inarch.attach(model)
    assert shapes == [(1, 3, 16, 16), (1, 3, 32, 32)]


def test_example_inputs_are_watched_as_they_are():
    model, inputs = tiny("vit"), tiny_inputs("vit")
    shapes = images_seen(model)
    inarch.attach(model, example_inputs=inputs)
    assert shapes == [(2, 3, 32, 32)]


def test_a_model_without_patches_has_no_small_image():
    from inarch.sites import Inputs, given_inputs, with_small_image

    assert with_small_image(tiny("bert"), given_inputs(tiny_inputs("bert"))) is None
    assert with_small_image(tiny("vit"), Inputs((), {"pixel_values": torch.zeros(1, 3, 16, 16)})) is None
