"""Methods against their formulas, and what single options do; what all of them keep is in `test_contract.py`."""

import pytest
import torch
from little_adapters import awake

import inarch
from inarch import Stack
from inarch.methods import read_config
from inarch.testing import tiny, tiny_inputs


def output(model, name, **changes):
    """Every tensor of the model's output that training sees, in one."""
    found = model(**(tiny_inputs(name) | changes))
    kept = [found[key] for key in ("last_hidden_state", "logits", "image_embeds", "text_embeds") if key in found]
    if "encoder_last_hidden_state" in found:
        kept.append(found["encoder_last_hidden_state"])
    return torch.cat([tensor.flatten(1) for tensor in kept], dim=1)


@torch.no_grad()
def still(model, name):
    """The output without a graph: attention kernels may differ in the last bit between the two."""
    return output(model, name)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "t5"])
def test_a_stack_is_its_adapters_one_after_the_other(name):
    """Against the formula: the second adapter's input is the site output after the first."""
    model = tiny(name)
    adapters = inarch.attach(model)
    for key in "ab":
        adapters.add(key, "bottleneck[reduction_factor=4]")
        awake(adapters, key)
    adapters.activate(Stack("a", "b"))
    stacked = output(model, name)
    adapters.deactivate()
    handles = []
    for site in adapters.sites:
        if site.kind != "mlp":
            continue
        modules = {key: _module(model, site, key) for key in "ab"}
        handles.append(
            model.get_submodule(site.absolute(site.output.path)).register_forward_hook(_by_hand(site, modules))
        )
    assert torch.allclose(output(model, name), stacked, atol=1e-6)
    for handle in handles:
        handle.remove()


def _module(model, site, name):
    from inarch.attach import modules_at, slot_of

    return modules_at(slot_of(model, site), name).find("bottleneck")


def _by_hand(site, modules):
    def run(module, args, result):
        h = result[0] if site.output.key else result
        for adapter in modules.values():
            h = h + adapter.up(torch.relu(adapter.down(h)))
        return (h, *result[1:]) if site.output.key else h

    return run


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
def test_lora_is_a_change_of_the_weight(name):
    """Hu et al. 2021, section 4.1: W + (alpha / r) B A, written into the weight, gives the same output."""
    model = tiny(name)
    adapters = inarch.attach(model)
    adapters.add("a", "lora[r=3,alpha=5,attn_matrices=[q,k,v,o],intermediate_lora=True,output_lora=True]")
    awake(adapters, "a")
    adapters.activate("a")
    expected = output(model, name)
    adapters.deactivate()
    with torch.no_grad():
        for site in adapters.sites:
            for role, projections in site.projections.items():
                if role == "gate":
                    continue
                for projection in projections:
                    weight = model.get_submodule(site.absolute(projection.path)).weight
                    view = weight.T if projection.transposed else weight
                    update = adapters["a"][f"{site.key}.lora.{role}.B"] @ adapters["a"][f"{site.key}.lora.{role}.A"]
                    rows = projection.rows or ((0, projection.out_features),)
                    place = 0
                    for start, stop in rows:
                        view[start:stop] += update[place : place + stop - start] * 5 / 3
                        place += stop - start
    assert torch.allclose(output(model, name), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("after", [True, False])
def test_ia3_is_a_scale_of_the_weight(name, after):
    """Liu et al. 2022, section 3.3: rows and biases of K and V by l_k and l_v, the MLP's inner side by l_ff."""
    model = tiny(name)
    adapters = inarch.attach(model)
    adapters.add("a", f"ia3[alpha=1.5,after_activation={after},attn_matrices=[q,k,v],output_lora=True]")
    awake(adapters, "a")
    adapters.activate("a")
    expected = output(model, name)
    adapters.deactivate()
    with torch.no_grad():
        for key, scale in adapters["a"].items():
            site_key, _, role, side = key.rsplit(".", 3)
            site = adapters.sites[site_key]
            (projection,) = site.projections[role]
            module = model.get_submodule(site.absolute(projection.path))
            weight = module.weight.T if projection.transposed else module.weight
            if side == "input_scale":
                weight *= scale * 1.5
                continue
            ((start, stop),) = projection.rows or ((0, projection.out_features),)
            weight[start:stop] *= scale[:, None] * 1.5
            if module.bias is not None:
                module.bias[start:stop] *= scale * 1.5
    assert torch.allclose(output(model, name), expected, atol=2e-5)


def test_ia3_scales_by_default_where_the_paper_does():
    """Not before the activation; in an MLP with a gate there is no difference between the two places."""
    for name, same in (("vit", False), ("llama", True)):
        model = tiny(name)
        adapters = inarch.attach(model)
        for key, after in (("a", True), ("b", False)):
            adapters.add(key, f"ia3[selfattn_lora=False,after_activation={after}]")
        for value, other in zip(adapters["a"].values(), adapters["b"].values(), strict=True):
            value.data = other.data = torch.rand(value.shape) + 0.5
        outputs = []
        for key in "ab":
            adapters.activate(key)
            outputs.append(still(model, name))
        assert torch.allclose(*outputs, atol=1e-5) == same


@pytest.mark.parametrize("config", ["ia3[selfattn_lora=False,intermediate_lora=False]", "ia3[attn_matrices=[]]"])
def test_ia3_without_a_projection_is_refused(config):
    with pytest.raises(inarch.ConfigError, match="must (be true|name a projection).* got (none|an empty list)"):
        read_config(config)


def test_a_muted_branch_leaves_nothing_even_where_it_is_no_number():
    """Infinity times 0 is none."""
    model = tiny("vit")
    adapters = inarch.attach(model)
    adapters.add("a", "mute[roles=[mlp]]", unsound="allow")
    adapters.activate("a")
    before = still(model, "vit")
    with torch.no_grad():
        for site in adapters.sites:
            for projection in site.projections.get("down", ()):
                model.get_parameter(f"{site.layer_path}.{projection.path}.bias").fill_(torch.inf)
    assert torch.equal(still(model, "vit"), before)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_muted_branch_adds_nothing(name):
    model = tiny(name)
    adapters = inarch.attach(model)
    with pytest.raises(inarch.ConfigError, match=r"mute\[roles=\[mlp\]\].*\n.*branch lost.*goes on without"):
        adapters.add("a", "mute[roles=[mlp]]")
    adapters.add("a", "mute[roles=[mlp]]|lora", unsound="allow")
    adapters.activate("a")
    found = still(model, name)
    adapters.detach()
    assert not torch.allclose(still(model, name), found)
    with torch.no_grad():
        for site in adapters.sites:
            for projection in site.projections.get("down", ()):
                module = model.get_submodule(site.absolute(projection.path))
                module.weight.zero_()
                module.bias.zero_()
    assert torch.equal(still(model, name), found)


def test_roles_that_are_left_out_have_no_modules():
    adapters = inarch.attach(tiny("bart"))
    config = "double_seq_bn[cross_adapter=True,leave_out_roles=[mlp]]|lora[leave_out_roles=[self_attention]]"
    adapters.add("a", f"{config}|ia3[leave_out_roles=[cross_attention]]")
    modules = {".".join(key.split(".")[2:4]) for key in adapters["a"]}
    assert modules == {
        *("self_attention.bottleneck", "cross_attention.bottleneck", "cross_attention.lora"),
        *("self_attention.ia3", "mlp.ia3"),
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("mute[roles=[mlp_2]]", r"`roles` names sites.*got `mlp_2` for .*which has `mlp`, `self_attention`"),
        ("mute[roles=[]]", "must name a branch; got an empty list"),
        ("lora[leave_out_roles=[mlp_2]]", "`leave_out_roles` names sites"),
        ("seq_bn[leave_out_roles=[mlp_2]]", "`leave_out_roles` names sites"),
        ("seq_bn|mute[roles=[mlp]]", "One method of an adapter plugs into a sum; got `bottleneck` and `mute` at site"),
    ],
)
def test_roles_and_sums_are_checked(config, message):
    with pytest.raises(inarch.ConfigError, match=message):
        inarch.attach(tiny("vit")).add("a", config)


def test_seeded_initial_weights_repeat_and_differ_from_layer_to_layer():
    model = tiny("vit")
    adapters = inarch.attach(model)
    for name in "ab":
        adapters.add(name, "seq_bn[init_weights_seed=0]|lora[init_weights_seed=3]")
    for key, value in adapters["a"].items():
        assert torch.equal(value, adapters["b"][key])
    first, second = (adapters["a"][f"image0.{layer}.mlp.bottleneck.down.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("scheme", "std"), [("bert", 0.02), ("houlsby", 0.0088)])
def test_initial_weights_have_the_named_distribution(scheme, std):
    """A normal of std 0.01 cut at two of them has std 0.0088."""
    model = tiny("vit")
    adapters = inarch.attach(model)
    adapters.add("a", f"seq_bn[init_weights={scheme},reduction_factor=0.0625]")
    weight = adapters["a"]["image0.0.mlp.bottleneck.down.weight"]
    assert weight.shape == (512, 32)
    assert weight.std().item() == pytest.approx(std, rel=0.03)
    if scheme == "houlsby":
        assert weight.abs().max() <= 0.02
    assert adapters["a"]["image0.0.mlp.bottleneck.down.bias"].abs().sum() == 0


def test_dropout_acts_in_training_only():
    model = tiny("vit")
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn[dropout=0.5]|lora[dropout=0.5,init_weights=bert]")
    adapters.activate("a")
    awake(adapters, "a")
    model.eval()
    assert torch.equal(output(model, "vit"), output(model, "vit"))
    model.train()
    assert not torch.equal(output(model, "vit"), output(model, "vit"))


def test_a_per_layer_reduction_factor_and_leave_out_reach_the_layers_named():
    model = tiny("t5")
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn[reduction_factor={'0':2,'3':8,'default':4},leave_out=[1]]")
    widths = {key.split(".mlp")[0]: p.shape[0] for key, p in adapters["a"].items() if key.endswith("down.weight")}
    assert widths == {"text0.0": 16, "text1.0": 8, "text1.1": 4}


def test_autocast_and_inference_mode_run():
    model = tiny("vit")
    adapters = inarch.attach(model)
    adapters.add("a", "double_seq_bn|lora[init_weights=bert]")
    adapters.activate("a")
    with torch.inference_mode():
        expected = output(model, "vit")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(output(model, "vit").float(), expected, atol=0.1)


@pytest.mark.parametrize(("name", "warns"), [("llama", True), ("gpt2-lm", True), ("t5", True), ("bert", False)])
@pytest.mark.parametrize("config", ["seq_bn[use_gating=True]", "lora[use_gating=True]"])
def test_a_gate_on_a_causal_model_comes_with_a_warning(name, warns, config, caplog):
    adapters = inarch.attach(tiny(name))
    adapters.add("plain", "seq_bn|lora")
    assert not caplog.records
    adapters.add("gated", config)
    assert ["a token sees later ones" in record.getMessage() for record in caplog.records] == [True] * warns


def test_a_gate_is_a_mean_over_later_tokens_too():
    model, ids = tiny("llama"), tiny_inputs("llama")["input_ids"]
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn[use_gating=True]")
    adapters.activate("a")
    awake(adapters, "a", 0.5)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 7) % 90 + 3
    first, second = (model(rows).last_hidden_state[:, :-1] for rows in (ids, other))
    assert not torch.equal(first, second)
    adapters.deactivate()
    first, second = (model(rows).last_hidden_state[:, :-1] for rows in (ids, other))
    assert torch.equal(first, second)
