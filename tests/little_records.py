"""Records of runs as trainings leave them, without a training."""

from inarch.core.records import (
    EpochRecord,
    FindingRecord,
    GroupRecord,
    ModuleRecord,
    MonitorRecord,
    RunRecord,
    SeedsRecord,
    SiteRecord,
    StudyRecord,
    TrialRecord,
    VerdictRecord,
)

HOSTILE = """</script><script>document.title = "broken"</script> "quoted' & <b>bold</b> \u2028 {{ 1 + 1 }}"""
KEPT, LOST = "y = x + h + A(x + h)", "y = h + A(x + h)"


def sites(adapted=KEPT, verdict="preserved", adapter="a", layers=3):
    """A ViT's: attention without an adapter, a bottleneck after each MLP."""
    shared = {
        "stack": "image0",
        "layers": tuple(range(layers)),
        "layer_class": "ViTLayer",
        "arrangement": "pre",
        "width": 16,
    }
    module = ModuleRecord(adapter=adapter, method="bottleneck", port="sublayer", role="", parameters=80)
    attention = SiteRecord(role="self_attention", kind="self_attention", projections=("q", "k", "v", "o"), **shared)
    mlp = SiteRecord(
        role="mlp", kind="mlp", modules=(module,), pretrained="y = x + h", adapted=adapted, verdict=verdict, **shared
    )
    return (attention, mlp)


def run(accuracy=0.9, *, adapter="seq_bn", learning_rate=0.001, reduction=16.0, trainable=1000, **changes):
    """A finished run of three epochs that ends with an accuracy."""
    method = {"method": "bottleneck", "reduction_factor": reduction, "leave_out": []}
    epochs = [
        EpochRecord(epoch=0.0, step=0, metrics={"loss": 2.3, "accuracy": 0.1}),
        *(
            EpochRecord(epoch=float(n), step=10 * n, train_loss=2 / n, metrics={"loss": 2 / n, "accuracy": part})
            for n, part in enumerate((accuracy / 2, accuracy * 0.8, accuracy), start=1)
        ),
    ]
    values = {
        "status": "finished",
        "name": "a",
        "trains": "adapter" if adapter else "head",
        "adapter": adapter,
        "seed": 0,
        "job": {
            "model": "demo",
            "data": {"data": "digits"},
            "adapter": {"methods": [method]} if adapter else None,
            "trains": "adapter" if adapter else "head",
            "recipe": {"learning_rate": learning_rate, "epochs": 3, "seed": 0},
        },
        "command": ("inarch", "train", "--adapter", f"{adapter}[reduction_factor={reduction}]"),
        "model": {"class": "ViTForImageClassification", "parameters": 100_000, "trainable": trainable},
        "data": {"name": "digits"},
        "verdict": VerdictRecord(sound=True) if adapter else None,
        "sites": sites() if adapter else (),
        "environment": {"device": "cpu", "versions": {"torch": "2"}},
        "metric": "accuracy",
        "epochs": tuple(epochs),
        "results": {"accuracy": accuracy, "loss": 0.1},
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 12.5,
    }
    return RunRecord(**{**values, **changes})


def unsound(**changes):
    """A run of a configuration that loses the skip connection, with the finding that says so."""
    finding = FindingRecord(
        code="unsound-wiring",
        level="error",
        place="image0 mlp, layers 0-2",
        message="skip connection lost; the base model computes `y = x + h`",
        fixes=("residual_before_ln=False", "original_ln_after=True"),
        advice="They compute the same function.",
    )
    group = GroupRecord(
        place="image0 mlp, layers 0-2", arrangement="pre", pretrained="y = x + h", adapted=LOST, verdict="skip lost"
    )
    verdict = VerdictRecord(sound=False, groups=(group,), findings=("error unsound-wiring: lost",), details=(finding,))
    lost = sites(LOST, "skip connection lost")
    return run(
        **{"accuracy": 0.4, "adapter": "seq_bn[original_ln_after=False]", "verdict": verdict, "sites": lost} | changes
    )


def seeds(*accuracies):
    """The same training with a seed for each accuracy."""
    runs = [run(accuracy, seed=number) for number, accuracy in enumerate(accuracies)]
    return SeedsRecord.of(runs, len(runs), {**runs[0].job, "seeds": len(runs)}, ("inarch", "train", "--seeds", "2"))


def watched(verdict="stalled", **changes):
    """A run with what its monitor saw."""
    seen = MonitorRecord(
        verdict=verdict, step=15, num_steps=150, reason="the loss stays at `2.3`", silent=("image0.1.mlp",)
    )
    return run(**{"monitor": seen} | changes)


def study(**changes):
    """Five trials: two trained, one refused, one settled by proof, one pruned; of the second no run is left."""

    def trial(number, status, judge, **more):
        values = {"learning_rate": 10.0 ** -(number % 3 + 1), "reduction_factor": 2**number}
        verdict = VerdictRecord(sound=status != "refused")
        known = {"values": values, "adapter": f"seq_bn[reduction_factor={2**number}]", "parameters": 1000 * 2**number}
        return TrialRecord(number=number, status=status, decided_by=judge, verdict=verdict, **known, **more)

    trials = (
        trial(0, "finished", "training", value=0.9, seeds={"0": 0.9}, steps=30, seconds=10.0, runs=("trials/0000",)),
        trial(
            1,
            "finished",
            "training",
            value=0.95,
            std=0.01,
            seeds={"0": 0.94, "1": 0.96},
            curve=((0.0, 0.1), (1.0, 0.95)),
        ),
        trial(2, "refused", "check", reason="the skip connection is lost"),
        trial(3, "repeated", "proof", value=0.9, same_as=0, reason="it computes what trial 0 does"),
        trial(4, "pruned", "hyperband", value=0.99, curve=((0.0, 0.1), (1.0, 0.99))),
    )
    made = {"name": "mine", "job": {"study": {}}, "command": ("inarch", "sweep"), "trials": trials, "best": 1}
    return StudyRecord(
        **{
            **made,
            "data": {"name": "digits"},
            "model": {"class": "ViT", "head_parameters": 100},
            "steps": 60,
            "steps_in_full": 150,
        }
        | changes
    )


def save(folder, **records):
    """Each record in a folder of its name below `folder`."""
    for name, record in records.items():
        record.save(folder / name)
    return folder
