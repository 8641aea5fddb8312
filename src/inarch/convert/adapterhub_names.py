"""Where the library `adapters` keeps its modules, by model type: a table of names.

A `Tower` is one stack of layers. Its paths are relative to a layer; what is not named does not exist there. To read the
folders of another model type, add a row to `TOWERS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..core.site import Kind
from ..core.wiring import Circuit


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a module of the reference is in our terms.

    `field` is the configuration field that asks for it; `roles` are those of a projection: one, several for a fused
    one, none for a bottleneck, which has a `circuit` instead: what it is given for stream, branch and norm.
    """

    kind: Kind
    field: str
    roles: tuple[str, ...] = ()
    circuit: Circuit = "own"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """The modules that a bottleneck on hooks reads: the one that the stream enters, and a norm."""

    stream: str | None
    norm: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """The names in one stack of layers."""

    layers: str
    """The list of layers; `*` stands for a number on the way to it."""
    bottlenecks: Mapping[str, Place]
    linears: Mapping[str, Place]
    modality: str = ""
    """What the name of our stack begins with, where the order of the towers does not say which is which."""
    hooks: Mapping[str, Hooks] = field(default_factory=dict)
    """By kind of site, for models that are adapted through hooks."""
    deleted: str = ""
    """The role of the branch that the reference deletes from every layer, whatever is adapted."""


_WORDS = ("query", "key", "value")
_LETTERS = ("q", "k", "v")


def _three(path: str, names: tuple[str, str, str] = _LETTERS) -> tuple[str, ...]:
    return tuple(path.format(name) for name in names)


def _tower(
    layers: str,
    *,
    mh: str = "attention_adapters",
    output: str = "output_adapters",
    cross: str = "",
    qkv: tuple[str, ...],
    cross_qkv: tuple[str, ...] = (),
    up: tuple[str, ...],
    down: str,
    cross_field: str = "cross_adapter",
    intermediate: Literal["up", "down"] = "up",
    modality: str = "",
    mh_circuit: Circuit = "own",
    output_circuit: Circuit = "own",
) -> Tower:
    """A row: `qkv` has one path where the projection is fused, `up` one path for each form the MLP may have, and
    `intermediate` says which of the MLP's projections `intermediate_lora` adapts."""
    bottlenecks = {
        mh: Place(kind="self_attention", field="mh_adapter", circuit=mh_circuit),
        output: Place(kind="mlp", field="output_adapter", circuit=output_circuit),
    }
    if cross:
        # The outputs of both attentions are of one class wherever one field governs them.
        circuit = mh_circuit if cross_field == "mh_adapter" else "own"
        bottlenecks[cross] = Place(kind="cross_attention", field=cross_field, circuit=circuit)
    linears: dict[str, Place] = {}
    attentions: tuple[tuple[tuple[str, ...], Kind], ...] = ((qkv, "self_attention"), (cross_qkv, "cross_attention"))
    for paths, kind in attentions:
        played = (_LETTERS,) if len(paths) == 1 else tuple((role,) for role in _LETTERS)
        for path, roles in zip(paths, played, strict=False):
            linears[path] = Place(kind=kind, field="selfattn_lora", roles=roles)
    fields = ("intermediate_lora", "output_lora") if intermediate == "up" else ("output_lora", "intermediate_lora")
    linears |= {path: Place(kind="mlp", field=fields[0], roles=("up",)) for path in up}
    linears[down] = Place(kind="mlp", field=fields[1], roles=("down",))
    return Tower(layers=layers, bottlenecks=bottlenecks, linears=linears, modality=modality)


def _bert(
    qkv: tuple[str, ...] = _three("attention.self.{}", _WORDS), attention_circuit: Circuit = "own"
) -> tuple[Tower, ...]:
    row = _tower(
        "encoder.layer",
        mh="attention.output",
        output="output",
        cross="crossattention.output",
        cross_field="mh_adapter",  # one class makes the outputs of both attentions
        qkv=qkv,
        cross_qkv=_three("crossattention.self.{}", _WORDS),
        up=("intermediate.dense",),
        down="output.dense",
        mh_circuit=attention_circuit,
    )
    return (row,)


def _vit(output: str) -> tuple[Tower, ...]:
    qkv = _three("attention.attention.{}", _WORDS)
    return (_tower("encoder.layer", output=output, qkv=qkv, up=("intermediate.dense",), down="output.dense"),)


def _clip(layers: str, modality: str) -> Tower:
    return _tower(layers, qkv=_three("self_attn.{}_proj"), up=("mlp.fc1",), down="mlp.fc2", modality=modality)


def _bart() -> tuple[Tower, ...]:
    qkv = _three("self_attn.{}_proj")
    decoder = _tower(
        "decoder.layers",
        cross="cross_attention_adapters",
        qkv=qkv,
        cross_qkv=_three("encoder_attn.{}_proj"),
        up=("fc1",),
        down="fc2",
    )
    return (_tower("encoder.layers", qkv=qkv, up=("fc1",), down="fc2"), decoder)


def _t5() -> tuple[Tower, ...]:
    def mlp(path: str) -> tuple[str, str, str]:
        # `wi` of the plain form, `wi_1` (not the gate, `wi_0`) of the gated one
        return f"{path}.DenseReluDense.wi", f"{path}.DenseReluDense.wi_1", f"{path}.DenseReluDense.wo"

    qkv = _three("layer.0.SelfAttention.{}")
    *up, down = mlp("layer.1")
    encoder = _tower("encoder.block", mh="layer.0", output="layer.1", qkv=qkv, up=tuple(up), down=down)
    *up, down = mlp("layer.2")
    decoder = _tower(
        "decoder.block",
        mh="layer.0",
        cross="layer.1",
        output="layer.2",
        qkv=qkv,
        cross_qkv=_three("layer.1.EncDecAttention.{}"),
        up=tuple(up),
        down=down,
    )
    return encoder, decoder


def _llama() -> tuple[Tower, ...]:
    qkv = _three("self_attn.{}_proj")
    # `intermediate_lora` adapts the down-projection here and `output_lora` the up-projection
    return (_tower("layers", qkv=qkv, up=("mlp.up_proj",), down="mlp.down_proj", intermediate="down"),)


_CLIP_TEXT = _clip("text_model.encoder.layers", "text")
_CLIP_VISION = _clip("vision_model.encoder.layers", "image")

TOWERS: dict[str, tuple[Tower, ...]] = {
    "albert": (
        _tower(
            "encoder.albert_layer_groups.*.albert_layers",
            mh="attention.attention_adapters",
            qkv=_three("attention.{}", _WORDS),
            up=("ffn",),
            down="ffn_output",
            mh_circuit="exchanged",  # called with its arguments in the other order
        ),
    ),
    "bart": _bart(),
    "beit": _vit("output_adapters"),
    "bert": _bert(),
    "bert-generation": _bert(),
    "clip": (_CLIP_TEXT, _CLIP_VISION),
    "clip_text_model": (_CLIP_TEXT,),
    "clip_vision_model": (_CLIP_VISION,),
    "deberta": _bert(("attention.self.in_proj",)),
    "deberta-v2": _bert(_three("attention.self.{}_proj", _WORDS)),
    "distilbert": (_tower("transformer.layer", qkv=_three("attention.{}_lin"), up=("ffn.lin1",), down="ffn.lin2"),),
    "electra": _bert(),
    "gpt2": (_tower("h", qkv=("attn.c_attn",), up=("mlp.c_fc",), down="mlp.c_proj"),),
    "gptj": (_tower("h", qkv=_three("attn.{}_proj"), up=("mlp.fc_in",), down="mlp.fc_out", output_circuit="joined"),),
    "llama": _llama(),
    "mbart": _bart(),
    "mistral": _llama(),
    "mt5": _t5(),
    "plbart": _bart(),
    "roberta": _bert(),
    "t5": _t5(),
    "vit": _vit("output.output_adapters"),
    "whisper": _bart(),
    "xlm-roberta": _bert(),
    # The attention's bottleneck is given no norm; the language adapters are deleted.
    "xmod": tuple(replace(tower, deleted="mlp_2") for tower in _bert(attention_circuit="unnormed")),
}
"""The stacks of every model type, in the order in which the reference numbers their layers."""

RANDOM_BASES = {"deberta", "modernbert"}
"""Model types to which the reference adds a random bias that it does not save: the one of the fused projection, where
the base has none. Its adapters are thus trained on another base than the one they name."""


def interface_towers(interface: Mapping[str, Any]) -> tuple[Tower, ...]:
    """The stack of a model that the reference adapts through hooks, from the interface that names its modules.

    Its bottlenecks take the output of a branch's last projection, and what enters the module that `layer_pre_self_attn`
    or `layer_pre_ffn` names for the stream.
    """
    attention, fused = str(interface["layer_self_attn"]), interface.get("attn_qkv_proj")
    names = [fused] if fused else [interface[f"attn_{role}_proj"] for role in _LETTERS]
    row = _tower(
        str(interface["model_layers"]),
        qkv=tuple(f"{attention}.{name}" for name in names),
        up=(str(interface["layer_intermediate_proj"]),),
        down=str(interface["layer_output_proj"]),
        mh_circuit="inner",
        output_circuit="inner",
    )
    hooks = {
        kind: Hooks(stream=interface.get(f"layer_pre_{part}"), norm=interface.get(norm))
        for kind, part, norm in (("self_attention", "self_attn", "layer_ln_1"), ("mlp", "ffn", "layer_ln_2"))
    }
    return (replace(row, hooks=hooks),)
