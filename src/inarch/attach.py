"""Grafts slots onto a model and arms their hooks: the one place from which adapters are put into a model.

Hooks exist only where an adapter is active, at most two or three a site: one where h appears, one where x can be read
if the wiring reads it, one on the norm after the sum if the adapter ends behind it.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .bank import (
    CHILD,
    LayerSlot,
    Modules,
    ProjectionSlot,
    Role,
    SiteSlot,
    layer_home,
    module_key,
    slot_name,
    tap_module,
)
from .compose import Batch, Place, Setup, Watched, cuts_rows, fusions, leaves, names, sum_of_rows
from .core.errors import SiteError
from .core.site import Affine, Projection, Site, Sites, Tap
from .frozen import Base
from .inputs import Armed, arm_inputs
from .methods import (
    AdapterConfig,
    InputMethod,
    LinearMethod,
    ParameterMethod,
    Placement,
    PrefixMethod,
    StreamMethod,
    layer_number,
    method_of,
    placements,
)
from .plan import sublayer_part
from .prefixes import PrefixSlot, attention_of, check_shares
from .programs import (
    ForwardOf,
    WiredAdapter,
    circuit_norm,
    circuit_of,
    circuit_site,
    input_program,
    linear_program,
    sum_program,
    wired_adapter,
)
from .sites import Unnested, nesting_encoders
from .streams import Calls, Generating, StreamSlot, stream_program
from .tensors import TRAINABLE, execution_device, is_sharded, is_skeleton
from .vectors import Slots, VectorRole
from .weight import ParameterRole, Shadows, WeightRole, WeightSlot


class Removable(Protocol):
    """What undoes one change of a model, such as the handle of a hook."""

    def remove(self) -> None: ...


def graft(model: nn.Module, sites: Sites) -> None:
    """Give every layer its empty slots. Raises `SiteError` if the model already has some."""
    homes = [layer_home(model, site) for site in sites]
    for site, home in zip(sites, homes, strict=True):
        if hasattr(home, CHILD):
            raise SiteError(
                f"A layer's child `{CHILD}` belongs to inarch; got one already at `{site.layer_path}` of "
                f"{sites.model_class}. Use the handle of the model that was attached first, or `detach()` it."
            )
    for site, home in zip(sites, homes, strict=True):
        if not hasattr(home, CHILD):
            home.add_module(CHILD, LayerSlot())
        getattr(home, CHILD)[slot_name(site)] = SiteSlot(site)


def ungraft(model: nn.Module) -> None:
    """Remove every slot."""
    for home in list(model.modules()):
        if isinstance(home._modules.get(CHILD), LayerSlot):
            delattr(home, CHILD)


def slot_of(model: nn.Module, site: Site) -> SiteSlot:
    """The slot of a site. Raises `SiteError` where the model has lost the layer that held it."""
    try:
        found = getattr(layer_home(model, site), CHILD)[slot_name(site)]
    except (AttributeError, KeyError):
        raise SiteError(
            f"A model keeps the layers that it was attached with; got none with a slot for site `{site.key}` at "
            f"`{site.layer_path}` of {type(model).__name__}. Call `detach()`, and attach the model as it is now."
        ) from None
    assert isinstance(found, SiteSlot)
    return found


def build(model: nn.Module, sites: Sites, config: AdapterConfig, *, started: bool = True) -> dict[str, Modules]:
    """The modules of one adapter, by site key, on each site's device and dtype; not yet in the model.

    `started=False` spares initial weights that are made of the base's, where others follow.
    """
    built: dict[str, Modules] = {}
    for part in config.parts:
        method = method_of(part)
        shared: dict[Any, Any] = {}
        for number, placement in enumerate(placements(part, sites)):
            slot_of(model, placement.site)  # raises where the model has lost the layer
            if placement.port == "prefix":
                attention_of(model, placement.site)  # raises where no prefix can be had
            seed = getattr(part, "init_weights_seed", None)
            # One stream of random numbers for each module: equal weights in every layer would be no random start.
            generator = None if seed is None else torch.Generator().manual_seed(seed * 100_003 + number)
            module = method(part, placement, layer_number(placement.site, sites), generator)
            module.train(model.training)
            device, dtype = like(model, placement.site)
            place = built.setdefault(placement.site.key, Modules())
            place.put(module_key(method.name, placement), module.to(device, dtype))
            module.share(shared)
            if started and isinstance(module, LinearMethod) and module.starts_from_base(part):
                projection = placement.site.projections[placement.role][placement.part]
                module.start(base_of(model, placement.site, projection).read())
            if started and isinstance(module, InputMethod) and placement.entry and placement.entry.words is not None:
                module.start_at(model.get_submodule(placement.entry.words))
    return built


def base_of(model: nn.Module, site: Site, projection: Projection) -> Base:
    """What the base has for a projection of a site."""
    path = site.absolute(projection.path)
    return Base(model.get_submodule(path), projection, ".".join(part for part in (path, projection.weight) if part))


def like(model: nn.Module, site: Site) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that fit the site: those of a floating parameter near the branch output.

    A weight that accelerate keeps elsewhere between forwards runs on the device of its hook.
    """
    for module in (tap_module(model, site, site.output), model.get_submodule(site.layer_path), model):
        for owner in module.modules():
            for parameter in owner.parameters(recurse=False):
                if parameter.dtype not in TRAINABLE:
                    continue
                if is_sharded(parameter):
                    raise _misplaced(site, "is spread over processes", "`fully_shard` is called")
                device = execution_device(owner) if parameter.is_meta else parameter.device
                if device is None and not is_skeleton(model):
                    raise _misplaced(site, "is on the meta device", "the model is offloaded")
                return device or parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def _misplaced(site: Site, state: str, event: str) -> SiteError:
    return SiteError(
        f"An adapter is made where the weights of its site are; got a weight that {state} at `{site.key}` "
        f"(`{site.layer_path}`). Add and load adapters before {event}."
    )


def stored(model: nn.Module, sites: Sites, name: str) -> dict[str, Modules]:
    """The modules of one adapter in the model, by site key."""
    found = {site.key: modules_at(slot_of(model, site), name) for site in sites}
    return {key: modules for key, modules in found.items() if modules is not None}


def tensors_in(adapter: Mapping[str, Modules]) -> dict[str, Tensor]:
    """Parameters and buffers of one adapter, by their key in an adapter file."""
    return {
        f"{site}.{key}": tensor
        for site, modules in adapter.items()
        for key, tensor in modules.state_dict(keep_vars=True).items()
    }


def store(model: nn.Module, sites: Sites, name: str, built: Mapping[str, Modules]) -> None:
    """Put the modules of one adapter into the slots, in the place of any of that name."""
    discard(model, sites, name)
    for key, modules in built.items():
        slot_of(model, sites[key]).adapters.put(name, modules)


def discard(model: nn.Module, sites: Sites, name: str) -> None:
    """Remove the modules of one adapter."""
    for site in sites:
        slot_of(model, site).adapters.drop(name)


def modules_at(slot: SiteSlot, name: str) -> Modules | None:
    """The modules of one adapter at one site."""
    found = slot.adapters.find(name)
    assert found is None or isinstance(found, Modules)
    return found


def methods_in(modules: Modules, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of methods among those of an adapter at a site, by key."""
    for name, module in modules.named_children():
        if isinstance(module, Modules):
            yield from methods_in(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def arm(
    model: nn.Module,
    sites: Sites,
    setup: Setup,
    configs: Mapping[str, AdapterConfig],
    handles: list[Removable],
    *,
    skip_layers: tuple[int, ...] = (),
) -> None:
    """Register the hooks a setup needs, adding what removes them to `handles`.

    `skip_layers` numbers layers that run as if they had no adapter; what is at the input of a stack is in no layer.
    """
    chosen = replace(sites, sites=tuple(site for site in sites if layer_number(site, sites) not in skip_layers))
    batch = Batch(setup, sum_of_rows(setup), _batch_dim(model, sites))
    slots = Slots()
    for site in chosen:
        handles.extend(_arm_prefix(model, site, setup, configs, batch))
    for site in chosen:
        handles += _arm_projections(model, site, setup, configs, batch=batch, slots=slots)
    handles += _arm_weights(model, chosen, setup, configs, slots)
    # After the projections': where both hook one module, the projection is part of the branch.
    for site in chosen:
        handles += _arm_sum(model, site, sites, setup, configs, batch=batch, slots=slots)
    handles += arm_inputs(model, sites, setup, _input_modules(model, sites, setup, configs), batch)
    handles += _arm_streams(model, chosen, setup, configs, batch)
    if cuts_rows(setup):
        handles.append(Watched(batch, model))
    handles += [Unnested(encoder) for encoder in nesting_encoders(model, [site.layer_path for site in sites])]
    forget_compiled()


def _arm_streams(
    model: nn.Module, sites: Sites, setup: Setup, configs: Mapping[str, AdapterConfig], batch: Batch
) -> list[Removable]:
    found = [(site, _stream_modules(slot_of(model, site), leaves(setup), configs)) for site in sites]
    minds_end = any(module.minds_end for _, modules in found for module in modules.values())
    stacks: dict[str, Calls] = {}
    handles: list[Removable] = []
    for site, modules in found:
        if not modules:
            continue
        if site.stack not in stacks:
            stacks[site.stack] = Calls(site, wants_tensors=cuts_rows(setup), minds_end=minds_end)
            handles += stacks[site.stack].watch(model)
        program = stream_program(setup, modules, Place(site.key, site.batch_dim, batch).cut)
        slot = StreamSlot(site, program, stacks[site.stack])
        # First, so that whoever records what layers give records this.
        handles.append(model.get_submodule(site.layer_path).register_forward_hook(slot.rewrite, prepend=True))
    if minds_end and callable(getattr(model, "generate", None)):
        handles.append(Generating(model, list(stacks.values())))
    return handles


def _stream_modules(
    slot: SiteSlot, order: tuple[str, ...], configs: Mapping[str, AdapterConfig]
) -> dict[str, StreamMethod]:
    found: dict[str, StreamMethod] = {}
    for name in order:
        modules = modules_at(slot, name)
        for config in configs[name].parts if modules is not None else ():
            module = modules.find(method_of(config).name)  # type: ignore[union-attr]
            if isinstance(module, StreamMethod):
                found[name] = module
    return found


def _batch_dim(model: nn.Module, sites: Sites) -> int:
    """Where the inputs of a model have their samples: first, but in a model of the user's own that has them second."""
    is_known = hasattr(model, "main_input_name")
    return 0 if is_known else min(site.batch_dim for site in sites)


def disarm(model: nn.Module, handles: list[Removable]) -> None:
    """Remove hooks, and what they hold."""
    if not handles:
        return
    for handle in reversed(handles):  # what stands in for something was put there last
        handle.remove()
    handles.clear()
    for module in model.modules():
        if isinstance(module, SiteSlot):
            module.let_go()
    forget_compiled()


def forget_compiled() -> None:
    """Make compiled models see a change of hooks, which their guards do not cover by default."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _arm_sum(
    model: nn.Module,
    site: Site,
    sites: Sites,
    setup: Setup,
    configs: Mapping[str, AdapterConfig],
    *,
    batch: Batch,
    slots: Slots,
) -> list[RemovableHandle]:
    slot = slot_of(model, site)
    wired: dict[str, WiredAdapter] = {}
    pre_norm = None if site.pre_norm is None else slots.adapted(model.get_submodule(site.absolute(site.pre_norm)))
    before = None if pre_norm is None else ForwardOf(pre_norm, site.feature_dim)
    for name in leaves(setup):
        part, modules = sublayer_part(configs[name], site), modules_at(slot, name)
        branch = modules.find(method_of(part).name) if part is not None and modules is not None else None
        if branch is not None:
            wired[name] = wired_adapter(part, site, branch, before)
    if not wired:
        return []
    circuit = circuit_of(setup, wired)
    path, others = circuit_norm(site, sites, circuit), _earlier_in_sum(site, sites)
    norm = None if path is None else model.get_submodule(path)
    cutter = Place(site.key, site.batch_dim, batch).cut
    fused = {block.name: fusion for block in fusions(setup) if (fusion := _fusion(slot, block.name)) is not None}
    program = sum_program(
        setup,
        wired,
        None if norm is None else slots.adapted(norm),
        joins_others=bool(others),
        fusions=fused,
        cutter=cutter,
        feature_dim=site.feature_dim,
    )
    seen = circuit_site(site, circuit)
    slot.arm(program, seen.output)
    handles = watch_output(model, seen, slot, slot.rewrite)
    if program.reads(0) and site.stream is not None:
        handles.append(watch_stream(model, site, site.stream, slot))
    if norm is not None and program.gives(1):
        handles.append(norm.register_forward_hook(slot.close))
    if program.reads(2):
        # Those branches' own hooks, of sites that run before, are registered already.
        for number, other in enumerate(others):
            if other.output.call:
                raise SiteError(
                    "An adapter that reads the other branches of its sum needs each of them at a module that its layer "
                    f"calls once; got `{other.output.path}`, which is called often, for `{other.key}` at site "
                    f"`{site.key}`. Load the adapter without this site."
                )
            hook = partial(slot.hold_other, other.output.key, number == 0)
            handles.append(tap_module(model, other, other.output).register_forward_hook(hook))
    return handles


def _input_modules(
    model: nn.Module, sites: Sites, setup: Setup, configs: Mapping[str, AdapterConfig]
) -> dict[str, dict[str, list[Armed]]]:
    """By site key and adapter, the modules of the input port, in the order of the adapter's methods."""
    found: dict[str, dict[str, list[Armed]]] = {}
    for name in leaves(setup):
        parts = [part for part in configs[name].parts if issubclass(method_of(part), InputMethod)]
        for part in parts:
            for placement in placements(part, sites):
                modules = modules_at(slot_of(model, placement.site), name)
                module = None if modules is None else modules.find(method_of(part).name)
                if isinstance(module, InputMethod):
                    armed = Armed(part, placement.entry, module)
                    found.setdefault(placement.site.key, {}).setdefault(name, []).append(armed)
    return found


def _fusion(slot: SiteSlot, name: str) -> nn.Module | None:
    """The fusion layer of that name at a site."""
    modules = modules_at(slot, name)
    return None if modules is None else modules.find("fusion")


def _earlier_in_sum(site: Site, sites: Sites) -> list[Site]:
    """The sites that run before and whose branches are added in the same sum."""
    if not site.shared_sum:
        return []
    place = (site.layer_path, site.stack, site.layer)
    earlier = itertools.takewhile(lambda other: other.key != site.key, sites)
    return [other for other in earlier if other.shared_sum and (other.layer_path, other.stack, other.layer) == place]


def check_stream(site: Site) -> None:
    """Raise `SiteError` for a site at which an adapter cannot read the stream."""
    if site.stream is None or not site.same_layout:
        raise SiteError(
            "An adapter that reads the stream needs a place where the layer's stream can be read in the layout of the "
            f"branch output; got {'none' if site.stream is None else 'another layout'} at site `{site.key}` "
            f"(`{site.layer_path}`). Use `original_ln_before=False` and `is_parallel=False`."
        )


def watch_output(model: nn.Module, site: Site, slot: SiteSlot, hook: Callable[..., Any]) -> list[RemovableHandle]:
    """Register a hook on the module of the branch output. Returns what removes it."""
    handles = [tap_module(model, site, site.output).register_forward_hook(hook)]
    if site.output.since is not None:
        start = model.get_submodule(site.absolute(site.output.since))
        handles.append(start.register_forward_pre_hook(slot.begin))
    return handles


def watch_stream(model: nn.Module, site: Site, tap: Tap, slot: SiteSlot) -> RemovableHandle:
    """Register the hook that lets a slot hold the stream. Returns what removes it."""
    module = tap_module(model, site, tap)
    if tap.side == "out":
        return module.register_forward_hook(slot.hold_result)
    slot.watch(module)
    return module.register_forward_pre_hook(slot.hold_argument, with_kwargs=True)


def _arm_prefix(
    model: nn.Module, site: Site, setup: Setup, configs: Mapping[str, AdapterConfig], batch: Batch
) -> Iterator[Removable]:
    slot = slot_of(model, site)
    modules: dict[str, PrefixMethod] = {}
    for name in names(setup):
        found = modules_at(slot, name)
        for part in configs[name].parts if found is not None else ():
            module = found.find(method_of(part).name)  # type: ignore[union-attr]
            if isinstance(module, PrefixMethod):
                modules[name] = module
    if not modules:
        return
    check_shares(setup)
    attention = attention_of(model, site)
    queries = site.projections.get("q", ())
    query = model.get_submodule(site.absolute(queries[0].path)) if len(queries) == 1 else None
    armed = PrefixSlot(site, attention.way, setup, modules, Place(site.key, 0, batch).cut)
    yield from armed.arm(model.get_submodule(attention.path), query)


def _arm_projections(
    model: nn.Module, site: Site, setup: Setup, configs: Mapping[str, AdapterConfig], *, batch: Batch, slots: Slots
) -> list[RemovableHandle]:
    roles: dict[str, list[Role]] = {}
    cutter = Place(site.key, site.batch_dim, batch).cut
    for projection, modules in _adapted_projections(model, site, setup, configs):
        if not projection.weight:
            on_input, on_output = (
                input_program(setup, modules, cutter),
                linear_program(setup, modules, cutter, base_of(model, site, projection)),
            )
            roles.setdefault(projection.path, []).append(Role(on_input, on_output, projection.rows))
    handles = []
    for path, played in roles.items():
        module = model.get_submodule(site.absolute(path))
        hook = slots.outputs[module] = ProjectionSlot(module, played)
        if hook.changes_input:
            handles.append(module.register_forward_pre_hook(hook.prepare, with_kwargs=True))
        handles.append(module.register_forward_hook(hook.adapt, with_kwargs=True))
    return handles


def _arm_weights(
    model: nn.Module, sites: Sites, setup: Setup, configs: Mapping[str, AdapterConfig], slots: Slots
) -> list[Removable]:
    # By module through all sites: two slots on one module would not know of each other.
    programs: dict[nn.Module, tuple[str, dict[str, list[ParameterRole]]]] = {}
    for site in sites:
        for projection, modules in _adapted_projections(model, site, setup, configs):
            if projection.weight:
                path = site.absolute(projection.path)
                _, program = programs.setdefault(model.get_submodule(path), (path, {}))
                program.setdefault(projection.weight, []).append(
                    WeightRole(projection, setup, modules, base_of(model, site, projection))
                )
        for vectors, leaf, changing in _adapted_vectors(model, site, setup, configs):
            path = site.absolute(vectors.path)
            _, program = programs.setdefault(model.get_submodule(path), (path, {}))
            program.setdefault(vectors.names[leaf], []).append(VectorRole(vectors, leaf, setup, changing))
    handles: list[Removable] = []
    for owner, (path, program) in programs.items():
        slot = slots.parameters[owner] = WeightSlot(path, program)
        handles += [
            owner.register_forward_pre_hook(slot.enter, prepend=True),
            owner.register_forward_hook(slot.leave, always_call=True),
            Shadows(owner, tuple(program)),
        ]
    return handles


def _adapted_projections(
    model: nn.Module, site: Site, setup: Setup, configs: Mapping[str, AdapterConfig]
) -> Iterator[tuple[Projection, dict[str, list[LinearMethod]]]]:
    """The projections and norms of a site that adapters of the setup act on, with those adapters."""
    slot = slot_of(model, site)
    places = [(role, part) for role, projections in site.projections.items() for part in range(len(projections))]
    places += [(role, 0) for role, vectors in site.affine.items() if vectors.is_norm]
    for role, part in places:
        modules = _modules_in_role(slot, names(setup), configs, f"{role}{part or ''}", LinearMethod)
        if modules:
            yield Placement(site=site, port="linear", role=role, part=part).projection, modules


def _adapted_vectors(
    model: nn.Module, site: Site, setup: Setup, configs: Mapping[str, AdapterConfig]
) -> Iterator[tuple[Affine, str, dict[str, list[ParameterMethod]]]]:
    """The weights and biases of a site that adapters of the setup act on, with those adapters."""
    slot = slot_of(model, site)
    for role, vectors in site.affine.items():
        found = _modules_in_role(slot, names(setup), configs, role, ParameterMethod)
        for leaf in vectors.names:
            changing = {name: [one for one in modules if one.changes(leaf)] for name, modules in found.items()}
            if any(changing.values()):
                yield vectors, leaf, {name: modules for name, modules in changing.items() if modules}


def _modules_in_role(
    slot: SiteSlot, order: tuple[str, ...], configs: Mapping[str, AdapterConfig], role: str, kind: Any
) -> dict[str, list[Any]]:
    """The modules of a class of methods that adapters have in one role, by adapter."""
    found: dict[str, list[Any]] = {}
    for name in order:
        modules = modules_at(slot, name)
        for config in configs[name].parts if modules is not None else ():
            module = modules.find(f"{method_of(config).name}.{role}")  # type: ignore[union-attr]
            if isinstance(module, kind):
                found.setdefault(name, []).append(module)
    return found
