"""The program that the forward runs: the same operations as the wiring, in the same order."""

import itertools
import pickle
from typing import get_args

import pytest
import torch

from inarch.compose import Stack, names
from inarch.core.program import Recorder
from inarch.core.site import Site, Tap
from inarch.core.wiring import Circuit
from inarch.methods import methods, read_config
from inarch.plan import formula
from inarch.programs import WiredAdapter, linear_program, rewire, sum_program

FLAGS = ("original_ln_before", "original_ln_after", "is_parallel", "ln_after", "adapter_residual_before_ln")
CONFIGS = [
    {**dict(zip(FLAGS, flags, strict=True)), "residual_before_ln": residual}
    for flags in itertools.product((False, True), repeat=len(FLAGS))
    for residual in (True, False, "post_add")
]
SETUPS = ["a", Stack("a", "b"), Stack("b", "a", "b")]


class Branch:
    """A branch and a norm that are neither linear nor alike, so that a swapped or a left out step shows."""

    def __init__(self, number):
        self.number = number

    def branch(self, z):
        return torch.tanh(z * (1.5 + self.number))

    def norm_branch(self, w):
        return torch.sin(w + self.number)


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_program_does_what_the_wiring_does_to_the_last_bit(setup, post):
    method = methods()["bottleneck"]
    norm = torch.nn.LayerNorm(8) if post else None
    x, h, g = (torch.randn(2, 3, 8) for _ in range(3))
    other = method.config_class(original_ln_before=True)
    for values, circuit, joins in itertools.product(CONFIGS, get_args(Circuit), (False, True)):
        config = method.config_class(**values)
        wired = {
            "a": WiredAdapter(config, method, Branch(0), circuit),
            "b": WiredAdapter(other, method, Branch(1), circuit),
        }
        wired = {name: wired[name] for name in names(setup)}
        program = sum_program(setup, wired, norm, joins_others=joins)
        expected = rewire(setup, wired, x, h, others=g if joins else None, norm=norm)
        branch, output = program(x, h, g)
        assert torch.equal(branch, expected.branch), values
        assert (output is None) == (expected.output is None), values
        assert output is None or torch.equal(output, expected.output), values


@pytest.mark.parametrize("post", [False, True])
def test_a_program_reads_the_stream_where_its_formula_does(post):
    """And where it does not, it runs without a stream."""
    method = methods()["bottleneck"]
    norm = torch.nn.LayerNorm(8) if post else None
    site = Site(
        stack="text0",
        layer=0,
        role="mlp",
        kind="mlp",
        layer_path="layers.0",
        layer_class="Layer",
        width=8,
        arrangement="post" if post else "pre",
        output=Tap(path="mlp", side="out"),
        post_norm="norm" if post else None,
    )
    seen = set()
    for values in CONFIGS:
        config = method.config_class(**values)
        wired = {"a": WiredAdapter(config, method, Branch(0), "own")}
        program = sum_program("a", wired, norm, joins_others=False)
        found = formula(site, "a", {"a": read_config(config)})
        assert program.reads(0) == found.reads_stream, values
        assert program.gives(1) == found.passes_norm
        seen.add(program.reads(0))
        if not program.reads(0):
            program(None, torch.randn(2, 3, 8), None)
    assert seen == {False, True}


def test_linear_methods_run_in_the_order_of_the_setup():
    class Method:
        changes_input = False

        def __init__(self, factor):
            self.factor = factor

        def __call__(self, inputs, output):
            return output * self.factor + inputs

    modules = {"a": [Method(2), Method(3)], "b": [Method(5)]}
    result = linear_program(Stack("a", "b", "a"), modules)(torch.ones(2), torch.ones(2))
    # each step: times its factor, plus one
    assert result.tolist() == [(((((1 * 2 + 1) * 3 + 1) * 5 + 1) * 2 + 1) * 3 + 1)] * 2


def test_a_program_is_plain_data():
    recorder = Recorder(2)
    x, h = recorder.arguments
    program = pickle.loads(pickle.dumps(recorder.program(x + h * 3, None)))
    assert program(1, 2) == (7, None)
    assert program.gives(0) and not program.gives(1)
    assert program.reads(0) and program.reads(1)
    assert not Recorder(2).program(h).reads(0)
