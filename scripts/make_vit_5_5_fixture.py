"""Write the fixture of an adapter made under transformers 5.5, whose ViT still calls its modules `encoder.layer`.

Run where that version is installed, from the root of the project:

    python -m venv build/old && build/old/bin/pip install torch==2.13.0 transformers==5.5.4 typer rich
    PYTHONPATH=src build/old/bin/python scripts/make_vit_5_5_fixture.py tests/fixtures/vit_transformers_5_5

A base that is there is kept, so that a new format of adapter folders gets an adapter of its own beside the old ones.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import inarch
from inarch.state import FORMAT_VERSION
from inarch.testing import tiny, tiny_inputs


def main(target: Path) -> None:
    """Write the base model, the adapter, and what the two compute together."""
    if not transformers.__version__.startswith("5.5."):
        sys.exit(f"This fixture is made under transformers 5.5; got {transformers.__version__}.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny("vit-classifier")
    names = [name for name, _ in model.named_modules()]
    if not any("encoder.layer.0" in name for name in names):
        sys.exit("This version has renamed the modules already; the fixture would show nothing.")
    if (target / "base").is_dir():
        model = type(model).from_pretrained(target / "base").eval()
    else:
        model.save_pretrained(target / "base")
    adapters = inarch.attach(model)
    adapters.add("old", "double_seq_bn[reduction_factor=4]|lora[attn_matrices=[q,k,v,o],intermediate_lora=True,r=2]")
    adapters.train("old")
    for parameter in adapters["old"].values():
        move(parameter)
    adapters.save("old", target / f"adapter_format_{FORMAT_VERSION}")
    with torch.no_grad():
        logits = model(**tiny_inputs("vit-classifier")).logits
    save_file(
        {"logits": logits, **tiny_inputs("vit-classifier")}, target / f"expected_format_{FORMAT_VERSION}.safetensors"
    )


@torch.no_grad()
def move(parameter: torch.Tensor) -> None:
    """Move one tensor off its initial value, so that it matters."""
    parameter.add_(torch.randn_like(parameter) * 0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
