"""`inarch.check`: rules, evidence, memory and repairs, each against what is known by other means."""

import copy
import importlib.util
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import inarch
from inarch.check import Data, Training, report, rules
from inarch.check.rules.settings import LARGEST_STEP
from inarch.methods import read_config
from inarch.testing import PlainTransformer, tiny, tiny_inputs


def codes(report, level=None):
    return {finding.code for finding in report.findings if level in (None, finding.level)}


def finding(report, code):
    return next(found for found in report.findings if found.code == code)


def test_every_rule_has_a_code_of_its_own_and_says_why():
    assert len({rule.code for rule in rules()}) == len(rules()) >= 19
    assert all(len(rule.documentation.split()) > 15 for rule in rules())


def test_a_sound_configuration_has_no_finding():
    report = inarch.check(tiny("vit-classifier"), "seq_bn", training=Training(learning_rate=1e-3))
    assert report.findings == ()
    assert report.sound and not report.has_errors
    assert report.evidence.reached == 1


def test_the_model_is_left_as_it_was():
    model = tiny("vit-classifier").train()
    model.vit.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    inarch.check(model, "double_seq_bn|lora")
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_check_beside_adapters_leaves_them_as_they_were():
    model = tiny("vit-classifier")
    adapters = inarch.attach(model)
    adapters.add("adapter", "lora")
    adapters.train("adapter")
    before = {key: p.detach().clone() for key, p in adapters["adapter"].items()}
    assert inarch.check(model, "seq_bn").subject == "seq_bn"
    assert adapters.names == ("adapter",) and adapters.setup == "adapter"
    assert all(torch.equal(p, before[key]) for key, p in adapters["adapter"].items())


# ------------------------------------------------------------------------ evidence


def test_drift_is_the_relative_change_of_the_output():
    model = tiny("bert")
    inputs = tiny_inputs("bert")
    report = inarch.check(model, "seq_bn[init_weights_seed=5]", example_inputs=inputs)
    with torch.no_grad():
        before = model(**inputs)
        adapters = inarch.attach(model)
        adapters.add("a", "seq_bn[init_weights_seed=5]")
        adapters.activate("a")
        after = model(**inputs)
    change = sum(float((a - b).double().square().sum()) for a, b in zip(after.values(), before.values(), strict=True))
    size = sum(float(b.double().square().sum()) for b in before.values())
    assert report.evidence.drift == pytest.approx(math.sqrt(change / size), rel=1e-5)
    assert inarch.check(model, "lora", example_inputs=inputs).evidence.drift == 0  # B is zero


def test_tensors_that_cannot_learn_are_named():
    """A projection of zeros behind the attention: nothing in front of it gets a gradient."""
    model = tiny("vit")
    with torch.no_grad():
        output = model.layers[1].attention.o_proj
        output.weight.zero_()
        output.bias.zero_()
    report = inarch.check(model, "lora")
    dead = finding(report, "dead-tensors")
    assert dead.level == "error" and dead.place == "image0, layer 1"
    assert {key.split(".")[1] for key in report.evidence.dead} == {"1"}
    assert len(report.evidence.dead) == 4  # A and B of q and v
    assert report.evidence.reached == 0.5


def test_a_zero_start_is_no_dead_tensor():
    """LoRA's A has no gradient while B is zero, and gets one as soon as B moves."""
    evidence = inarch.check(tiny("gpt2"), "lora").evidence
    assert any(value == 0 for key, value in evidence.gradients.items() if key.endswith(".A"))
    assert evidence.dead == ()


def test_signal_growth_is_that_of_the_last_layers_output():
    model = tiny("vit")
    evidence = inarch.check(model, "seq_bn[residual_before_ln=False]").evidence
    assert evidence.growth["image0"] > 1.5  # the stream is added twice in each of two layers
    assert inarch.check(model, "lora").evidence.growth["image0"] == 1


@pytest.mark.parametrize("name", ["vit-classifier", "bert", "llama", "t5"])
@pytest.mark.parametrize("config", ["seq_bn", "lora"])
def test_memory_is_estimated_without_weights_within_15_percent_of_what_is_counted(name, config):
    model = tiny(name)
    inputs = tiny_inputs(name, batch=3)
    measured = inarch.check(model, config, example_inputs=inputs).memory
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    estimated = inarch.check(skeleton, config, example_inputs=inputs).memory
    assert measured.is_measured and not estimated.is_measured
    assert measured.samples == estimated.samples == 3
    assert estimated.activations == pytest.approx(measured.activations, rel=0.15)
    assert estimated.optimizer == pytest.approx(measured.optimizer, rel=0.15)


def test_memory_of_vit_b_16_is_estimated_within_15_percent():
    """Two of its twelve equal layers; `bench/memory.py` has all of them."""
    config = ViTConfig(num_hidden_layers=2)  # the defaults are those of ViT-B/16
    assert (config.hidden_size, config.patch_size, config.image_size) == (768, 16, 224)
    inputs = {"pixel_values": torch.zeros(1, 3, 224, 224)}
    with torch.device("meta"):
        skeleton = ViTForImageClassification(config)
    model = ViTForImageClassification(config).eval()
    estimated = inarch.check(skeleton, "seq_bn", example_inputs=inputs).memory
    measured = inarch.check(model, "seq_bn", example_inputs=inputs).memory
    assert measured.is_measured and not estimated.is_measured
    assert estimated.activations == pytest.approx(measured.activations, rel=0.15)
    assert estimated.optimizer == pytest.approx(measured.optimizer, rel=0.15)


def test_counted_memory_is_what_autograd_keeps_of_one_linear_map():
    """By hand: the one trained map of the head keeps its input, (2, 32) floats; nothing in front needs a gradient."""
    from inarch.check.measure import memory

    model = PlainTransformer()
    x = torch.randn(2, 5, 32)
    held = memory(model, lambda: model(x), list(model.head.parameters()), samples=2)
    assert held.activations == 2 * 32 * 4
    # a gradient and two moments for each weight, and a step counter of 4 bytes for each of two tensors
    assert held.optimizer == (32 * 3 + 3) * 4 * 3 + 2 * 4


# ------------------------------------------------------------------------ rules


def test_zero_scale_is_found_and_mended():
    found = finding(inarch.check(tiny("vit"), "seq_bn[scaling=0.0]", measure=False), "zero-scale")
    assert [dict(fix.changes) for fix in found.fixes] == [{"scaling": 1.0}]
    assert "zero-scale" not in codes(inarch.check(tiny("vit"), "seq_bn", measure=False))


@pytest.mark.parametrize(
    ("config", "code", "fix"),
    [
        ("seq_bn[reduction_factor=0.5]", "too-wide", {"reduction_factor": 16.0}),
        ("seq_bn[reduction_factor=100]", "one-unit", {"reduction_factor": 16.0}),
        ("lora[r=64]", "too-wide", {"r": 8}),
    ],
)
def test_inner_widths_that_make_no_sense_are_found(config, code, fix):
    found = finding(inarch.check(tiny("vit"), config, measure=False), code)
    assert found.level == "warning" and [dict(f.changes) for f in found.fixes] == [fix]


def test_learning_rates_that_do_not_train_are_found():
    model = tiny("vit")

    def at(config, rate, optimizer="adamw"):
        training = Training(learning_rate=rate, optimizer=optimizer)
        return codes(inarch.check(model, config, training=training, measure=False))

    assert at("seq_bn", 1e-3) == set()
    assert at("seq_bn", 5e-5) == {"small-rate"}  # the default of transformers
    assert "adapters want about 20 times more" in str(
        inarch.check(model, "seq_bn", training=Training(learning_rate=5e-5))
    )
    assert at("seq_bn[scaling=10.0]", 1e-2) == {"large-step"}
    assert at("lora[r=16,alpha=16]", 1e-2) == {"large-step"}
    assert at("seq_bn[scaling=10.0]", 1e-2, "sgd") == set()


def test_the_limits_are_those_that_the_trials_give_and_their_worth_on_tasks_left_out_is_as_documented():
    path = Path(__file__).parent.parent / "scripts" / "fit_step_rule.py"
    spec = importlib.util.spec_from_file_location("fit_step_rule", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["fit_step_rule"] = script
    spec.loader.exec_module(script)
    cells = script.read_table()
    assert sum(cell.runs for cell in cells) == 4076
    documented = {"bottleneck": (0.37, 0.85), "lora": (0.41, 0.84)}
    text = next(rule.documentation for rule in rules() if rule.code == "large-step")
    for kind, (precision, recall) in documented.items():
        own = [cell for cell in cells if cell.kind == kind]
        assert script.fit(own) == pytest.approx(LARGEST_STEP[kind], rel=0.02)
        left_out = script.cross_validate(own)
        assert round(left_out.precision, 2) == precision and round(left_out.recall, 2) == recall
        assert f"{precision:.0%}"[:-1] in text and f"{recall:.0%}"[:-1] in text


def test_an_adapter_that_reaches_few_mixers_is_found():
    """A hybrid: one attention among five layers of another mixer."""
    from inarch.check import report
    from inarch.core.site import Projection, Site, Sites, Tap
    from inarch.methods import read_config

    q = (Projection(path="q", in_features=8, out_features=8),)

    def site(layer, kind):
        return Site(
            stack="text0", layer=layer, role=kind, kind=kind, layer_path=f"layers.{layer}", layer_class="Layer",
            width=8, arrangement="pre", output=Tap(path="mixer", side="out"),
            projections={"q": q, "v": q} if kind == "self_attention" else {},
        )  # fmt: skip

    kinds = ["mixer", "self_attention", "mixer", "mixer", "mixer", "mixer"]
    sites = Sites(sites=tuple(site(n, kind) for n, kind in enumerate(kinds)), model_class="Hybrid")
    found = finding(report(sites, "a", {"a": read_config("lora[r=2]")}), "partial-reach")
    assert found.level == "error" and "1 of 6" in found.message and found.place == "text0, layers 0, 2-5"
    left_out = report(sites, "a", {"a": read_config("lora[r=2,leave_out=[0,2,3,4,5]]")})
    assert "partial-reach" not in codes(left_out)
    assert "partial-reach" not in codes(report(sites, "a", {"a": read_config("double_seq_bn[output_adapter=False]")}))


def test_what_is_frozen_and_what_is_not():
    model = tiny("vit-classifier")
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.activate("a")
    assert "base-trainable" in codes(inarch.check(model, measure=False), "error")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()
    assert codes(inarch.check(model, measure=False), "error") == {"nothing-trainable"}
    model.eval()
    adapters.train("a")
    assert codes(inarch.check(model, measure=False)) == set()


def test_a_random_head_that_is_frozen_is_found_and_a_trained_one_is_not():
    model = tiny("vit-classifier")
    torch.manual_seed(0)
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.train("a", head=False)
    found = finding(inarch.check(model, measure=False), "head-frozen")
    assert "`classifier`" in found.place
    with torch.no_grad():
        model.classifier.bias.add_(0.1)  # as after training
    assert "head-frozen" not in codes(inarch.check(model, measure=False))


def test_half_precision_weights_batch_norms_and_dropout():
    model = tiny("vit-classifier").to(torch.bfloat16)
    adapters = inarch.attach(model)
    adapters.add("a", "seq_bn")
    adapters.train("a")
    assert "half-precision" in codes(inarch.check(model, measure=False), "warning")
    for parameter in adapters["a"].values():
        parameter.data = parameter.data.float()
    assert "half-precision" not in codes(inarch.check(model, measure=False))

    class Normed(PlainTransformer):
        def __init__(self):
            super().__init__()
            self.batch_norm = nn.BatchNorm1d(32)
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            return super().forward(self.drop(self.batch_norm(x.transpose(1, 2)).transpose(1, 2)))

    plain = Normed()
    handle = inarch.attach(plain, example_inputs=torch.randn(2, 5, 32))
    handle.add("a", "seq_bn")
    handle.train("a", head=["head"])
    plain.train()
    assert codes(inarch.check(plain, measure=False)) == {"batch-norm-in-training", "dropout-in-base"}
    plain.eval()
    assert codes(inarch.check(plain, measure=False)) == set()


def test_data_that_disagree_with_the_model():
    model = tiny("vit-classifier")

    def at(**known):
        pixels = known.pop("pixels", torch.randn(2, 3, 32, 32))
        report = inarch.check(model, "seq_bn", example_inputs={"pixel_values": pixels}, data=Data(**known))
        return codes(report)

    assert at(labels=tuple("abcde"), label_ids=(0, 4)) == set()
    assert at(labels=tuple("abc")) == {"labels-disagree"}
    assert at(label_ids=(1, 5)) == {"label-ids"}
    assert at(pixels=torch.rand(2, 3, 32, 32)) == {"images-not-normalised"}
    model.config.id2label = dict(enumerate("edcba"))
    assert at(labels=tuple("abcde")) == {"labels-disagree"}
    report = inarch.check(model, "seq_bn", example_inputs={"pixel_values": torch.rand(2, 3, 32, 32) * 255}, data=Data())
    assert codes(report, "error") == {"images-not-normalised"}


def test_a_skip_lost_under_a_layer_scale_is_named_as_such():
    probed = inarch.probe(tiny("vit"))
    scaled = replace(probed, sites=tuple(replace(site, exact=False) for site in probed))
    found = finding(report(scaled, "a", {"a": read_config("seq_bn[original_ln_after=False]")}), "unsound-wiring")
    assert "skip connection lost; with a zero adapter branch `y = x + s(-x + h + A(x + h))`" in found.message
    assert "taken out again, at the scale that the layer gives its branch" in found.message
    assert [str(fix) for fix in found.fixes] == ["residual_before_ln=False", "original_ln_after=True"]


def test_images_of_another_size_than_the_base_saw_are_found():
    model = tiny("vit-classifier")
    for size, is_found in (((24, 24), True), ((32, 32), False)):
        report = inarch.check(model, "seq_bn", measure=False, data=Data(pixel_size=size))
        assert ("images-of-other-size" in codes(report)) == is_found


@pytest.mark.parametrize(
    ("setting", "fixes"),
    [
        ("lora[dropout=1.0]", [{"dropout": 0.0}]),
        ("lora[alpha=0]", [{"alpha": 8.0}]),
        ("lora[r=0]", [{"r": 8}]),
        ("seq_bn[dropout=1.0,reduction_factor=-2]", [{"dropout": 0.0}, {"reduction_factor": 16.0}]),
        ("mam[dropout=1]", [{"dropout": 0.0}, {"dropout": 0.0}]),  # of the prefix, and of the bottleneck
        ({"methods": [{"method": "lora", "r": 0}]}, [{"r": 8}]),
    ],
)
def test_numbers_that_can_mean_nothing_are_found_and_refused(setting, fixes):
    model = tiny("vit")
    report = inarch.check(model, setting, measure=False)
    found = [one for one in report.findings if one.code == "out-of-range"]
    assert [dict(fix.changes) for one in found for fix in one.fixes] == fixes
    assert report.has_errors and not report.sound
    assert "there can be no such adapter" in str(report) and "preserved" not in str(report)
    assert all(f"{one}" in report.subject for entry in fixes for one in entry)
    with pytest.raises(inarch.ConfigError, match=r"must be (less than|more than|at least) \d; got"):
        inarch.attach(model).add("a", setting)


def test_other_errors_than_a_number_out_of_range_are_told_together():
    for setting in (
        "lora[r=0,foo=1]",
        "lora[r=0]|nothing",
        "lora[dropout=text]",
        {"methods": [{"method": "x", "r": 0}]},
    ):
        with pytest.raises(inarch.ConfigError, match=r"has no field `foo`|begins with a preset|a number|name a method"):
            inarch.check(tiny("vit"), setting, measure=False)


def test_a_number_out_of_range_does_not_hide_what_else_is_wrong():
    report = inarch.check(tiny("vit"), "seq_bn[dropout=1,original_ln_after=False]", measure=False)
    assert codes(report) == {"out-of-range", "unsound-wiring"}
    assert all(found.fixes for found in report.findings)
    report = inarch.check(tiny("vit"), "lora[r=0,leave_out=[0,1]]", measure=False)
    assert codes(report) == {"out-of-range", "no-such-place"}
    assert all(found.fixes for found in report.findings)


def test_a_branch_that_is_taken_out_is_measured_without_a_tensor():
    report = inarch.check(tiny("vit"), "mute[roles=[mlp]]")
    assert report.evidence.gradients == {} and report.evidence.dead == () and report.evidence.drift > 0


def test_one_finding_says_what_equal_sites_of_several_widths_have_in_common():
    report = inarch.check(tiny("swinv2"), "double_seq_bn[original_ln_after=False]", measure=False)
    assert len(report.sites) > 2
    (found,) = report.findings
    stacks = {site.stack for group in report.sites for site in group.sites}
    assert all(f"{stack} {role}, layers 0-" in found.place for stack in stacks for role in ("self_attention", "mlp"))


def test_fixes_that_would_bring_another_error_are_not_offered():
    """The scale is mended on its own, and each wiring repair leaves the scale as a finding of its own."""
    report = inarch.check(tiny("vit"), "seq_bn[original_ln_after=False,scaling=0.0]", measure=False)
    assert codes(report) == {"unsound-wiring", "zero-scale"}
    assert [str(fix) for fix in finding(report, "unsound-wiring").fixes] == [
        "residual_before_ln=False",
        "original_ln_after=True",
    ]


def test_the_founding_case_says_what_the_two_repairs_have_in_common():
    case = "seq_bn[original_ln_after=False]"
    on_vit = finding(inarch.check(tiny("vit"), case, measure=False), "unsound-wiring")
    assert on_vit.advice == "They compute the same function, `y = x + h + A(x + h)`."
    on_bert = finding(inarch.check(tiny("bert"), case, measure=False), "unsound-wiring")
    assert "they are different functions" in on_bert.advice


def test_the_page_of_findings_is_what_the_rules_say():
    script = Path(__file__).parent.parent / "scripts" / "docs_findings.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)
