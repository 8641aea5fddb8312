"""Write adapters of the library `adapters` 1.3.0 for models on which it has habits of its own, with what they compute.

    python scripts/make_adapterhub_fixtures.py tests/fixtures/adapterhub_habits
    python scripts/make_adapterhub_fixtures.py build/oracle --full

The second form writes every architecture of that library with every kind of bottleneck, LoRA and (IA)³, for
`docs/agreement.md`; it takes a few minutes and 40 MB.

Runs in an environment with that library: `pip install torch==2.13.0 adapters==1.3.0`. For each model it writes

    base/                 a tiny base model with random weights
    inputs.safetensors    the arguments of its forward; `inputs.<case>.safetensors` those of a case that has its own
    outputs.safetensors   the last hidden state, `__base__` without an adapter and one tensor for each case
    <case>/               an adapter with random weights, saved by the library

`scripts/oracle_table.py` compares them with inarch. A fused projection without a bias gets a random one in that
library, which it does not save (DeBERTa, ModernBERT); here that bias is set to zero.
"""

import argparse
import itertools
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers as tf
from adapters import (
    BnConfig,
    CompacterConfig,
    ConfigUnion,
    DiReftConfig,
    DoRAConfig,
    DvoRAConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    MTLLoRAConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    UniPELTConfig,
    VeraConfig,
)
from adapters.methods.lora import LoRAMergedLinear
from safetensors.torch import save_file

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

WIDTH, LAYERS, VOCABULARY = 8, 2, 24
ENCODER = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 12}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 0}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = ENCODER | TEXT | TOKENS | {"num_key_value_heads": 1}
GEMMA = GROUPED | {"head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4}
SEQ2SEQ = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
}

DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
T5 = {"d_model": WIDTH, "d_kv": 4, "d_ff": 12, "num_layers": LAYERS, "num_heads": 2, "vocab_size": VOCABULARY}
IMAGE = {"image_size": 16, "patch_size": 8}
AUDIO = {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16, "decoder_start_token_id": 1}

MODELS = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**ENCODER, **TEXT)),
    "albert": lambda: tf.AlbertModel(tf.AlbertConfig(**ENCODER, **TEXT, embedding_size=8)),
    "bart": lambda: tf.BartModel(tf.BartConfig(**SEQ2SEQ)),
    "beit": lambda: tf.BeitModel(tf.BeitConfig(**ENCODER, image_size=16, patch_size=8, vocab_size=VOCABULARY)),
    "bert_decoder": lambda: tf.BertModel(tf.BertConfig(**ENCODER, **TEXT, is_decoder=True, add_cross_attention=True)),
    "deberta": lambda: tf.DebertaModel(tf.DebertaConfig(**ENCODER, **TEXT, **DISENTANGLED)),
    "gemma2": lambda: tf.Gemma2Model(tf.Gemma2Config(**GEMMA)),
    "gpt2": lambda: tf.GPT2Model(
        tf.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=16, vocab_size=VOCABULARY, **TOKENS)
    ),
    "gptj": lambda: tf.GPTJModel(
        tf.GPTJConfig(
            n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=16, rotary_dim=4, vocab_size=VOCABULARY, **TOKENS
        )
    ),
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(**GROUPED)),
    "modernbert": lambda: tf.ModernBertModel(
        tf.ModernBertConfig(**ENCODER, **TEXT, local_attention=4, cls_token_id=3, sep_token_id=4, **TOKENS)
    ),
    "mt5": lambda: tf.MT5Model(tf.MT5Config(**T5)),
    "phi": lambda: tf.PhiModel(tf.PhiConfig(**ENCODER, **TEXT, **TOKENS)),
    "qwen3": lambda: tf.Qwen3Model(tf.Qwen3Config(**GROUPED, head_dim=4)),
    "xmod": lambda: tf.XmodModel(
        tf.XmodConfig(**ENCODER, **TEXT, default_language="en_XX", languages=("en_XX", "de_DE"))
    ),
}

OTHER_MODELS = {
    "bert-generation": lambda: tf.BertGenerationEncoder(tf.BertGenerationConfig(**ENCODER, **TEXT)),
    "clip_text_model": lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**ENCODER, **TEXT, **TOKENS)),
    "clip_vision_model": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**ENCODER, **IMAGE)),
    "deberta-v2": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**ENCODER, **TEXT, **DISENTANGLED)),
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(dim=WIDTH, n_layers=LAYERS, n_heads=2, hidden_dim=12, **TEXT)
    ),
    "electra": lambda: tf.ElectraModel(tf.ElectraConfig(**ENCODER, **TEXT, embedding_size=WIDTH)),
    "gemma3_text": lambda: tf.Gemma3TextModel(tf.Gemma3TextConfig(**GEMMA)),
    "mbart": lambda: tf.MBartModel(tf.MBartConfig(**SEQ2SEQ)),
    "mistral": lambda: tf.MistralModel(tf.MistralConfig(**GROUPED)),
    "plbart": lambda: tf.PLBartModel(tf.PLBartConfig(**SEQ2SEQ)),
    "qwen2": lambda: tf.Qwen2Model(tf.Qwen2Config(**GROUPED)),
    "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**ENCODER, **TEXT)),
    "t5": lambda: tf.T5Model(tf.T5Config(**T5)),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**ENCODER, **IMAGE)),
    "whisper": lambda: tf.WhisperModel(tf.WhisperConfig(**SEQ2SEQ, **AUDIO, pad_token_id=0, **TOKENS)),
    "xlm-roberta": lambda: tf.XLMRobertaModel(tf.XLMRobertaConfig(**ENCODER, **TEXT)),
}
"""The architectures without a habit of their own."""

BOTH = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 4, "non_linearity": "gelu"}
DOUBLE = BnConfig(**BOTH)
BEFORE = BnConfig(**BOTH, original_ln_before=True)
OTHER_SUM = BnConfig(**BOTH, original_ln_before=True, residual_before_ln=False)
NO_SUM = BnConfig(**BOTH, original_ln_before=True, original_ln_after=False)
PARALLEL = BnConfig(**BOTH, is_parallel=True, scaling="learned")
CROSS = BnConfig(**BOTH, cross_adapter=True)
OUTPUT = BnConfig(**BOTH | {"mh_adapter": False}, original_ln_before=True)
LORA = LoRAConfig(intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"], r=2, alpha=4)
EVERYWHERE = {"intermediate_lora": True, "output_lora": True, "attn_matrices": ["q", "k", "v"], "r": 2}
DORA = DoRAConfig(**EVERYWHERE, alpha=5)
MTL = MTLLoRAConfig(**EVERYWHERE, alpha=5, n_up_projection=2, weights_sharpness=0.5)
COMPACTER = CompacterConfig(phm_dim=2, reduction_factor=4)
SHARED = {
    "vera": VeraConfig(r=2, alpha=5),
    "compacter": COMPACTER,
    "compacter_shared": CompacterConfig(phm_dim=2, reduction_factor=4, shared_W_phm=True, factorized_phm_rule=True),
    "dvora": DvoRAConfig(r=2, alpha=5),
}
"""Those with parameters that all modules share, which the library saves of a model that is part of another alone."""
PREFIX = PrefixTuningConfig(prefix_length=3, bottleneck_size=4)
FLAT = PrefixTuningConfig(prefix_length=3, flat=True)
PROMPT = PromptTuningConfig(prompt_length=3)
GATED = PrefixTuningConfig(prefix_length=3, bottleneck_size=4, use_gating=True, shared_gating=False, leave_out=[0])
PADDED = {"prompt_tuning": PROMPT, "prompt_tuning_padded": PROMPT}
"""Prompts without and with padding in the batch: those of DeBERTa attend to it."""

CASES = {
    "bert": {"dora": DORA, "mtl_lora": MTL, **SHARED},
    "albert": {"double": DOUBLE, "other_sum": OTHER_SUM, "no_sum": NO_SUM, "parallel": PARALLEL},
    "bart": {"cross": CROSS, "ia3": IA3Config(), "prefix": PREFIX, "prefix_gate": GATED},
    "beit": {"double": DOUBLE, "other_sum": OTHER_SUM},
    "bert_decoder": {"double": DOUBLE},
    "deberta": {"double": DOUBLE, "lora": LORA, "ia3": IA3Config(), "prefix": PREFIX, **PADDED, "dora": DORA},
    "gemma2": {"double": DOUBLE, "parallel": PARALLEL, "before": BEFORE, "lora": LORA},
    "gpt2": {"lora": LORA, "ia3": IA3Config()},
    "gptj": {"before": BEFORE, "no_sum": NO_SUM, "parallel": PARALLEL, "prefix_flat": FLAT},
    "llama": {"lora": LORA, "ia3": IA3Config(), "prefix_lora": ConfigUnion(PREFIX, LORA)},
    "modernbert": {"double": DOUBLE, "before": BEFORE, "output": OUTPUT, "lora": LORA, "dora": DORA},
    "mt5": {"lora": LORA, "ia3": IA3Config(), "dora": DORA, "compacter": COMPACTER},
    "phi": {"double": DOUBLE, "before": BEFORE, "output": OUTPUT, "lora": LORA},
    "qwen3": {"before": BEFORE, "other_sum": OTHER_SUM, "parallel": PARALLEL, "lora": LORA, "dora": DORA},
    "xmod": {"before": BEFORE, "no_sum": NO_SUM, "lora": LORA},
}


COMBINATIONS = itertools.product((True, False), repeat=3)
ALL_CASES = {
    **{name: name for name in ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "lora", "ia3")},
    **{
        f"before{before:d}_after{after:d}_residual{residual:d}": BnConfig(
            **BOTH, original_ln_before=before, original_ln_after=after, residual_before_ln=residual
        )
        for before, after, residual in COMBINATIONS
    },
    "inner_norms": BnConfig(**BOTH, ln_before=True, ln_after=True),
    "residual_inside": BnConfig(**BOTH, adapter_residual_before_ln=True, original_ln_before=True, ln_after=True),
    "gate_and_scale": BnConfig(**BOTH, scaling="learned", use_gating=True),
    "channel_scale": BnConfig(**BOTH, scaling="channel", original_ln_before=True),
    "parallel_gate": BnConfig(**BOTH, is_parallel=True, scaling="learned", use_gating=True),
    "cross": CROSS,
    "leave_out": BnConfig(
        **BOTH | {"reduction_factor": {"0": 4, "default": 2}}, original_ln_before=True, leave_out=[1]
    ),
    "lora_everywhere": LORA,
    "lora_gate": LoRAConfig(r=4, alpha=8, use_gating=True),
    "dora": DORA,
    "mtl_lora": MTL,
    "mtl_lora_one": MTLLoRAConfig(r=2),
    "phm_full": CompacterConfig(phm_dim=2, reduction_factor=4, factorized_phm_W=False, shared_phm_rule=False),
    **SHARED,
    "prefix": PREFIX,
    "prefix_flat": FLAT,
    "prefix_gate": GATED,
    "mam": MAMConfig(PREFIX, ParBnConfig(reduction_factor=2)),
    "unipelt": UniPELTConfig(prefix_tuning=PrefixTuningConfig(prefix_length=3, bottleneck_size=4, use_gating=True)),
    "ia3_everywhere": IA3Config(attn_matrices=["q", "k", "v"], output_lora=True),
    "seq_bn_inv": "seq_bn_inv",
    "double_seq_bn_inv": "double_seq_bn_inv",
    "loreft": LoReftConfig(prefix_positions=1, suffix_positions=1),
    "noreft": NoReftConfig(prefix_positions=1, suffix_positions=1),
    "direft": DiReftConfig(prefix_positions=1, suffix_positions=1),
    "prompt_tuning": PROMPT,
}


def inputs(name: str) -> dict[str, torch.Tensor]:
    """The arguments of a forward."""
    if name in ("beit", "clip_vision_model", "vit"):
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "whisper":
        return {
            "input_features": torch.randn(2, 4, 16),
            "decoder_input_ids": torch.randint(5, VOCABULARY, (2, 4)),
        }
    ids = torch.randint(5, VOCABULARY, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if name in ("bart", "mbart", "plbart", "mt5", "t5"):
        batch["decoder_input_ids"] = torch.randint(5, VOCABULARY, (2, 4))
    if name == "bert_decoder":
        batch["encoder_hidden_states"] = torch.randn(2, 3, WIDTH)
    return batch


def inputs_of(name: str, case: str, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arguments of the forward of a case: without padding for the prompts of DeBERTa, which attend to it."""
    if name in ("deberta", "deberta-v2") and case == "prompt_tuning":
        return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    return dict(batch)


@torch.no_grad()
def perturb(model: torch.nn.Module, std: float, *, trained_only: bool) -> None:
    """Move weights off their initial values."""
    for parameter in model.parameters():
        if parameter.requires_grad or not trained_only:
            parameter.add_(torch.randn(parameter.shape) * std)


@torch.no_grad()
def adapted(
    folder: Path, cls: type, config: Any, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.nn.Module]:
    """What the base computes with one adapter, called "a", and the two."""
    is_whole = not any(config is other for other in SHARED.values())
    whole = (cls if is_whole else adapters.AutoAdapterModel).from_pretrained(
        folder / "base", attn_implementation="eager"
    )
    model = whole if is_whole else whole.base_model
    biased = {path for path, module in model.named_modules() if getattr(module, "bias", None) is not None}
    if is_whole:
        adapters.init(model)
    for path, module in model.named_modules():
        if isinstance(module, LoRAMergedLinear) and path not in biased and module.bias is not None:
            module.bias.zero_()
    whole.add_adapter("a", config=config)
    whole.train_adapter("a")
    perturb(whole, 0.2, trained_only=True)
    whole.set_active_adapters("a")
    return whole.eval() and model(**batch).last_hidden_state.contiguous(), whole


@torch.no_grad()
def write(folder: Path, make: Callable[[], Any], cases: Mapping[str, Any], seed: int) -> None:
    """One model with all its cases, apart from those that the library itself cannot do."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    base = make().eval()
    base.set_attn_implementation("eager")  # the other one leaves out Gemma 2's soft capping
    perturb(base, 0.05, trained_only=False)
    base.save_pretrained(folder / "base")
    batch = inputs(folder.name)
    save_file(batch, folder / "inputs.safetensors")
    outputs = {"__base__": base(**batch).last_hidden_state.contiguous()}
    for case, config in cases.items():
        try:
            found, model = adapted(folder, type(base), config, given := inputs_of(folder.name, case, batch))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            print(f"{folder.name}/{case}: impossible there: {error}")
            continue
        plain = outputs["__base__"]
        if found.shape == plain.shape and torch.allclose(found, plain, atol=1e-4):
            print(f"{folder.name}/{case}: changes nothing there")
            continue
        outputs[case] = found
        if any(not torch.equal(given[key], batch[key]) for key in batch):
            save_file(given, folder / f"inputs.{case}.safetensors")
        # A norm before an adapter, and prefixes, are there more than once, which safetensors do not store.
        is_shared = case == "inner_norms" or any(".prefix_tunings." in key for key in model.state_dict())
        model.save_adapter(str(folder / case), "a", use_safetensors=not is_shared)
    save_file(outputs, folder / "outputs.safetensors")


def main() -> None:
    """Write the fixtures that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default="", help="comma separated; all by default")
    parser.add_argument("--full", action="store_true", help="every architecture, with every case")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = MODELS | OTHER_MODELS if arguments.full else MODELS
    for name in arguments.models.split(",") if arguments.models else sorted(models):
        cases = ALL_CASES if arguments.full else CASES[name]
        write(arguments.folder / name, models[name], cases, arguments.seed)
        print(name, flush=True)


if __name__ == "__main__":
    main()
