"""Rules about the state of the model that is going to be trained: its head, what is frozen, its modes and types."""

from collections.abc import Iterator

from ..facts import Facts
from ..findings import Finding, Level, rule

_HALF = ("float16", "bfloat16")


@rule("head-frozen", "error")
def head_frozen(facts: Facts) -> Iterator[Finding]:
    """The task head holds initial random weights and is not trained.

    The adapter then has to learn around a random readout; the classic case is a head that `modules_to_save` did not
    name. A head counts as untrained where all its biases are zero and its weights have the mean and spread of the
    initialiser.
    """
    model = facts.model
    if model and model.attached and model.random_frozen:
        yield Finding(
            "head-frozen",
            "error",
            ", ".join(f"`{path}`" for path in model.random_frozen),
            "the task head holds its initial random weights and is frozen",
            advice="Call `adapters.train(name)`, which trains the head along, or name it: `train(name, head=[...])`.",
        )


@rule("nothing-trainable", "error")
def nothing_trainable(facts: Facts) -> Iterator[Finding]:
    """No parameter of the adapter requires a gradient, although training is meant.

    An optimiser given `filter(lambda p: p.requires_grad, ...)` is empty then, or trains the head alone. That training
    is meant is known from a recipe, or from a model in train mode; for one in eval mode this is a note, as it is how
    an adapter is loaded for inference.
    """
    model = facts.model
    if model and model.attached and facts.configs and not model.adapter_trainable:
        level: Level = "error" if model.in_training or facts.training is not None else "note"
        yield Finding(
            "nothing-trainable",
            level,
            ", ".join(f"`{name}`" for name in facts.configs),
            "no parameter of the adapter requires a gradient",
            advice="Right for inference; to train it, call `adapters.train(name)`."
            if level == "note"
            else "Call `adapters.train(name)`; `activate` alone changes no `requires_grad`.",
        )


@rule("base-trainable", "error")
def base_trainable(facts: Facts) -> Iterator[Finding]:
    """Parameters of the base require gradients, beside the adapter and the task head.

    The base is trained along then, at a learning rate made for adapters, and the saved adapter does not hold it.
    """
    model = facts.model
    if model and model.attached and model.adapter_trainable and model.base_trainable:
        count = len(model.base_trainable)
        yield Finding(
            "base-trainable",
            "error",
            f"`{model.base_trainable[0]}`" + (f" and {count - 1} more" if count > 1 else ""),
            f"{count} parameters of the base require gradients, and an adapter file does not hold them",
            advice="Call `adapters.train(name)`, which freezes all but the adapter and the head.",
        )


@rule("half-precision", "warning")
def half_precision(facts: Facts) -> Iterator[Finding]:
    """The adapter's own weights are half precision, without a master copy.

    bfloat16 keeps 8 bits: an AdamW step of 1e-3 on a weight near 1 is lost to rounding, and weights stop moving while
    the loss still falls slowly. A base in half precision is fine; it is the trained weights that need 32 bits.
    """
    model = facts.model
    if model and model.attached and any(dtype in _HALF for dtype in model.adapter_dtypes):
        yield Finding(
            "half-precision",
            "warning",
            ", ".join(f"`{name}`" for name in facts.configs),
            f"the trained weights are {' and '.join(model.adapter_dtypes)}, so small steps are rounded away",
            advice="Make them float32, which the forward supports: "
            "`for p in adapters[name].values(): p.data = p.data.float()`.",
        )


@rule("batch-norm-in-training", "warning")
def batch_norm_in_training(facts: Facts) -> Iterator[Finding]:
    """A frozen batch norm in training mode still updates its running statistics.

    The base changes although it is frozen, and the saved adapter does not hold the change: a reloaded adapter computes
    something else.
    """
    model = facts.model
    if model and model.attached and model.batch_norms_in_training:
        names = model.batch_norms_in_training
        yield Finding(
            "batch-norm-in-training",
            "warning",
            f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            "a frozen batch norm in training mode changes its statistics, which no adapter file holds",
            advice="Put these modules in eval mode after `model.train()`.",
        )


@rule("dropout-in-base", "note")
def dropout_in_base(facts: Facts) -> Iterator[Finding]:
    """Dropout of the frozen base is active in training mode.

    It regularises, which small adapters seldom need, and makes training noisier than evaluation.
    """
    model = facts.model
    if model and model.attached and model.dropouts_in_training:
        yield Finding(
            "dropout-in-base",
            "note",
            "the base",
            f"{model.dropouts_in_training} dropouts of the frozen base are active in training mode",
            advice="Nothing to do where that is meant; else set the dropout rates of the model's config to 0.",
        )


@rule("other-base", "error")
def other_base(facts: Facts) -> Iterator[Finding]:
    """A stored adapter was trained on another base model.

    Its weights mean nothing on this one. Compared are sites and samples of the weights, within the type's precision.
    """
    if facts.stored is not None and facts.stored.difference:
        yield Finding(
            "other-base",
            "error",
            ", ".join(f"`{name}`" for name in facts.configs),
            facts.stored.difference,
            advice="Load it into the base model it was trained on.",
        )


@rule("base-unknown", "note")
def base_unknown(facts: Facts) -> Iterator[Finding]:
    """A stored adapter keeps nothing by which its base could be known.

    Folders of PEFT and of the library `adapters` name their base and hold nothing of its weights, so an adapter is
    loaded into any model of the same shapes without a word. It is a warning where the model came from elsewhere.
    """
    if facts.stored is None or facts.stored.difference or not facts.stored.base:
        return
    theirs, ours = facts.stored.base, facts.stored.model
    is_other = bool(ours) and theirs.rstrip("/").rpartition("/")[2] != ours.rstrip("/").rpartition("/")[2]
    yield Finding(
        "base-unknown",
        "warning" if is_other else "note",
        ", ".join(f"`{name}`" for name in facts.configs),
        f"the folder names its base `{theirs}` and keeps nothing of its weights"
        + (f"; the model is `{ours}`" if is_other else ""),
        advice="Make sure that it is this model; saved here once, the adapter knows its base.",
    )


@rule("head-not-found", "error")
def head_not_found(facts: Facts) -> Iterator[Finding]:
    """The task head of a stored adapter has no place in the model, or other labels.

    The adapter was trained with that head; under another one, or a random one, it says nothing.
    """
    if facts.stored is not None and facts.stored.head:
        yield Finding(
            "head-not-found", "error", ", ".join(f"`{name}`" for name in facts.configs), facts.stored.head.rstrip(".")
        )
