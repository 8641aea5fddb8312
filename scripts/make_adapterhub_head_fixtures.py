"""Makes `tests/fixtures/adapterhub_heads`: prediction heads of the library `adapters` and what they compute.

It runs with that library (adapters 1.3.0, transformers 4.57), in an environment of its own:

    python scripts/make_adapterhub_head_fixtures.py
"""

from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent / "tests" / "fixtures"
TARGET = ROOT / "adapterhub_heads"
IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 2, 0, 0]])
TEXTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sentiment": ("bert", "classification", {"num_labels": 3, "id2label": {0: "bad", 1: "so", 2: "good"}}),
    "pooler": ("bert", "classification", {"num_labels": 2, "layers": 1, "use_pooler": True}),
    "topics": ("bert", "classification", {"num_labels": 3, "multilabel": True}),
    "tags": ("bert", "tagging", {"num_labels": 4}),
    "answers": ("bert", "qa", {}),
    "choices": ("bert", "multiple_choice", {"num_choices": 2}),
    "parse": ("bert", "dependency_parsing", {"num_labels": 2}),
    "masks": ("bert", "masked_lm", {}),
    "grade": ("bert", "classification", {"num_labels": 1}),
    "pictures": ("vit", "image_classification", {"num_labels": 3}),
    "objects": ("vit", "image_classification", {"num_labels": 3, "layers": 2, "multilabel": True}),
    "next": ("gpt2", "causal_lm", {}),
    "mood": ("gpt2", "classification", {"num_labels": 3}),
    "says": ("bart", "seq2seq_lm", {}),
    "kind": ("bart", "classification", {"num_labels": 3}),
}
TARGETS = {
    "sentiment": {"labels": torch.tensor([2, 0])},
    "pooler": {"labels": torch.tensor([1, 0])},
    "topics": {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 1]])},
    "tags": {"labels": torch.tensor([[1, 2, -100, 3, 0], [0, 1, 3, 2, 1]])},
    "answers": {"start_positions": torch.tensor([1, 7]), "end_positions": torch.tensor([2, 9])},
    "choices": {"labels": torch.tensor([1])},
    "parse": {"labels_arcs": torch.tensor([[2, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
              "labels_rels": torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]])},
    "masks": {"labels": torch.tensor([[-100, 6, -100, -100, -100], [-100, -100, 2, -100, -100]])},
    "grade": {"labels": torch.tensor([0.5, -1.0])},
    "pictures": {"labels": torch.tensor([2, 0])},
    "objects": {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 1]])},
    "next": {"labels": IDS.masked_fill(IDS == 0, -100)},
    "mood": {"labels": torch.tensor([2, 0])},
    "says": {"labels": torch.tensor([[4, 5, 2], [6, 2, -100]])},
    "kind": {"labels": torch.tensor([2, 0])},
}  # fmt: skip
"""What the losses are of, kept in `targets.safetensors`; 0 is padding in those of `parse`."""


def base(name: str) -> Path:
    """The folder of a base, which is made where the fixtures of adapters have none."""
    shared, own = ROOT / "adapterhub" / name / "base", TARGET / "bases" / name
    if shared.is_dir():
        return shared
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    seq2seq = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
               "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
               "max_position_embeddings": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
    torch.manual_seed(0)
    model = (
        transformers.GPT2Model(transformers.GPT2Config(**WORDS, **small))
        if name == "gpt2"
        else transformers.BartModel(transformers.BartConfig(**WORDS, **seq2seq))
    )
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(own)
    return own


def main() -> None:
    """Write every head with its adapter, what the model makes of one batch, and the loss of some targets."""
    TARGET.mkdir(exist_ok=True)
    found = {}
    for kind_of_base in dict.fromkeys(place for place, _, _ in HEADS.values()):
        place = base(kind_of_base)
        torch.manual_seed(0)
        model = adapters.AutoAdapterModel.from_pretrained(place).eval()
        for name, (_, kind, settings) in ((n, head) for n, head in HEADS.items() if head[0] == kind_of_base):
            model.add_adapter(name, config="lora[r=1]")
            getattr(model, f"add_{kind}_head")(name, **settings)
            tied = getattr(model.get_input_embeddings(), "weight", torch.zeros(0)).shape
            for parameter in model.heads[name].parameters():
                if parameter.shape != tied:
                    parameter.data.normal_(std=0.3)
            model.set_active_adapters(name)
            inputs = dict(IMAGES if kind_of_base == "vit" else TEXTS)
            if kind == "dependency_parsing":
                inputs["word_starts"] = torch.tensor([[1, 3, 4, 0, 0], [1, 2, 0, 0, 0]])
            if kind == "seq2seq_lm":
                inputs["decoder_input_ids"] = torch.tensor([[2, 4, 5], [2, 6, 2]])
            with torch.no_grad():
                output = model(**inputs)
                loss = model(**inputs, **TARGETS[name]).loss
            kept = {"logits", "start_logits", "end_logits", "rel_preds", "arc_preds"}
            found |= {f"{name}.{key}": output[key].contiguous() for key in kept if key in output}
            found[f"{name}.loss"] = loss.detach().clone()
            model.base_model.config.name_or_path = model.config.name_or_path = kind_of_base  # not a place
            model.save_adapter(str(TARGET / name), name, use_safetensors=not kind.endswith("lm"))
    save_file(found, TARGET / "outputs.safetensors")
    targets = {f"{name}.{key}": value for name, given in TARGETS.items() for key, value in given.items()}
    save_file(targets, TARGET / "targets.safetensors")


if __name__ == "__main__":
    main()
