"""Tiny models with adapters that matter, for tests of their formulas."""

import copy

import torch

import inarch
from inarch.testing import tiny, tiny_inputs

EVERY = "attn_matrices=[q,k,v,o],intermediate_lora=True,output_lora=True"


def grafted(name, **configs):
    """A tiny model in float64 with adapters moved off their initial weights."""
    model = tiny(name).double()
    adapters = inarch.attach(model)
    for key, config in configs.items():
        adapters.add(key, config)
        awake(adapters, key)
    return model, adapters


def moved(model, configs):
    """The handle of a model, with adapters moved off their initial weights, each in another way."""
    adapters = inarch.attach(model)
    generator = torch.Generator().manual_seed(3)
    for key, config in configs.items():
        adapters.add(key, config)
        with torch.no_grad():
            for parameter in adapters[key].values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapters


def prompted(model, *configs):
    """The handle of a model, with adapters `a`, `b`, ... whose vectors matter, the first one active."""
    adapters = inarch.attach(model)
    generator = torch.Generator().manual_seed(3)
    for name, config in zip("abc", configs, strict=False):
        adapters.add(name, config)
        for vectors in adapters[name].values():
            vectors.data = torch.randn(vectors.shape, generator=generator)
    adapters.activate("a")
    return adapters


def awake(adapters, name, std=0.2, seed=3):
    """Move an adapter's weights off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters[name].values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


def active(model, config, **options):
    """The handle of a model, with an active adapter `a` moved off its initial weights."""
    adapters = inarch.attach(model)
    adapters.add("a", config, **options)
    awake(adapters, "a")
    adapters.activate("a")
    return adapters


def check_merged_and_stored(model, adapters, name, folder):
    """An active adapter `a` computes the same merged, and under another name when it was saved and loaded."""
    found = output(model, name)
    assert adapters.merge("a") < 1e-9
    assert torch.allclose(output(model, name), found, atol=1e-10)
    adapters.unmerge()
    adapters.save("a", folder / "a")
    adapters.load(folder / "a", name="b")
    adapters.activate("b")
    assert torch.equal(output(model, name), found)


@torch.no_grad()
def output(model, name):
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny_inputs(name).items()}
    return model(**inputs).last_hidden_state


def rows_of(model, site, projection):
    """The weight (rows, in) of a projection, as a view or a copy, and how to write it back."""
    weight = model.get_submodule(site.absolute(projection.path)).get_parameter(projection.weight or "weight")
    view = weight.mT if projection.transposed else weight
    rows = projection.rows or ((0, projection.out_features),)
    return view, torch.cat([torch.arange(*pair) for pair in rows])


def by_hand(model, adapters, method, change):
    """A copy of the base with `change(weight, tensors, role)` in the place of every adapted weight."""
    twin = copy.deepcopy(model)
    inarch.attach(twin).detach()
    found: dict = {}
    for key, tensor in adapters.tensors("a").items():
        place, _, rest = key.partition(f".{method}.")
        role, _, leaf = rest.partition(".")
        found.setdefault((place, role), {})[leaf] = tensor.detach()
    with torch.no_grad():
        for (place, role), tensors in found.items():
            site = adapters.sites[place]
            view, rows = rows_of(twin, site, site.projections[role][0])
            view[rows] = change(view[rows], tensors, role)
    return twin
