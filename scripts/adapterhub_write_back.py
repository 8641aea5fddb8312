"""Judge by the library `adapters` itself what inarch writes in its format.

    python scripts/adapterhub_write_back.py write build/written         # here: reads every fixture and writes it again
    old/bin/python scripts/adapterhub_write_back.py judge build/written # with torch==2.13.0 and adapters==1.3.0

The second command loads what was written into that library, and prints how far its last hidden state is from the one
that it computed with the adapter it had saved. It ends with 1 where that is more than 1e-5.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
ROOTS, HEADS = ("adapterhub", "adapterhub_habits"), "adapterhub_heads"
TOLERANCE = 1e-5


def write(target: Path) -> None:
    """Every adapter of the fixtures that inarch reads and writes."""
    import inarch

    for base in sorted(path for root in ROOTS for path in (FIXTURES / root).glob("*/base")):
        model = AutoModel.from_pretrained(base).eval()
        adapters = inarch.attach(model, example_inputs=load_file(base.parent / "inputs.safetensors"))
        for record in sorted(base.parent.glob("*/adapter_config.json")):
            case = record.parent
            try:
                adapters.load(case, name="x", overwrite=True)
                adapters.save("x", target / case.relative_to(FIXTURES), format="adapterhub")
            except inarch.StateError as error:
                print(f"{case.relative_to(FIXTURES)}: {error}")
    for record in sorted((FIXTURES / HEADS).glob("*/head_config.json")):
        model = AutoModel.from_pretrained(_base_of_head(record.parent)).eval()
        adapters = inarch.attach(model)
        try:
            name = adapters.load(record.parent)
            adapters.save(name, target / HEADS / name, format="adapterhub")
        except inarch.StateError as error:
            print(f"{record.parent.relative_to(FIXTURES)}: {error}")


def _base_of_head(folder: Path) -> Path:
    """The base that a head of the fixtures, or one that was made of it, is for."""
    kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["model_type"]
    shared = FIXTURES / "adapterhub" / kind / "base"
    return shared if shared.is_dir() else FIXTURES / HEADS / "bases" / kind


def judge(target: Path) -> None:
    """What the library computes with them."""
    import adapters

    worst = _judge_heads(target)
    for record in sorted(target.glob("*/*/*/adapter_config.json")):
        case = record.parent.relative_to(target)
        origin = FIXTURES / case.parent
        model = AutoModel.from_pretrained(origin / "base").eval()
        adapters.init(model)
        try:
            model.load_adapter(str(record.parent), use_safetensors=True, set_active=True)
        except ImportError as error:
            print(f"{case}: {error}")
            continue
        with torch.no_grad():
            found = model.eval()(**load_file(origin / "inputs.safetensors")).last_hidden_state
        difference = float((found - load_file(origin / "outputs.safetensors")[case.name]).abs().max())
        worst = max(worst, difference)
        print(f"{case}: {difference:.1e}")
    sys.exit(worst > TOLERANCE)


def _judge_heads(target: Path) -> float:
    """How far the outputs of the heads are, at the most."""
    import adapters

    expected, worst = load_file(FIXTURES / HEADS / "outputs.safetensors"), 0.0
    ids = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 2, 0, 0]])
    texts = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    images = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    more = {"parse": {"word_starts": torch.tensor([[1, 3, 4, 0, 0], [1, 2, 0, 0, 0]])}}
    more["says"] = {"decoder_input_ids": torch.tensor([[2, 4, 5], [2, 6, 2]])}
    for record in sorted((target / HEADS).glob("*/head_config.json")):
        name = record.parent.name
        base = _base_of_head(record.parent)
        model = adapters.AutoAdapterModel.from_pretrained(base)
        model.load_adapter(str(record.parent), use_safetensors=True, set_active=True)
        with torch.no_grad():
            found = model.eval()(**(images if model.config.model_type == "vit" else texts), **more.get(name, {}))
        wanted = {key.partition(".")[2]: value for key, value in expected.items() if key.startswith(f"{name}.")}
        differences = [(found[key] - value).abs() for key, value in wanted.items() if key in found]
        difference = max(float(values[values.isfinite()].max()) for values in differences)
        worst = max(worst, difference)
        print(f"head {name}: {difference:.1e}")
    return worst


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    {"write": write, "judge": judge}[sys.argv[1]](Path(sys.argv[2]))
