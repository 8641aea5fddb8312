"""Makes `tests/fixtures/adapterhub_heads`: prediction heads of the library `adapters` and what they compute.

It runs with that library (adapters 1.3.0, transformers 4.57), in an environment of its own:

    python scripts/make_adapterhub_head_fixtures.py
"""

from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent / "tests" / "fixtures"
BASE, TARGET = ROOT / "adapterhub" / "bert" / "base", ROOT / "adapterhub_heads"
IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 2, 0, 0]])
HEADS = {
    "sentiment": ("classification", {"num_labels": 3, "id2label": {0: "bad", 1: "so", 2: "good"}}),
    "pooler": ("classification", {"num_labels": 2, "layers": 1, "use_pooler": True}),
    "topics": ("classification", {"num_labels": 3, "multilabel": True}),
    "tags": ("tagging", {"num_labels": 4}),
    "answers": ("qa", {}),
    "choices": ("multiple_choice", {"num_choices": 2}),
    "parse": ("dependency_parsing", {"num_labels": 2}),
    "masks": ("masked_lm", {}),
}


def main() -> None:
    """Write every head with its adapter, and what the model makes of one batch."""
    TARGET.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = adapters.AutoAdapterModel.from_pretrained(BASE).eval()
    found = {}
    for name, (kind, settings) in HEADS.items():
        model.add_adapter(name, config="lora[r=1]")
        getattr(model, f"add_{kind}_head")(name, **settings)
        for parameter in model.heads[name].parameters():
            if parameter.shape != model.get_input_embeddings().weight.shape:
                parameter.data.normal_(std=0.3)
        model.set_active_adapters(name)
        more = {"word_starts": torch.tensor([[1, 3, 4, 0, 0], [1, 2, 0, 0, 0]])} if kind == "dependency_parsing" else {}
        with torch.no_grad():
            output = model(IDS, attention_mask=(IDS != 0).long(), **more)
        found |= {
            f"{name}.{key}": value.contiguous() for key, value in output.items() if isinstance(value, torch.Tensor)
        }
        model.save_adapter(str(TARGET / name), name, use_safetensors=kind != "masked_lm")
    save_file(found, TARGET / "outputs.safetensors")


if __name__ == "__main__":
    main()
