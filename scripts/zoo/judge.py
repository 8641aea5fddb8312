"""What one model type makes of an adapter: every claim that a graft rests on, checked on a tiny random model."""

import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inarch
from inarch.bank import pick
from inarch.core.errors import SiteError
from inarch.core.site import Sites
from inarch.sites import Inputs
from inarch.sites.inputs import made_inputs
from inarch.sites.trace import leaves

from . import oracle
from .build import model_class, tiny_model
from .describe import lines
from .factories import FACTORIES
from .reviews import IDLE, REFUSED, REVIEWED, TRAINS_ONLY_WITH

ADAPTS, REFUSED_BY_NAME, FAILS = "adapts", "refused", "fails"


@dataclass(kw_only=True)
class Record:
    """The verdict on one model type, as JSON."""

    type: str
    verdict: str = FAILS
    stage: str = "build"
    reason: str = ""
    model_class: str = ""
    sites: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    arrangements: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    ports: list[str] = field(default_factory=list)
    source: str = ""
    refused: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    counts: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    layout: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Fault(Exception):  # noqa: N818  a finding, not an error
    """A claim that does not hold."""


def judge(model_type: str) -> Record:
    """Build, attach, graft, train one step, save, load and detach."""
    record = Record(type=model_type)
    start = time.monotonic()
    try:
        _judge(record)
        record.verdict, record.stage = ADAPTS, ""
    except ImportError as error:
        record.verdict, record.reason = REFUSED_BY_NAME, _missing_package(error)
    except SiteError as error:
        # inarch itself says why it does not touch this model.
        record.verdict = REFUSED_BY_NAME if record.stage == "attach" else FAILS
        record.reason = str(error)
    except Exception as error:  # noqa: BLE001  whatever goes wrong is the verdict
        record.reason = f"{type(error).__name__}: {error}" if not isinstance(error, Fault) else str(error)
    record.seconds = round(time.monotonic() - start, 2)
    if record.verdict != ADAPTS and model_type in REFUSED:
        record.verdict, record.reason = REFUSED_BY_NAME, REFUSED[model_type]
    return record


def _missing_package(error: ImportError) -> str:
    found = re.search(r"requires the (\S+) library", str(error))
    return f"needs the package {found.group(1)}, which is not installed" if found else str(error)


def _judge(record: Record) -> None:
    record.model_class = model_class(record.type).__name__
    model = tiny_model(record.type)
    record.stage = "inputs"
    factory = FACTORIES.get(record.type)
    inputs = factory(model) if factory else _generic(model)
    ran = _watch(model, inputs)
    found = _outputs(model, inputs)
    before = _frozen(model, inputs)
    record.idle = [*ran.idle, *_left_out(model)]
    record.stage = "attach"
    hooks = _count_hooks(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    given = None if factory is None else (dict(inputs.kwargs) if not inputs.args else inputs.args)
    adapters = inarch.attach(model, example_inputs=given)
    _describe(record, adapters.sites)
    record.stage = "count"
    _check_counts(record, model, adapters.sites, ran)
    record.stage = "add"
    adapters.add("zoo", _configuration(adapters.sites))
    adapters.train("zoo", head=False)
    record.stage = "identity"
    _check_same(before, _outputs(model, inputs), "a new adapter changes the output")
    record.stage = "gradients"
    with torch.no_grad():
        for parameter in adapters["zoo"].values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    _check_gradients(record, model, adapters, inputs)
    record.stage = "effect"
    active = _outputs(model, inputs)
    if not _differ(before, active):
        raise Fault("an adapter with other weights leaves the output as it was")
    record.stage = "save and load"
    with tempfile.TemporaryDirectory() as folder:
        adapters.save("zoo", Path(folder) / "a", head=False)
        adapters.deactivate()
        _check_same(before, _outputs(model, inputs), "a deactivated adapter changes the output")
        adapters.remove("zoo")
        adapters.load(Path(folder) / "a", name="again")
    # Trainable like the one it was saved from: torch chooses kernels, and so rounds, by what requires a gradient.
    adapters.train("again", head=False)
    _check_same(active, _outputs(model, inputs), "a loaded adapter computes something else")
    record.stage = "stream"
    _check_stream(record, adapters, model, inputs, before)
    record.stage = "detach"
    adapters.detach()
    _check_detached(model, state, hooks)
    _check_same(found, _outputs(model, inputs), "a detached model computes something else")
    record.stage = "towers"
    allowed = IDLE.get(record.type, {})
    record.excused += [f"{tower}: {reason}" for tower, reason in allowed.items()]
    if [tower for tower in record.idle if tower.split(" ")[0] not in allowed]:
        raise Fault(f"the inputs reach every tower; got none for {', '.join(record.idle)}")


# -------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class _Ran:
    modules: frozenset[nn.Module]
    paths: frozenset[str]
    idle: list[str]


def _generic(model: nn.Module) -> Inputs:
    """The first inputs that inarch makes and the model accepts."""
    failures: list[str] = []
    candidates = made_inputs(model)
    dtype = next(p.dtype for p in model.parameters())
    for inputs in candidates:
        moved = inputs.to("cpu", dtype)
        try:
            _run(model, moved)
        except Exception as error:  # noqa: BLE001  a model's forward may raise anything
            failures.append(f"{sorted(inputs.kwargs)}: {type(error).__name__}: {str(error)[:300]}")
        else:
            return moved
    raise Fault(f"no inputs are made: {' / '.join(failures) or 'nothing known of the arguments'}")


def _watch(model: nn.Module, inputs: Inputs) -> _Ran:
    """Which modules a forward reaches, and the pre-trained towers of which it reaches no part."""
    from transformers import PreTrainedModel

    reached: set[nn.Module] = set()

    def enter(module: nn.Module, _args: tuple[Any, ...]) -> None:
        reached.add(module)

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    try:
        _run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    ran = {path for path, module in model.named_modules(remove_duplicate=False) if module in reached}
    idle = [
        path
        for path, module in model.named_modules()
        if path
        and isinstance(module, PreTrainedModel)
        and not any(other == path or other.startswith(f"{path}.") for other in ran)
    ]
    idle = [path for path in idle if not any(path.startswith(f"{other}.") for other in idle)]
    return _Ran(
        frozenset(reached), frozenset(ran), [f"{path} ({type(model.get_submodule(path)).__name__})" for path in idle]
    )


def _left_out(model: nn.Module) -> list[str]:
    """Parts that the configuration may have, and has not: their towers are nowhere to be reached."""
    kind = type(model.config)
    names = getattr(kind, "sub_configs_defaults", None) or getattr(kind, "sub_configs", {})
    return [f"{name} (not configured)" for name in names if getattr(model.config, name, None) is None]


# -------------------------------------------------------------------- outputs


def _run(model: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*_fresh(inputs.args), **_fresh(dict(inputs.kwargs)))


def _fresh(value: Any) -> Any:
    """Inputs of which a forward may change one without changing the next forward."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(_fresh(item) for item in value)
    if type(value) is dict:
        return {name: _fresh(item) for name, item in value.items()}
    return value() if callable(value) else value


def _outputs(model: nn.Module, inputs: Inputs) -> dict[Any, Tensor]:
    return {key: tensor.clone() for key, tensor in leaves(_run(model, inputs), depth=6)}


def _frozen(model: nn.Module, inputs: Inputs) -> dict[Any, Tensor]:
    """The outputs of the base as it will be when adapters train.

    torch chooses kernels, and so rounds, by which weights require a gradient; whoever freezes them changes that.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        return _outputs(model, inputs)
    finally:
        for parameter in trainable:
            parameter.requires_grad = True


def _check_same(before: Mapping[Any, Tensor], after: Mapping[Any, Tensor], what: str) -> None:
    if before.keys() != after.keys():
        raise Fault(f"{what}: other outputs, {sorted(map(str, before.keys() ^ after.keys()))}")
    for key, tensor in before.items():
        if tensor.shape != after[key].shape or not torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(after[key])):
            difference = (
                (tensor.double() - after[key].double()).abs().max() if tensor.shape == after[key].shape else "shape"
            )
            raise Fault(f"{what}: {'.'.join(map(str, key)) or 'output'} by {difference}")


def _differ(before: Mapping[Any, Tensor], after: Mapping[Any, Tensor]) -> bool:
    return any(
        tensor.shape != after[key].shape or not torch.equal(tensor, after[key]) for key, tensor in before.items()
    )


# -------------------------------------------------------------------- sites


def _describe(record: Record, sites: Sites) -> None:
    record.sites = len(sites)
    record.layers = sites.num_layers
    record.kinds = dict(Counter(site.kind for site in sites))
    record.arrangements = sorted({site.arrangement for site in sites})
    record.refused = list(sites.refused)
    record.source = sites.source
    reads = [site for site in sites if site.stream is not None and site.same_layout]
    roles = sorted({role for site in sites for role in site.projections})
    stream = "all" if len(reads) == len(sites) else "none" if not reads else "some"
    record.ports = [f"stream:{stream}", *roles]
    record.layout = lines(sites)


def _check_counts(record: Record, model: nn.Module, sites: Sites, ran: "_Ran") -> None:
    """Every layer that ran has as many sites as one of the two oracles says, or as a review says."""
    found: dict[str, int] = Counter(site.layer_path for site in sites)
    stacks: dict[str, set[str]] = defaultdict(set)
    for site in sites:
        stacks[site.layer_path].add(site.stack)
    reviewed = REVIEWED.get(record.type, {})
    layers = _layers(model, set(found), ran.paths)
    reached = ran.modules
    wrong: dict[str, list[str]] = defaultdict(list)
    for path in layers:
        layer = model.get_submodule(path)
        name = type(layer).__name__
        number = found.get(path, 0) // max(1, len(stacks[path]) or 1)
        wanted = {oracle.sums(layer, reached), oracle.sublayers(layer, reached)}
        if name in reviewed:
            wanted = set(reviewed[name])
        # What is refused by name is not missing in silence.
        is_named = any(f"`{path}`" in text for text in sites.refused)
        if number not in wanted and not (is_named and number < max(wanted)):
            wrong[f"{name}: {number} sites, expected {' or '.join(map(str, sorted(wanted)))}"].append(path)
    record.counts = [f"{text} at {paths[0]} and {len(paths) - 1} more" for text, paths in wrong.items()]
    if record.counts:
        raise Fault("; ".join(record.counts))


def _layers(model: nn.Module, known: set[str], ran: frozenset[str]) -> list[str]:
    """The layers that ran: those with sites, and whatever transformers checkpoints as one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = dict(model.named_modules())
    checkpointed = {
        path
        for path, module in modules.items()
        if isinstance(module, GradientCheckpointingLayer)
        and path in ran
        and not any(isinstance(inner, GradientCheckpointingLayer) for inner in list(module.modules())[1:])
    }
    extra = {
        path
        for path in checkpointed
        if not any(path.startswith(f"{other}.") or other.startswith(f"{path}.") for other in known)
    }
    return sorted(known | extra)


# -------------------------------------------------------------------- grafting


def _configuration(sites: Sites) -> str:
    """A bottleneck on every site, zero at first, and LoRA on q, k, v and o as far as the model has them."""
    kinds = {site.kind for site in sites}
    flags = {
        "mh_adapter": bool(kinds & {"self_attention", "mixer"}),
        "output_adapter": "mlp" in kinds,
        "cross_adapter": "cross_attention" in kinds,
    }
    settings = ",".join(f"{name}={value}" for name, value in flags.items())
    bottleneck = f"double_seq_bn[{settings},init_weights=mam_adapter,reduction_factor=8]"
    roles = [role for role in "qkvo" if any(role in s.projections for s in sites if s.kind != "mlp")]
    return f"{bottleneck}|lora[attn_matrices=[{','.join(roles)}],r=2]" if roles else bottleneck


def _check_stream(
    record: Record, adapters: Any, model: nn.Module, inputs: Inputs, before: Mapping[Any, Tensor]
) -> None:
    """Adapters that read the stream: new ones leave the output as it was, bit for bit."""
    if record.ports[0] != "stream:all":
        return
    kinds = set(record.kinds)
    flags = (
        f"mh_adapter={bool(kinds & {'self_attention', 'mixer'})},output_adapter={'mlp' in kinds},"
        f"cross_adapter={'cross_attention' in kinds}"
    )
    adapters.add("stream", f"par_bn[{flags},reduction_factor=8]")
    adapters.activate("stream")
    _check_same(before, _outputs(model, inputs), "a new adapter that reads the stream changes the output")
    adapters.deactivate()


# -------------------------------------------------------------------- gradients


def _loss(model: nn.Module, inputs: Inputs) -> Tensor | None:
    """A weighted sum of everything floating that the model returns, in eval mode with gradients if that has any."""
    with torch.random.fork_rng(devices=[]), _training(model):
        torch.manual_seed(0)
        result = model(*_fresh(inputs.args), **_fresh(dict(inputs.kwargs)))
    generator = torch.Generator().manual_seed(1)
    total = None
    for _, tensor in leaves(result, depth=6):
        if tensor.is_floating_point() and tensor.requires_grad:
            finite = torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor))
            part = (finite * torch.randn(tensor.shape, generator=generator)).sum()
            total = part if total is None else total + part
    return total


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Train mode and embeddings that require gradients, for a type that has no gradients without; else nothing."""
    if model.config.model_type not in TRAINS_ONLY_WITH:
        yield
        return
    try:
        model.train()
        model.enable_input_require_grads()
        yield
    finally:
        model.disable_input_require_grads()
        model.eval()


def _check_gradients(record: Record, model: nn.Module, adapters: Any, inputs: Inputs) -> None:
    record.excused += [text for model_type, text in TRAINS_ONLY_WITH.items() if model_type == record.type]
    own = adapters["zoo"]
    ids = {id(parameter) for parameter in own.values()}
    loss = _loss(model, inputs)
    if loss is None:
        raise Fault("no output depends on the adapter")
    with _training(model):  # a reversible layer runs again, backwards
        loss.backward()
    touched = [k for k, p in model.named_parameters() if p.grad is not None and id(p) not in ids]
    if touched:
        raise Fault(f"{len(touched)} base weights get a gradient, {touched[0]} first")
    idle = [key for key, p in own.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    bad = [key for key, p in own.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    for parameter in own.values():
        parameter.grad = None
    if bad:
        raise Fault(f"{len(bad)} of {len(own)} adapter weights get a gradient that is not finite, {bad[0]} first")
    if idle:
        _excuse(record, model, adapters, inputs, idle)


def _excuse(record: Record, model: nn.Module, adapters: Any, inputs: Inputs, idle: list[str]) -> None:
    """Show on the bare base that nothing added where these weights act can reach the output."""
    sites: Sites = adapters.sites
    places: dict[str, _Place] = {}
    for key in idle:
        site = next(site for site in sites if key.startswith(f"{site.key}."))
        rest = key.removeprefix(f"{site.key}.")
        if rest.startswith("lora."):
            word = rest.split(".")[1]
            role = word.rstrip("0123456789")
            part = word.removeprefix(role) or "0"
            places[key] = _Place(site.absolute(site.projections[role][int(part)].path), side="in")
        else:
            places[key] = _Place(site.absolute(site.output.path), site.output.key, site.output.call)
    alive: list[str] = []
    with adapters.using(None):
        for place in dict.fromkeys(places.values()):
            if not _reaches_output(model, inputs, place):
                record.excused.append(f"{place.path}: no gradient of the base's output comes back to it")
            elif _sees_zeros(model, inputs, place):
                record.excused.append(f"{place.path}: gets nothing but zeros in the base")
            else:
                alive += [key for key, where in places.items() if where == place]
    if alive:
        raise Fault(f"{len(alive)} adapter weights get no gradient, {alive[0]} first")


@dataclass(frozen=True)
class _Place:
    """Where an adapter acts: a module, an item of what it returns, and which of its calls (0: the only one)."""

    path: str
    key: tuple[Any, ...] = ()
    call: int = 0
    side: str = "out"

    def of(self, calls: list[Any]) -> list[Any]:
        """What belongs to the place, of a list with an item for each call of the module."""
        return calls[self.call - 1 : self.call] if self.call else calls


def _sees_zeros(model: nn.Module, inputs: Inputs, place: _Place) -> bool:
    """Whether what an adapter there reads, the input of a projection or the branch output, is exactly zero."""
    seen: list[bool] = []

    def look(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read = args[0] if place.side == "in" else pick(output, place.key)
        seen.append(not bool(read.any()))

    handle = model.get_submodule(place.path).register_forward_hook(look)
    try:
        _run(model, inputs)
    finally:
        handle.remove()
    return bool(seen) and all(place.of(seen))


def _reaches_output(model: nn.Module, inputs: Inputs, place: _Place) -> bool:
    added: list[Tensor] = []

    def add(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        h = pick(output, place.key)
        nothing = torch.zeros_like(h, requires_grad=True)
        added.append(nothing)
        return _replaced(output, place.key, h + nothing)

    handle = model.get_submodule(place.path).register_forward_hook(add)
    try:
        loss = _loss(model, inputs)
    finally:
        handle.remove()
    if loss is None:
        return False
    gradients = torch.autograd.grad(loss, place.of(added), allow_unused=True)
    return any(g is not None and bool(g.abs().sum() > 0) for g in gradients)


def _replaced(output: Any, key: tuple[Any, ...], value: Tensor) -> Any:
    if not key:
        return value
    inner = _replaced(output[key[0]], key[1:], value)
    if isinstance(output, (list, tuple)):
        return type(output)(inner if place == key[0] else item for place, item in enumerate(output))
    changed = type(output)(output)
    changed[key[0]] = inner
    return changed


# -------------------------------------------------------------------- detaching


def _count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _check_detached(model: nn.Module, state: Mapping[str, Tensor], hooks: int) -> None:
    after = model.state_dict()
    if list(after) != list(state):
        raise Fault("a detached model has other keys in its state dict")
    changed = [k for k, t in state.items() if not torch.equal(torch.nan_to_num(t), torch.nan_to_num(after[k]))]
    if changed:
        raise Fault(f"a detached model has other weights, {changed[0]} first")
    if _count_hooks(model) != hooks:
        raise Fault("a detached model has hooks that it did not have")
