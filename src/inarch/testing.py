"""Tiny random models and a model of one page, to test methods, layouts and training without a download.

The models have real architectures from transformers with random weights; norms and biases are moved off their initial
ones and zeros, so that a test sees a difference if one of them is skipped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .core.errors import ConfigError, nearest

_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IMAGE = {"image_size": 32, "patch_size": 8}
_TEXT = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_SPEECH = {"num_mel_bins": 20, "max_source_positions": 30, "begin_suppress_tokens": None}
_STAGES = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 2, "image_size": 32, "patch_size": 4}


@dataclass(frozen=True, slots=True)
class _Recipe:
    """A class of transformers, its configuration class and settings, and the kind of input it takes."""

    model: str
    config: str
    settings: Mapping[str, Any]
    inputs: str


_EXPERTS = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}

_RECIPES: dict[str, _Recipe] = {
    "vit": _Recipe("ViTModel", "ViTConfig", _ENCODER | _IMAGE, "image"),
    "vit-classifier": _Recipe("ViTForImageClassification", "ViTConfig", _ENCODER | _IMAGE | {"num_labels": 5}, "image"),
    "deit": _Recipe("DeiTModel", "DeiTConfig", _ENCODER | _IMAGE, "image"),
    "beit": _Recipe("BeitModel", "BeitConfig", _ENCODER | _IMAGE | {"vocab_size": 99}, "image"),
    "dinov2": _Recipe("Dinov2Model", "Dinov2Config", _ENCODER | _IMAGE | {"mlp_ratio": 2}, "image"),
    "clip-vision": _Recipe("CLIPVisionModel", "CLIPVisionConfig", _ENCODER | _IMAGE, "image"),
    "clip-text": _Recipe("CLIPTextModel", "CLIPTextConfig", _ENCODER | _TEXT, "text"),
    "clip": _Recipe(
        "CLIPModel", "CLIPConfig", {"text_config": _ENCODER | _TEXT, "vision_config": _ENCODER | _IMAGE}, "both"
    ),
    "swin": _Recipe("SwinModel", "SwinConfig", _STAGES, "image"),
    "swinv2": _Recipe("Swinv2Model", "Swinv2Config", _STAGES, "image"),
    "bert": _Recipe("BertModel", "BertConfig", _ENCODER | _TEXT, "text"),
    "bert-classifier": _Recipe(
        "BertForSequenceClassification", "BertConfig", _ENCODER | _TEXT | {"num_labels": 3}, "text"
    ),
    "roberta": _Recipe("RobertaModel", "RobertaConfig", _ENCODER | _TEXT, "text"),
    "distilbert": _Recipe(
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} | _TEXT,
        "text",
    ),
    "gpt2": _Recipe("GPT2Model", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4} | _TEXT, "text"),
    "gpt2-lm": _Recipe("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4} | _TEXT, "text"),
    "llama": _Recipe("LlamaModel", "LlamaConfig", _ENCODER | _TEXT | {"num_key_value_heads": 2}, "text"),
    "llama-lm": _Recipe("LlamaForCausalLM", "LlamaConfig", _ENCODER | _TEXT | {"num_key_value_heads": 2}, "text"),
    "qwen2": _Recipe("Qwen2Model", "Qwen2Config", _ENCODER | _TEXT | {"num_key_value_heads": 2}, "text"),
    "mixtral-lm": _Recipe("MixtralForCausalLM", "MixtralConfig", _ENCODER | _TEXT | _EXPERTS, "text"),
    "gpt-oss": _Recipe("GptOssModel", "GptOssConfig", _ENCODER | _TEXT | _EXPERTS, "text"),
    "gemma2": _Recipe(
        "Gemma2Model", "Gemma2Config", _ENCODER | _TEXT | {"num_key_value_heads": 2, "head_dim": 8}, "text"
    ),
    "olmo2": _Recipe("Olmo2Model", "Olmo2Config", _ENCODER | _TEXT | {"num_key_value_heads": 2}, "text"),
    "gptj": _Recipe(
        "GPTJModel",
        "GPTJConfig",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "rotary_dim": 4} | _TEXT,
        "text",
    ),
    "qwen2-lm": _Recipe("Qwen2ForCausalLM", "Qwen2Config", _ENCODER | _TEXT | {"num_key_value_heads": 2}, "text"),
    "t5": _Recipe("T5Model", "T5Config", _T5 | _TEXT, "text2text"),
    "t5-lm": _Recipe("T5ForConditionalGeneration", "T5Config", _T5 | _TEXT, "text2text"),
    "bart": _Recipe("BartModel", "BartConfig", _SEQ2SEQ | _TEXT, "text2text"),
    "bart-lm": _Recipe("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ | _TEXT, "text2text"),
    "whisper": _Recipe("WhisperModel", "WhisperConfig", _SEQ2SEQ | _TEXT | _SPEECH, "audio"),
    "whisper-lm": _Recipe("WhisperForConditionalGeneration", "WhisperConfig", _SEQ2SEQ | _TEXT | _SPEECH, "audio"),
}


def tiny_models() -> tuple[str, ...]:
    """The names `tiny` knows."""
    return tuple(_RECIPES)


def tiny(name: str, *, seed: int = 0) -> nn.Module:
    """A tiny random model in eval mode. Raises `ConfigError` for an unknown name."""
    if name not in _RECIPES:
        raise ConfigError(f"A tiny model is known by name; got `{name}`. {nearest(name, _RECIPES)}")
    import transformers

    recipe = _RECIPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, recipe.config)(**recipe.settings)
        model: nn.Module = getattr(transformers, recipe.model)(config).eval()
        perturb(model)
    return model


def perturb(model: nn.Module, std: float = 0.05) -> None:
    """Move every parameter off its initial value, by normal noise."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)


def tiny_inputs(name: str, *, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Forward arguments for `tiny(name)`."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, 99, (batch, length), generator=generator)

    def image() -> Tensor:
        return torch.randn(batch, 3, 32, 32, generator=generator)

    kinds: dict[str, Callable[[], dict[str, Tensor]]] = {
        "image": lambda: {"pixel_values": image()},
        "text": lambda: {"input_ids": tokens(7)},
        "both": lambda: {"input_ids": tokens(7), "pixel_values": image()},
        "text2text": lambda: {"input_ids": tokens(7), "decoder_input_ids": tokens(5)},
        "audio": lambda: {
            "input_features": torch.randn(batch, 20, 60, generator=generator),
            "decoder_input_ids": tokens(5),
        },
    }
    return kinds[_RECIPES[name].inputs]()


class PlainTransformer(nn.Module):
    """A pre-norm Transformer written out on one page, of no library: stands for a user's own model.

    Takes x (B, L, D) and returns (B, classes).
    """

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x).mean(dim=1))
        return result


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm_1(x))
        h: Tensor = self.mlp(self.norm_2(x))
        return x + h

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        result: Tensor = self.out(mixed)
        return result
