"""Compare what adapters of PEFT compute in PEFT with what they compute here, and the other way round.

    pip install --no-deps --target build/peft peft==0.21.2
    PYTHONPATH=build/peft python scripts/peft_table.py [--only bert] [--fixtures]

For each case PEFT makes an adapter on a tiny model, its weights are moved off their initial values, and it is saved. It
is loaded here, and what both compute is compared. Where it can be written back, PEFT loads what inarch wrote, and its
output is compared too. Each cell is the largest absolute difference; it ends with 1 if one is above 1e-5.

`--fixtures` writes the cases that the tests use to `tests/fixtures/peft`, with their expected outputs.
"""

import argparse
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import inarch
from inarch.testing import tiny, tiny_inputs

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "peft"
TOLERANCE = 1e-5
ALL = "all-linear"


@dataclass(frozen=True, slots=True)
class Case:
    """An adapter of PEFT on a tiny model."""

    model: str
    config: PeftConfig
    fixture: bool = False
    """Whether the tests use it."""


def _lora(**settings: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 5, **settings})


CASES: dict[str, Case] = {
    "vit query value": Case("vit", _lora(target_modules=["q_proj", "v_proj"])),
    "vit all": Case("vit", _lora(target_modules=ALL)),
    "vit classifier all": Case("vit-classifier", _lora(target_modules=ALL)),
    "deit": Case("deit", _lora(target_modules=["q_proj", "fc1"])),
    "beit": Case("beit", _lora(target_modules=ALL)),
    "dinov2": Case("dinov2", _lora(target_modules=ALL)),
    "swin": Case("swin", _lora(target_modules=["q_proj", "k_proj", "fc2"])),
    "swinv2": Case("swinv2", _lora(target_modules=["query", "key"])),
    "clip": Case("clip", _lora(target_modules=["q_proj", "v_proj", "out_proj"])),
    "bert": Case("bert", _lora(target_modules=["query", "value"])),
    "bert dense": Case("bert", _lora(target_modules=["dense"], exclude_modules=["pooler.dense"])),
    "bert pooler": Case("bert", _lora(target_modules=ALL)),
    "bert task": Case("bert-classifier", _lora(target_modules=["query"], task_type="SEQ_CLS"), fixture=True),
    "bert bias of updates": Case("bert-classifier", _lora(target_modules=["query"], lora_bias=True)),
    "bert biases": Case(
        "bert-classifier",
        _lora(target_modules=["key", "attention.output.dense"], bias="lora_only", modules_to_save=["classifier"]),
        fixture=True,
    ),
    "roberta": Case("roberta", _lora(target_modules=["query", "key", "value"])),
    "distilbert": Case("distilbert", _lora(target_modules=["q_lin", "lin2"])),
    "gpt2 fused": Case("gpt2", _lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), fixture=True),
    "gpt2 all": Case("gpt2-lm", _lora(target_modules=ALL)),
    "gptj": Case("gptj", _lora(target_modules=["q_proj", "fc_in"])),
    "llama all": Case("llama-lm", _lora(target_modules=ALL)),
    "llama patterns": Case(
        "llama-lm",
        _lora(
            target_modules=["q_proj", "v_proj", "down_proj"],
            use_rslora=True,
            rank_pattern={"layers.0.self_attn.q_proj": 3, "down_proj": 4},
            alpha_pattern={"v_proj": 3},
        ),
        fixture=True,
    ),
    "llama expression": Case(
        "llama-lm", _lora(target_modules=r".*layers\.1.*(q|k)_proj|.*layers\.0.*up_proj"), fixture=True
    ),
    "llama one layer": Case("llama-lm", _lora(target_modules=["q_proj", "gate_proj"], layers_to_transform=[1])),
    "qwen2": Case("qwen2-lm", _lora(target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.1)),
    "gemma2": Case("gemma2", _lora(target_modules=ALL)),
    "olmo2": Case("olmo2", _lora(target_modules=["q_proj", "o_proj"])),
    "t5": Case("t5-lm", _lora(target_modules=["q", "v", "wi"])),
    "t5 cross": Case("t5-lm", _lora(target_modules=r".*EncDecAttention\.(q|v)"), fixture=True),
    "bart": Case("bart-lm", _lora(target_modules=ALL)),
    "whisper": Case("whisper-lm", _lora(target_modules=["q_proj", "v_proj"])),
    "pissa bert": Case("bert-classifier", _lora(target_modules=ALL, init_lora_weights="pissa"), fixture=True),
    "pissa gpt2": Case(
        "gpt2", _lora(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="pissa", use_rslora=True)
    ),
    "olora vit": Case("vit", _lora(target_modules=["q_proj", "fc1"], init_lora_weights="OLoRA"), fixture=True),
    "mica vit": Case("vit", _lora(target_modules=["q_proj", "fc1"], init_lora_weights="mica")),
    "orthogonal vit": Case("vit", _lora(target_modules=["q_proj", "fc1"], r=4, init_lora_weights="orthogonal")),
    "gaussian vit": Case("vit", _lora(target_modules=["q_proj", "fc1"], init_lora_weights="gaussian")),
    "experts mixtral": Case(
        "mixtral-lm",
        _lora(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 3},
            alpha_pattern={r"layers\.1\.mlp\.experts\.gate_up_proj": 3},
        ),
        fixture=True,
    ),
    "experts gpt-oss": Case(
        "gpt-oss", _lora(target_modules=[], target_parameters=["experts.down_proj"], use_rslora=True), fixture=True
    ),
    "dora vit": Case("vit", _lora(target_modules=["q_proj", "v_proj", "fc1"], use_dora=True), fixture=True),
    "dora gpt2": Case(
        "gpt2", _lora(target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True), fixture=True
    ),
    "dora llama": Case(
        "llama-lm", _lora(target_modules=ALL, use_dora=True, use_rslora=True, rank_pattern={"v_proj": 3})
    ),
    "dora t5": Case("t5-lm", _lora(target_modules=["q", "v", "wi"], use_dora=True)),
    "vera vit": Case("vit", VeraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1", "fc2"]), fixture=True),
    "vera llama": Case("llama-lm", VeraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])),
    "vera bart": Case("bart-lm", VeraConfig(r=4, target_modules=["q_proj", "fc1"])),
    "head llama": Case("llama-lm", _lora(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "head ia3 bert": Case(
        "bert-classifier",
        IA3Config(target_modules=["key"], feedforward_modules=[], modules_to_save=["pooler"], task_type="SEQ_CLS"),
    ),
    "prompt llama": Case("llama-lm", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), fixture=True),
    "prompt gpt2": Case("gpt2-lm", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prompt bert": Case("bert", PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION")),
    "prompt t5": Case("t5-lm", PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")),
    "prefix llama": Case("llama-lm", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), fixture=True),
    "prefix qwen2": Case(
        "qwen2-lm",
        PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=6, task_type="CAUSAL_LM"),
    ),
    # PEFT's own defaults for these types
    "norms bert": Case(
        "bert-classifier", LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"), fixture=True
    ),
    "norms llama": Case("llama-lm", LNTuningConfig(task_type="CAUSAL_LM")),
    "norms gpt2": Case("gpt2-lm", LNTuningConfig(task_type="CAUSAL_LM")),
    "norms t5": Case("t5-lm", LNTuningConfig(task_type="SEQ_2_SEQ_LM")),
    "norms bart": Case("bart-lm", LNTuningConfig(task_type="SEQ_2_SEQ_LM")),
    "norms gemma2": Case("gemma2", LNTuningConfig()),
    "norms qwen2": Case("qwen2-lm", LNTuningConfig(task_type="CAUSAL_LM")),
    "norms vit": Case("vit", LNTuningConfig(target_modules=r"layers\.1\.layernorm_(before|after)"), fixture=True),
    "ia3 bert": Case(
        "bert",
        IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        fixture=True,
    ),
    "ia3 gpt2": Case("gpt2", IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ia3 t5": Case("t5-lm", IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "ia3 llama": Case(
        "llama-lm", IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "ia3 bart": Case("bart-lm", IA3Config(target_modules=["q_proj", "v_proj", "fc2"], feedforward_modules=["fc2"])),
    "ia3 vit": Case("vit", IA3Config(target_modules=["k_proj", "v_proj", "fc1"], feedforward_modules=[])),
}


OURS = {
    "own bert": ("bert", "lora[attn_matrices=[q,k,v,o],intermediate_lora=True,bias=True,alpha=3]"),
    "own gpt2": ("gpt2", "lora[attn_matrices=[q,v,o],r=3,alpha_pattern={'*.v':5.0},rank_pattern={'*.0.*.v':2}]"),
    "own llama": ("llama-lm", "lora[gate_lora=True,output_lora=True,leave_out_projections=['*.1.*.v']]"),
    "own rslora": ("gpt2", "lora[use_rslora=True,attn_matrices=[q,v],alpha=3]"),
    "own pissa": ("bert", "lora[init_weights=pissa,r=3,intermediate_lora=True]"),
    "own experts": ("gpt-oss", "lora[r=3,alpha=5,experts_lora=True,init_weights=pissa,leave_out=[1]]"),
    "own dora": ("gpt2", "dora[attn_matrices=[q,v],r=3,alpha=5,output_lora=True]"),
    "own bart": ("bart-lm", "lora[r=2,leave_out=[1,3]]"),
}
"""Adapters made here, by model and configuration."""


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All tensors that a model gives."""
    with torch.no_grad():
        return [value for value in model(**inputs).values() if isinstance(value, Tensor)]


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest absolute difference."""
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def make(case: Case, folder: Path) -> list[Tensor]:
    """Let PEFT make and save an adapter; returns what it computes."""
    torch.manual_seed(1)
    model = get_peft_model(tiny(case.model), case.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    (folder / "README.md").unlink()
    found = outputs(model, tiny_inputs(case.model))
    if not isinstance(case.config, PromptTuningConfig):
        return found
    length = outputs(tiny(case.model), tiny_inputs(case.model))[0].shape[1]
    return [found[0][:, -length:]]  # PEFT gives prompts as well, and pools the first of them


def compare(case: Case, folder: Path) -> tuple[float, float | None, float]:
    """How far inarch is from PEFT, how far PEFT is with what inarch wrote of it, and how much the adapter does."""
    expected, inputs = make(case, folder / "peft"), tiny_inputs(case.model)
    base = distance(outputs(tiny(case.model), inputs)[: len(expected)], expected)
    model = tiny(case.model)
    adapters = inarch.attach(model, example_inputs=inputs)
    name = adapters.load(folder / "peft", name="a")
    adapters.activate(name)
    here = distance(outputs(model, inputs)[: len(expected)], expected)
    if not isinstance(case.config, LoraConfig):
        return here, None, base
    adapters.save(name, folder / "written", format="peft")
    back = PeftModel.from_pretrained(tiny(case.model), folder / "written").eval()
    return here, distance(outputs(back, inputs), expected), base


def compare_own(name: str, config: str, folder: Path) -> tuple[float, float]:
    """How far PEFT is from inarch with an adapter that was made here, and how much the adapter does."""
    model, inputs = tiny(name), tiny_inputs(name)
    base = outputs(model, inputs)
    adapters = inarch.attach(model, example_inputs=inputs)
    adapters.add("a", config)
    with torch.no_grad():
        for parameter in adapters["a"].values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapters.activate("a")
    expected = outputs(model, inputs)
    adapters.save("a", folder / "written", format="peft")
    back = PeftModel.from_pretrained(tiny(name), folder / "written").eval()
    return distance(outputs(back, inputs), expected), distance(base, expected)


def write_fixtures() -> None:
    """The cases that the tests use."""
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for name, case in CASES.items():
        if case.fixture:
            folder = FIXTURES / name.replace(" ", "_")
            found = make(case, folder)
            save_file({str(n): tensor.contiguous() for n, tensor in enumerate(found)}, folder / "outputs.safetensors")
            (folder / "model.txt").write_text(case.model + "\n", encoding="utf-8")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--fixtures", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.fixtures:
        write_fixtures()
        return
    worst = 0.0
    print(f"{'case':<24}{'read here':>12}{'written back':>14}{'its effect':>12}")
    for name, case in CASES.items():
        if not name.startswith(arguments.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            here, back, effect = compare(case, Path(folder))
        worst = max(worst, here, back or 0.0)
        print(f"{name:<24}{here:>12.1e}{'-' if back is None else f'{back:.1e}':>14}{effect:>12.1e}", flush=True)
    for name, (model, config) in OURS.items():
        if name.startswith(arguments.only):
            with tempfile.TemporaryDirectory() as folder:
                back, effect = compare_own(model, config, Path(folder))
            worst = max(worst, back)
            print(f"{name:<24}{'-':>12}{back:>14.1e}{effect:>12.1e}", flush=True)
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
