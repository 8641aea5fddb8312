"""Every finding, by code: a case in which it is told, and the same case put right, in which it is not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import inarch
from inarch.check import Data, Training, report, rules
from inarch.methods import read_config
from inarch.testing import PlainTransformer, tiny

PEFT = Path(__file__).parent / "fixtures" / "peft"
CASES = {}


def case(code):
    """Register a function of a folder and of whether all is right, whose report has the finding where it is not."""

    def register(function):
        CASES[code] = function
        return function

    return register


def of_check(wrong, right):
    """A case that lies in what `check` is told: the configuration, the training or the data."""

    def run(_, is_right):
        return inarch.check(
            tiny("vit-classifier"), **{"config": "seq_bn", "measure": False} | (right if is_right else wrong)
        )

    return run


def of_config(wrong, right):
    return of_check({"config": wrong}, {"config": right})


def of_training(wrong, right):
    return of_check({"training": Training(learning_rate=wrong)}, {"training": Training(learning_rate=right)})


def of_data(wrong, right):
    return of_check({"data": Data(**wrong)}, {"data": Data(**right)})


def trained(model=None, config="seq_bn", **options):
    adapters = inarch.attach(model if model is not None else tiny("vit-classifier"))
    adapters.add("a", config)
    adapters.train("a", **options)
    return adapters


CASES["unsound-wiring"] = of_config("seq_bn[original_ln_after=False]", "seq_bn")
CASES["zero-scale"] = of_config("seq_bn[scaling=0.0]", "seq_bn[scaling=0.1]")
CASES["out-of-range"] = of_config("lora[dropout=1.0]", "lora[dropout=0.9]")
CASES["no-such-place"] = of_config("lora[leave_out=[0,1]]", "lora[leave_out=[0]]")
CASES["too-wide"] = of_config("lora[r=32]", "lora[r=31]")
CASES["one-unit"] = of_config("seq_bn[reduction_factor=33]", "seq_bn[reduction_factor=32]")
CASES["large-step"] = of_training(0.04, 0.02)
CASES["small-rate"] = of_training(5e-5, 3e-4)
CASES["labels-disagree"] = of_data({"labels": tuple("abc")}, {"labels": tuple("abcde")})
CASES["label-ids"] = of_data({"label_ids": (1, 5)}, {"label_ids": (0, 4)})
CASES["images-not-normalised"] = of_data({"pixel_range": (0.0, 1.0)}, {"pixel_range": (-1.0, 1.0)})
CASES["images-of-other-size"] = of_data({"pixel_size": (24, 32)}, {"pixel_size": (32, 32)})


@case("base-trainable")
def _(folder, is_right):
    adapters = trained()
    adapters.add("other", "lora")  # what another adapter trains is not the base
    adapters.model.vit.layernorm.weight.requires_grad_(not is_right)
    return adapters.check(measure=False)


@case("nothing-trainable")
def _(folder, is_right):
    adapters = trained()
    adapters.model.train()
    for parameter in adapters["a"].values():
        parameter.requires_grad_(is_right)
    return adapters.check(measure=False)


@case("head-frozen")
def _(folder, is_right):
    model = tiny("vit-classifier")
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    return trained(model, head=is_right).check(measure=False)


@case("half-precision")
def _(folder, is_right):
    adapters = trained()
    if not is_right:
        adapters.model.to(torch.bfloat16)
    return adapters.check(measure=False)


class WithBatchNorm(PlainTransformer):
    """A base with a batch norm and a dropout in front of its layers."""

    def __init__(self):
        super().__init__()
        self.batch_norm, self.drop = nn.BatchNorm1d(32), nn.Dropout(0.1)

    def forward(self, x):
        return super().forward(self.drop(self.batch_norm(x.transpose(1, 2)).transpose(1, 2)))


def in_training(**stay):
    model = WithBatchNorm()
    inarch.attach(model, example_inputs=torch.randn(2, 5, 32))
    adapters = trained(model, head=["head"])
    model.train()
    for name, is_training in stay.items():
        model.get_submodule(name).train(is_training)
    return adapters.check(measure=False)


@case("batch-norm-in-training")
def _(folder, is_right):
    return in_training(batch_norm=not is_right)


@case("dropout-in-base")
def _(folder, is_right):
    return in_training(drop=not is_right)


@case("dead-tensors")
def _(folder, is_right):
    model = tiny("vit")
    if not is_right:
        nn.init.zeros_(model.layers[1].attention.o_proj.weight)
    return inarch.check(model, "lora")


@case("partial-reach")
def _(folder, is_right):
    """A hybrid: the mixer of the second layer is no attention, and has no q and v."""
    found = inarch.probe(tiny("vit"))
    mixers = [replace(site, projections={}) if site.key == "image0.1.self_attention" else site for site in found]
    sites = replace(found, sites=tuple(mixers))
    return report(sites, "a", {"a": read_config("double_seq_bn" if is_right else "lora")})


@case("other-base")
def _(folder, is_right):
    trained().save("a", folder / "a")
    return inarch.check(tiny("vit-classifier", seed=0 if is_right else 5), folder / "a", measure=False)


@case("head-not-found")
def _(folder, is_right):
    trained().save("a", folder / "a")
    model = tiny("vit-classifier")
    return inarch.check(model if is_right else model.vit, folder / "a", measure=False)


def of_peft(name, folder, **changes):
    shutil.copytree(PEFT / name, folder / "a")
    record = json.loads((folder / "a" / "adapter_config.json").read_text())
    (folder / "a" / "adapter_config.json").write_text(json.dumps(record | changes))
    return folder / "a"


@case("base-unknown")
def _(folder, is_right):
    changes = {} if is_right else {"base_model_name_or_path": "meta/little"}  # ours is of no name
    return inarch.check(tiny("llama-lm"), of_peft("llama_patterns", folder, **changes), measure=False)


@case("matched-nothing")
def _(folder, is_right):
    changes = {} if is_right else {"target_modules": ["query", "valeu"]}  # it has `query` alone
    return inarch.check(tiny("bert-classifier"), of_peft("bert_task", folder, **changes), measure=False)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.code)
def test_a_finding_is_told_where_it_is_so_and_nowhere_else(rule, tmp_path):
    for is_right in (False, True):
        folder = tmp_path / str(is_right)
        folder.mkdir()
        found = [one for one in CASES[rule.code](folder, is_right).findings if one.code == rule.code]
        assert (found == []) == is_right
        assert all(
            one.place and one.message and (one.fixes or one.advice or one.code == "head-not-found") for one in found
        )
