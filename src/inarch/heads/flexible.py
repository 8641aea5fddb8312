"""The flexible heads of one model, and the forward that runs them.

The heads are modules of the model, beside its layers' adapters, so that they are copied, moved and saved with it. While
a model has some, its `forward` is an object that stands in the instance: the class stays as it is. It runs the base
below the model's own task head, then the active heads; with none active it is the model's own forward. Its signature
names the targets of the heads, which is how a trainer knows what columns of the data the model takes.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import like
from ..bank import CHILD, LayerSlot
from ..compose import Batch, Setup, ends, shares
from ..core.errors import ConfigError, SetupError, nearest
from ..core.site import Sites
from .generating import generate, generation_config
from .kinds import HeadConfig, LanguageModelHead, MultipleChoiceHead, Seq2SeqLMHead
from .layers import HEADS, Head, LanguageModel
from .outputs import CARRIED, HeadOutput, MultiHeadOutput, joined
from .states import States, decodes, natural_pooling, read_states

SLOT = "heads"


def path_of(name: str) -> str:
    """The place of a flexible head in its model."""
    return f"{CHILD}.{SLOT}.{name}"


def name_at(path: str) -> str:
    """The name of the flexible head at a place; empty for a head of another kind."""
    start = f"{CHILD}.{SLOT}."
    return path[len(start) :] if path.startswith(start) else ""


def build_head(model: nn.Module, sites: Sites, config: HeadConfig) -> Head:
    """A head with initial weights that fits the states of a model, on their device and in their type.

    Raises `ConfigError` for a head that the model has no place for.
    """
    settings = getattr(model, "config", None)
    last = sites.sites[-1]
    width = _width(settings, last.width)
    dropout = _number(settings, "classifier_dropout", "hidden_dropout_prob", default=0.0)
    if isinstance(config, LanguageModelHead):
        table = embeddings_of(model)
        if table is None:
            raise ConfigError(
                f"A language-modelling head stands on a model with embeddings of tokens; got {type(model).__name__} "
                "without any. Add a head of another kind."
            )
        tied = config.tied if config.tied is not None else bool(getattr(settings, "tie_word_embeddings", True))
        head: Head = HEADS[type(config)](  # type: ignore[call-arg]  # those of language models take more
            config,
            width,
            dropout,
            embeddings=table if tied else _output_embeddings(model, table),
            eps=float(getattr(settings, "layer_norm_eps", None) or 1e-12),  # as `adapters` has it, on GPT-2 too
            tied=tied,
        )
    else:
        head = HEADS[type(config)](config, width, dropout)
    head.returns, head.fields = _output_class(model, head)
    head.start(_number(settings, "initializer_range", default=0.02))
    return head.to(*like(model, last)).train(model.training)


def _output_class(model: nn.Module, head: Head) -> tuple[Any, tuple[str, ...]]:
    """The class of transformers that a head's output has, and its fields; none where it has none."""
    name = head.output[decodes(model)]
    if not name or not hasattr(model, "main_input_name"):
        return None, ()
    from transformers import modeling_outputs

    kind = getattr(modeling_outputs, name)
    return kind, tuple(field.name for field in dataclasses.fields(kind))


def _number(settings: Any, *names: str, default: float) -> float:
    """The first of these settings that is a number."""
    found = (getattr(settings, name, None) for name in names)
    return next((float(value) for value in found if isinstance(value, int | float)), default)


def _width(settings: Any, fallback: int) -> int:
    """The width of the last states of a model."""
    for name in ("hidden_size", "d_model"):
        if isinstance(width := getattr(settings, name, None), int):
            return width
    return fallback


def embeddings_of(model: nn.Module) -> Tensor | None:
    """(V, E), the input embeddings of a model's tokens."""
    own: Any = getattr(model, "get_input_embeddings", None)
    try:
        found = own() if own is not None else None
    except NotImplementedError:
        return None
    weight = getattr(found, "weight", None)
    return weight if isinstance(found, nn.Embedding) and isinstance(weight, Tensor) else None


def _output_embeddings(model: nn.Module, table: Tensor) -> Tensor:
    own: Any = getattr(model, "get_output_embeddings", None)
    found = own() if own is not None else None
    weight = getattr(found, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.shape == table.shape else table


class FlexibleHeads(nn.ModuleDict):
    """The heads of one model by name, and which of them are active."""

    def __init__(self, natural: str) -> None:
        super().__init__()
        self.natural = natural
        """The pooling that fits the model."""
        self.active: tuple[str, ...] = ()
        self.setup: Setup | None = None
        """What is active in the model, and may cut the batch."""
        self.batch: Batch | None = None

    def require(self, name: str) -> None:
        """Raise `SetupError` for a head that the model does not have."""
        if name not in self:
            raise SetupError(f"A head must be added before it is used; got {name!r}. {nearest(name, self)}")

    def chosen(self, given: str | Sequence[str] | None) -> dict[str, Head]:
        """The heads that a forward runs: those that are asked for, or the active ones. Raises `SetupError`."""
        wanted = self.active if given is None else (given,) if isinstance(given, str) else tuple(given)
        for name in wanted:
            self.require(name)
        return {name: self.head(name) for name in wanted}

    def head(self, name: str) -> Head:
        """One head."""
        found = self[name]
        assert isinstance(found, Head)
        return found

    def targets(self) -> tuple[str, ...]:
        """What the heads learn from and what else they need of a batch, by name."""
        every = [self.head(name) for name in self]
        return tuple(dict.fromkeys(name for head in every for name in (*head.targets, *head.extra)))

    def parts(self, count: int) -> list[tuple[str, Tensor | None]]:
        """The active heads, each with the numbers of its rows, of so many; none for all of them."""
        if self.setup is None or len(self.active) < 2 or len(ends(self.setup)) != len(self.active):
            return [(name, None) for name in self.active]
        found = shares(self.setup, count, self._tasks)
        return [(name, share.rows) for name, share in zip(self.active, found, strict=True)]

    def _tasks(self) -> Tensor:
        assert self.batch is not None, "a setup with tasks watches the batch"
        return self.batch.require_tasks(SLOT)


def heads_in(model: nn.Module) -> FlexibleHeads | None:
    """The flexible heads of a model, if it has some."""
    slot = model._modules.get(CHILD)
    found = slot._modules.get(SLOT) if isinstance(slot, LayerSlot) else None
    return found if isinstance(found, FlexibleHeads) else None


def install(model: nn.Module, *, causal: bool) -> FlexibleHeads:
    """The flexible heads of a model, which gets an empty place for them where it has none."""
    found = heads_in(model)
    if found is None:
        found = FlexibleHeads(natural_pooling(model, causal=causal))
        slot = model._modules.setdefault(CHILD, LayerSlot())
        assert isinstance(slot, LayerSlot)
        slot[SLOT] = found
        model.__dict__["forward"] = HeadedForward(model)
    return found


def put(model: nn.Module, name: str, head: Head, *, causal: bool) -> None:
    """Give a model a flexible head, in the place of any of that name."""
    install(model, causal=causal)[name] = head
    if isinstance(head, LanguageModel) and not hasattr(model, "generation_config") and hasattr(model, "config"):
        model.__dict__["generation_config"] = generation_config(model)  # trainers read it from there


def uninstall(model: nn.Module) -> None:
    """Give a model its own forward back, and take its flexible heads."""
    forward = model.__dict__.get("forward")
    slot = model._modules.get(CHILD)
    if isinstance(forward, HeadedForward) and isinstance(slot, LayerSlot):
        forward.remove()
        del slot[SLOT]
        if not len(slot):
            delattr(model, CHILD)


class HeadedForward:
    """The forward of a model with flexible heads."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own: Any = model.__dict__.get("forward")
        """A forward that was put on the instance before, in the place of its class's."""
        self.names = tuple(self._parameters())
        """What the base takes."""
        self.gives_generate = not hasattr(model, "generate")
        if self.gives_generate:
            model.__dict__["generate"] = self.generate

    def remove(self) -> None:
        """Leave the instance as it was."""
        self.model.__dict__.pop("forward", None)
        if self.own is not None:
            self.model.__dict__["forward"] = self.own
        if self.gives_generate:
            self.model.__dict__.pop("generate", None)
            self.model.__dict__.pop("generation_config", None)

    @property
    def heads(self) -> FlexibleHeads:
        """The heads of the model."""
        found = heads_in(self.model)
        assert found is not None, "the forward leaves with the heads"
        return found

    @property
    def __signature__(self) -> inspect.Signature:
        """What the base takes, and what its heads take."""
        named = self._parameters()
        kind = inspect.Parameter.KEYWORD_ONLY
        more = [inspect.Parameter(name, kind, default=None) for name in (*self.heads.targets(), "head")]
        return inspect.Signature([*named.values(), *(one for one in more if one.name not in named)])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the active head, where the model's own class does not generate."""
        heads = self.heads.chosen(None)
        if not heads or not all(isinstance(head, LanguageModel) for head in heads.values()):
            raise SetupError(
                f"What generates is a language-modelling head; got {', '.join(heads) or 'none'} active in "
                f"{type(self.model).__name__}. Set `adapters.active_head` to one."
            )
        return generate(self.model, *args, **kwargs)

    def __call__(self, *args: Any, head: str | Sequence[str] | None = None, **inputs: Any) -> Any:
        """The output of the active heads, or of those asked for, or of the model itself where there is none."""
        found = self.heads.chosen(head)
        if not found:
            return self._plain()(*args, **inputs)
        inputs = {**dict(zip(self.names, args, strict=False)), **inputs}
        given = {name: inputs.pop(name, None) for name in self.heads.targets()}
        given = {name: value for name, value in given.items() if value is not None}
        in_full = inputs.pop("return_dict", None)
        inputs = self._prepared(found, inputs, given)
        output = self._base()(**inputs)
        width = next(iter(found.values())).width
        states = read_states(output, inputs, self.model, width=width, natural=self.heads.natural)
        states = replace(states, embeddings=embeddings_of(self.model), scale=self._scale())
        parts = [(name, None) for name in found] if head is not None else self.heads.parts(len(states.tokens))
        if len(parts) == 1:
            result = self._output(found[parts[0][0]], states, given, output)
        else:
            result = self._outputs([(found[name], rows) for name, rows in parts], states, given, output)
        wants_tuple = in_full is False or (in_full is None and getattr(self._settings(), "return_dict", True) is False)
        return result.to_tuple() if wants_tuple else result

    # The base

    def _settings(self) -> Any:
        return getattr(self.model, "config", None)

    def _plain(self) -> Callable[..., Any]:
        """The model's own forward."""
        own: Callable[..., Any] = self.own or type(self.model).forward.__get__(self.model)
        return own

    def _below(self) -> nn.Module | None:
        """The part of the model below its task head, where that is a module of its own."""
        base = getattr(self.model, "base_model", None)
        return base if isinstance(base, nn.Module) and base is not self.model else None

    def _base(self) -> Callable[..., Any]:
        """What gives the last states."""
        features = getattr(self.model, "forward_features", None)  # of timm
        if callable(features) and not self._is_known():
            return features  # type: ignore[no-any-return]
        return self._below() or self._plain()

    def _is_known(self) -> bool:
        """Whether the model is one of transformers."""
        return hasattr(self.model, "main_input_name")

    def _scale(self) -> float:
        """What the states are multiplied by before tied embeddings: T5 divides them by the root of their width."""
        settings = self._settings()
        is_scaled = getattr(settings, "scale_decoder_outputs", False)
        return float(settings.d_model**-0.5) if is_scaled else 1.0

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """What the base takes by name."""
        base = self._base()
        found = inspect.signature(base.forward if isinstance(base, nn.Module) else base).parameters
        rest = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return {name: parameter for name, parameter in found.items() if parameter.kind not in rest}

    def _prepared(
        self, heads: Mapping[str, Head], inputs: dict[str, Any], given: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """The inputs of the base: a row for each choice, a decoder's tokens, no cache where there are targets."""
        if any(isinstance(head.config, MultipleChoiceHead) for head in heads.values()):
            inputs = {name: _flat(value) for name, value in inputs.items()}
        if not self._is_known():
            return inputs
        no_decoder = all(inputs.get(name) is None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        if no_decoder and decodes(self.model):
            inputs |= self._decoder_inputs(heads, inputs, given)
        if given and "use_cache" in self.names:
            inputs = {"use_cache": False, **inputs}
        if self._below() is None and "For" in type(self.model).__name__:  # no output has the last states but this
            inputs["output_hidden_states"] = True
        return {**inputs, "return_dict": True}

    def _decoder_inputs(
        self, heads: Mapping[str, Head], inputs: Mapping[str, Any], given: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What a decoder reads where nothing is given: the labels, or the encoder's tokens, one place later."""
        labels = given.get("labels")
        if labels is not None and any(isinstance(head.config, Seq2SeqLMHead) for head in heads.values()):
            return {"decoder_input_ids": _shifted(labels, self.model)}
        if inputs.get("input_ids") is None:
            raise SetupError(
                "A head on a model of encoder and decoder reads the states of the decoder's tokens; got no "
                f"`decoder_input_ids`, nor `input_ids` to make them of, for {type(self.model).__name__}. Pass them, or "
                "give the head to the encoder alone."
            )
        own = getattr(self.model, "_shift_right", None)
        return {} if own is None else {"decoder_input_ids": own(inputs["input_ids"])}

    # The output

    def _output(self, head: Head, states: States, given: Mapping[str, Tensor], output: Any) -> Any:
        """The output of one head on all rows."""
        values = head(states, given)
        if head.returns is None:
            return HeadOutput(values, **_carried(output))
        fields = {name: values[name] if name in values else getattr(output, name, None) for name in head.fields}
        return head.returns(**fields)

    def _outputs(
        self, parts: list[tuple[Head, Tensor | None]], states: States, given: Mapping[str, Tensor], output: Any
    ) -> MultiHeadOutput:
        """The outputs of several heads, each on its rows."""
        found = []
        for head, rows in parts:
            own = states if rows is None else states.rows(rows.to(states.tokens.device))
            targets = {name: _rows(value, rows, len(states.tokens)) for name, value in given.items()}
            found.append(HeadOutput(head(own, targets)))
        losses = [one["loss"] for one in found if "loss" in one]
        firsts = [next(value for key, value in one.items() if key != "loss") for one in found]
        scores = list(zip(firsts, (rows for _, rows in parts), strict=True))
        values = {"loss": sum(losses[1:], losses[0]) if losses else None, "logits": joined(scores)}
        return MultiHeadOutput({**values, **_carried(output)}, head_outputs=tuple(found))


def _carried(output: Any) -> dict[str, Any]:
    return {name: value for name in CARRIED if (value := getattr(output, name, None)) is not None}


def _flat(value: Any) -> Any:
    """(B, choices, ...) as (B · choices, ...)."""
    return value.flatten(0, 1) if isinstance(value, Tensor) and value.dim() > 2 else value


def _rows(value: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """The targets of some of so many rows, where each sample may be several rows."""
    if rows is None:
        return value
    factor = max(1, count // len(value))
    return value[(rows[::factor] // factor).to(value.device)]


def _shifted(labels: Tensor, model: nn.Module) -> Tensor:
    """Labels (B, T) as a decoder reads them: one place later, after the token that it starts with.

    In some families that is the last one of the labels, which names their language; they have a function for it.
    """
    settings: Any = getattr(model, "config", None)
    start, pad = getattr(settings, "decoder_start_token_id", None), getattr(settings, "pad_token_id", None)
    own = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    if own is not None and list(inspect.signature(own).parameters) == ["input_ids", "pad_token_id"]:
        shifted: Tensor = own(labels, pad)
        return shifted
    if start is None:
        raise SetupError(
            f"A decoder's inputs are its labels, after `decoder_start_token_id`; got none in the configuration of "
            f"{type(model).__name__}. Set it, or pass `decoder_input_ids`."
        )
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, 0 if pad is None else pad)
