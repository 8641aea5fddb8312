"""Write what the library `adapters` 1.3.0 computes with compositions, fusion layers and averages of adapters.

    python scripts/make_composition_fixtures.py tests/fixtures/composition

Runs in an environment with that library: `pip install torch==2.13.0 adapters==1.3.0`. For each model it writes

    base/                 a tiny base model with random weights
    inputs.safetensors    the arguments of its forward
    a/ b/ c/ d/           two bottlenecks and two LoRA adapters with random weights, saved by the library
    dynamic/ static/      fusion layers of `a` and `b` with random weights, saved by the library
    outputs.safetensors   the last hidden state, one tensor for each case
"""

import argparse
import logging
import shutil
import warnings
from pathlib import Path

import adapters
import torch
import transformers as tf
from adapters import BnConfig, LoRAConfig
from adapters.composition import BatchSplit, Fuse, Parallel, Split, Stack
from safetensors.torch import save_file

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

ENCODER = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
MODELS = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**ENCODER, vocab_size=24, max_position_embeddings=16)),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**ENCODER, image_size=16, patch_size=8)),
}
BOTTLENECK = BnConfig(mh_adapter=True, output_adapter=True, reduction_factor=4, non_linearity="gelu",
                      original_ln_before=True)  # fmt: skip
LORA = LoRAConfig(intermediate_lora=True, r=2, alpha=4)
SETUPS = {
    "stack": Stack("a", "b"),
    "split": Split("a", "b", splits=[2, 3]),
    "batch_split": BatchSplit("a", "b", batch_sizes=[1, 2]),
    "parallel": Parallel("a", "b"),
    "lora_batch_split": BatchSplit("c", "d", batch_sizes=[1, 2]),
    "lora_parallel": Parallel("c", "d"),
}
AVERAGES = {
    "linear": {},
    "negate_b": {"combine_strategy": "lora_linear_only_negate_b"},
    "svd": {"combine_strategy": "lora_delta_w_svd", "svd_rank": 4},
}


@torch.no_grad()
def write(name: str, folder: Path) -> None:
    """One model with all its cases."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder / "base")
    inputs = (
        {"input_ids": torch.randint(1, 24, (3, 5))} if name == "bert" else {"pixel_values": torch.randn(3, 3, 16, 16)}
    )
    save_file(inputs, folder / "inputs.safetensors")
    adapters.init(model)
    for key in "abcd":
        model.add_adapter(key, config=BOTTLENECK if key in "ab" else LORA)
        shake(model, f".{key}.")
        model.save_adapter(str(folder / key), key)
    outputs = {}
    for case, setup in SETUPS.items():
        model.set_active_adapters(setup)
        try:
            outputs[case] = model(**inputs).last_hidden_state
        except RuntimeError as error:  # a setup that the library takes and cannot run
            print(f"{name} {case}: {error}")
    for kind in ("dynamic", "static"):
        model.add_adapter_fusion(["a", "b"], config=kind)
        shake(model, "adapter_fusion_layer")
        model.set_active_adapters(Fuse("a", "b"))
        outputs[f"fuse_{kind}"] = model(**inputs).last_hidden_state
        model.save_adapter_fusion(str(folder / kind), "a,b")
        model.set_active_adapters(None)
        model.delete_adapter_fusion(["a", "b"])
    for case, options in AVERAGES.items():
        model.average_adapter(case, ["c", "d"], [3.0, -1.0], **options)
        model.set_active_adapters(case)
        outputs[f"average_{case}"] = model(**inputs).last_hidden_state
    save_file({key: value.contiguous() for key, value in outputs.items()}, folder / "outputs.safetensors")


def shake(model: torch.nn.Module, part: str) -> None:
    """Move parameters off their initial values."""
    for key, parameter in model.named_parameters():
        if part in key:
            parameter.add_(torch.randn_like(parameter) * 0.3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for model_name in MODELS:
        write(model_name, folder / model_name)
