"""`docs/coverage.md`, from the records of the tiny run and of the pass over full-size configurations."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

NAMED: Mapping[str, str] = {
    "deepseek_v3": "DeepSeek-V3, Kimi-K2", "kimi_k25": "Kimi-K2.5", "glm46v": "GLM-4.6V", "hunyuan_vl": "HunyuanOCR",
    "glmasr": "GLM-ASR", "qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text", "gemma3": "Gemma 3", "gemma3n": "Gemma 3n", "gemma4": "Gemma 4",
    "gpt_oss": "gpt-oss", "mixtral": "Mixtral", "mamba": "Mamba", "vit": "ViT", "deit": "DeiT", "beit": "BEiT",
    "dinov2": "DINOv2",
    "dinov3_vit": "DINOv3", "swin": "Swin", "siglip2": "SigLIP 2", "clip": "CLIP", "sam": "SAM", "whisper": "Whisper",
    "wav2vec2": "wav2vec 2.0", "hubert": "HuBERT", "t5": "T5", "bart": "BART", "bert": "BERT", "roberta": "RoBERTa",
    "deberta": "DeBERTa", "deberta-v2": "DeBERTa v2 and v3", "modernbert": "ModernBERT", "gpt2": "GPT-2",
    "gptj": "GPT-J", "bloom": "BLOOM", "falcon": "Falcon",
}  # fmt: skip

_HEADER = """# Coverage

Every model type of the `AutoModel` of transformers {version}, judged by the zoo (`scripts/zoo`, `make coverage`). A
type **adapts** if a tiny random model of it takes a bottleneck on every site and LoRA on q, k, v and o, and

* every layer has as many sites as its source or the names of its modules say, or as a review says (`reviews.py`),
* a new adapter leaves the output as it was, difference exactly 0, and trained ones change it,
* every adapter weight gets a gradient, unless the base's output provably does not depend on that place, and no base
  weight gets one,
* saving, loading and `detach()` give back exactly what there was,
* the inputs reach every pre-trained tower inside.

Otherwise it is **refused** by name, with the reason, or it **fails**: known to be wrong, not yet mended.

Columns: sites and layers of the default, full-size configuration on the meta device (of the tiny one in brackets, where
that has none); norms around the sums; ports: `h` adapters after a branch, `x` adapters that read the stream (`(x)`: at
some sites), and the projections that LoRA reaches, `experts` being those in one tensor. What an adapting model has that
is left alone stands under notes.

{counts}

The models of timm have [a table of their own](coverage-timm.md).
"""

_COLUMNS = (
    "| type | sites | layers | norms | ports | verdict | notes |\n| --- | ---: | ---: | --- | --- | --- | --- |\n"
)


def coverage(tiny: Mapping[str, dict[str, Any]], meta: Mapping[str, dict[str, Any]], version: str) -> str:
    """The page. `tiny` and `meta` are records by type."""
    verdicts = Counter(record["verdict"] for record in tiny.values())
    known = sum(1 for record in meta.values() if record["verdict"] == "adapts")
    counts = (
        f"Of {len(tiny)} types, **{verdicts['adapts']} adapt**, {verdicts['refused']} are refused, "
        f"{verdicts['fails']} fail. The full-size configurations of {known} types were probed on the meta device."
    )
    named = [_row(tiny[t], meta.get(t, {}), name) for t, name in NAMED.items() if t in tiny]
    others = [_row(tiny[t], meta.get(t, {})) for t in sorted(tiny) if t not in NAMED]
    head = _HEADER.format(version=version, counts=counts)
    return (
        f"{head}\n## Current and classic architectures\n\n{_COLUMNS}{''.join(named)}\n"
        f"## All others\n\n{_COLUMNS}{''.join(others)}"
    )


def _row(record: Mapping[str, Any], full: Mapping[str, Any], name: str = "") -> str:
    known = full if full.get("verdict") == "adapts" else {}
    sites = known.get("sites") or (f"({record['sites']})" if record.get("sites") else "")
    layers = sum((known or record).get("layers", {}).values()) or ""
    cells = [
        f"`{record['type']}`{f' ({name})' if name else ''}",
        str(sites),
        str(layers if known else f"({layers})" if layers else ""),
        ", ".join(record.get("arrangements", ())),
        _ports(record),
        record["verdict"],
        _notes(record, full),
    ]
    return f"| {' | '.join(cells)} |\n"


def _ports(record: Mapping[str, Any]) -> str:
    ports = list(record.get("ports", ()))
    if not ports or not record.get("sites"):
        return ""
    stream = {"stream:all": "h x", "stream:some": "h (x)", "stream:none": "h"}[ports[0]]
    roles = [role for role in ("q", "k", "v", "o", "up", "gate", "down") if role in ports[1:]]
    experts = ["experts"] if any(role.startswith("expert_") for role in ports[1:]) else []
    return " ".join([stream, *roles, *experts])


def _notes(record: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    notes = []
    if record["verdict"] != "adapts":
        notes.append(_short(record["reason"]))
    else:
        notes += [f"left alone: {_short(text)}" for text in record.get("refused", ())[:2]]
        notes += [_short(text) for text in record.get("excused", ())[:1]]
        notes += [f"at full size on the meta device: {_short(text, 100)}" for text in full.get("refused", ())[:1]]
        if full and full.get("verdict") != "adapts":
            notes.append(f"full size not probed: {_short(full['reason'], 80)}")
    return "; ".join(notes)


def _short(text: str, most: int = 160) -> str:
    line = " ".join(text.replace("|", "\\|").split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
