"""AdapterDrop: layers that run as if they had no adapter."""

import pytest
import torch
from little_adapters import active

import inarch
from inarch.testing import tiny, tiny_inputs


@torch.no_grad()
def output(model, name):
    return model(**tiny_inputs(name)).last_hidden_state


@pytest.mark.parametrize(
    "config", ["double_seq_bn[reduction_factor=4]|lora[init_weights=bert]", "loreft[dropout=0]", "prefix_tuning_flat"]
)
@pytest.mark.parametrize(("name", "skipped"), [("bert", [0]), ("bart", [1, 2])])
def test_skipped_layers_run_as_the_adapter_of_other_layers_alone(name, skipped, config):
    """Against an adapter that has nothing in these layers, with the same weights elsewhere."""
    model = tiny(name)
    adapters = active(model, config)
    whole = output(model, name)
    with adapters.using("a", skip_layers=skipped):
        assert adapters.skipped == tuple(skipped)
        found = output(model, name)
    assert adapters.skipped == ()
    assert torch.equal(output(model, name), whole)
    places = [stack for stack, count in adapters.sites.num_layers.items() for _ in range(count)]
    offsets = {stack: places.index(stack) for stack in places}
    layers = {number for number in range(len(places)) if number not in skipped}
    with torch.no_grad():  # what adds nothing: interventions, updates, bottlenecks and prefixes in the skipped layers
        for site in adapters.sites:
            if offsets[site.stack] + site.layer not in layers:
                model.get_submodule(site.layer_path).inarch[site.key.replace(".", "_")].adapters.drop("a")
    adapters.activate("a")
    expected = output(model, name)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, whole, atol=1e-3)


def test_skipped_layers_exist_and_are_forgotten_by_the_next_setup():
    model = tiny("bert")
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.activate("a", skip_layers=[1])
    with pytest.raises(inarch.ConfigError, match="`skip_layers` names layers of the model, 0 to 1; got 2"):
        adapters.activate("a", skip_layers=[2])
    assert (adapters.setup, adapters.skipped) == ("a", (1,))
    adapters.activate("a")
    assert adapters.skipped == ()
