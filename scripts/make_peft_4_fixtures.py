"""Write tests/fixtures/peft_4: adapters of PEFT made under transformers 4, whose module names it no longer finds.

    python -m venv old && old/bin/pip install torch==2.13.0 transformers==4.57.6 accelerate==1.11.0 peft==0.21.2
    old/bin/python scripts/make_peft_4_fixtures.py

Each folder of a model holds its base and a folder for each adapter, with the inputs and what PEFT computed.
"""

import shutil
from pathlib import Path

import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, SwinConfig, SwinModel, ViTConfig, ViTForImageClassification

FOLDER = Path(__file__).parent.parent / "tests" / "fixtures" / "peft_4"
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
_STAGES = {"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2, "image_size": 16, "patch_size": 4}
BASES = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**_SIZES, intermediate_size=24, num_labels=3)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_SIZES, mlp_ratio=2)),
    "swin": lambda: SwinModel(SwinConfig(**_STAGES)),
}
CASES = {
    "vit/classifier": LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], modules_to_save=["classifier"]),
    "vit/dense": LoraConfig(
        r=2, use_rslora=True, target_modules=["key", "dense"], rank_pattern={"intermediate.dense": 3}
    ),
    "vit/ia3": IA3Config(
        target_modules=["key", "value", "layer.0.output.dense"], feedforward_modules=["layer.0.output.dense"]
    ),
    "dinov2/one_layer": LoraConfig(r=2, target_modules=["query", "fc1"], layers_to_transform=[1]),
    "swin/query": LoraConfig(r=2, target_modules=["query", "intermediate.dense"]),
}


def base(name: str) -> torch.nn.Module:
    """A base model, the same in every call, with no weight at its initial value."""
    torch.manual_seed(0)
    model = BASES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def main() -> None:
    """Write all cases."""
    assert transformers.__version__.startswith("4."), "run this under transformers 4"
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in BASES:
        base(name).save_pretrained(FOLDER / name / "base")
    for case, config in CASES.items():
        model = get_peft_model(base(case.partition("/")[0]), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            pixels = torch.randn(2, 3, 16, 16)
            output = model.eval()(pixel_values=pixels)[0]
        model.save_pretrained(FOLDER / case)
        (FOLDER / case / "README.md").unlink()
        save_file({"pixel_values": pixels, "output": output}, FOLDER / case / "outputs.safetensors")


if __name__ == "__main__":
    main()
