"""`torch.export` and ONNX of a model with adapters, run on batches of another size than it was exported with."""

import pytest
import torch
from little_adapters import active
from torch import nn
from torch.export import Dim, export

from inarch.testing import tiny, tiny_inputs

CONFIGS = ["double_seq_bn[original_ln_before=True]", "adapter_plus", "par_bn|lora[init_weights=bert]"]


class Last(nn.Module):
    """The last hidden state alone, of a model called with its main input alone: what a program takes and returns."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(**{self.model.main_input_name: x}).last_hidden_state


def adapted(name, config):
    model = tiny(name)
    adapters = active(model, config)
    return model, adapters


def input_of(name, **options):
    (x,) = tiny_inputs(name, **options).values()
    return x


def exported(model, name):
    return export(Last(model).eval(), (input_of(name),), dynamic_shapes={"x": {0: Dim("batch")}})


@pytest.mark.parametrize(
    ("name", "config"), [*(("vit", config) for config in CONFIGS), ("bert", CONFIGS[0]), ("llama", CONFIGS[2])]
)
@torch.no_grad()
def test_an_exported_program_computes_the_same_for_any_batch(name, config):
    model, adapters = adapted(name, config)
    program = exported(model, name).module()
    for batch in (2, 5, 1):
        x = input_of(name, batch=batch, seed=batch)
        assert torch.allclose(program(x), Last(model)(x), rtol=0, atol=1e-5)
    adapters.deactivate()
    assert not torch.allclose(program(x), Last(model)(x), atol=1e-3)


@torch.no_grad()
def test_a_model_without_an_active_adapter_is_exported_as_the_base():
    model, adapters = adapted("vit", CONFIGS[0])
    adapters.deactivate()
    operators = [[node.target for node in exported(one, "vit").graph.nodes if node.op == "call_function"]
                 for one in (model, tiny("vit"))]  # fmt: skip
    assert operators[0] == operators[1]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # torch's exporter of torch itself
@pytest.mark.parametrize("config", ["adapter_plus", "double_seq_bn[original_ln_before=True]|lora[init_weights=bert]"])
def test_onnx_computes_the_same(config, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, adapters = adapted("vit", config)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Last(model).eval(), (input_of("vit"),), path, dynamo=True, verbose=False,
        dynamic_shapes={"x": {0: Dim("batch")}},
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch in (2, 3):
        x = input_of("vit", batch=batch, seed=batch)
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        with torch.no_grad():
            assert torch.allclose(found, Last(model)(x), rtol=0, atol=1e-5)
    with torch.no_grad(), adapters.using(None):
        assert not torch.allclose(found, Last(model)(x), atol=1e-3)
