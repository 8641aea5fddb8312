"""One adapter out of several of one kind: weighted sums of their weights, or of the updates they make.

    linear     every parameter is the weighted sum of theirs (Chronopoulou et al. 2023, arXiv 2302.07027). Of LoRA this
               is no sum of updates: (sum w B)(sum w A) is not sum w B A
    negate_b   the same of LoRA, with the size of the weight on A and its sign on B alone (Zhang et al. 2023,
               arXiv 2306.14870, section 3.1)
    cat        the sum of updates, exactly: ranks are put one after the other
    svd        the sum of updates, as near as the rank allows: its singular value decomposition, cut off
    ties       TIES (Yadav et al. 2023, arXiv 2306.01708): the largest `density` of each update, a sign by majority, and
               the weighted mean of those that agree
    dare       DARE (Yu et al. 2023, arXiv 2311.03099): each number of an update is kept with the chance `density` and
               divided by it; then the sum

Sums are of updates in the units of the weight: scales such as alpha / r, also where they differ, are in them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .attach import build, methods_in, stored, tensors_in
from .bank import Modules
from .compose import Block
from .core.config import Config
from .core.errors import SetupError, nearest
from .core.exact import exact_sum
from .core.site import Sites
from .methods import AdapterConfig, LinearMethod, method_of

Combination = Literal["linear", "negate_b", "cat", "svd", "ties", "dare"]

_INITIAL = ("dropout", "init_weights", "init_weights_seed", "stochastic_depth")
"""Settings that mean nothing for weights that are there (but that of PiSSA)."""
_SCALES = ("r", "alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""Settings that are in an update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How adapters are combined."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    combine: Combination
    rank: int | None
    density: float | None
    seed: int

    @property
    def sums_updates(self) -> bool:
        """Whether the sum is of updates, so that ranks and scales may differ."""
        return self.combine in ("cat", "svd", "ties", "dare")


def recipe(
    of: Sequence[str] | Mapping[str, float],
    weights: Sequence[float] | None,
    combine: str,
    *,
    normalize_weights: bool,
    rank: int | None,
    density: float | None,
    seed: int,
) -> Recipe:
    """What a user asked for. Raises `SetupError` that says what cannot be meant."""
    if isinstance(of, Block):
        raise SetupError(
            f"An average is one adapter made of adapters by name; got the setup {of}. Give names and weights, or "
            "activate the setup."
        )
    if isinstance(of, Mapping):
        if weights is not None:
            raise SetupError("Weights are given once; got a mapping and `weights`. Leave out `weights`.")
        weights = list(of.values())
    names = tuple([of] if isinstance(of, str) else of)
    chosen = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if combine not in get_args(Combination):
        raise SetupError(
            f"`combine` is one of {', '.join(f'`{way}`' for way in get_args(Combination))}; got {combine!r}. "
            f"{nearest(str(combine), get_args(Combination))}"
        )
    is_finite = all(map(math.isfinite, chosen))
    total = exact_sum(chosen) if is_finite else 0
    if not names or len(chosen) != len(names) or not is_finite or (normalize_weights and total <= 0):
        raise SetupError(
            "`weights` of an average are one number for each adapter, with a sum above zero to be divided by; got "
            f"{chosen} for {len(names)} adapters. Give {len(names)} weights, or `normalize_weights=False`."
        )
    if rank is not None and (combine in ("linear", "negate_b", "cat") or rank < 1):
        raise SetupError(
            f"`rank` cuts off a decomposition, with `svd`, `ties` and `dare`; got {rank} with `{combine}`. Leave it "
            "out, or give a number from 1."
        )
    if (density is None) == (combine in ("ties", "dare")) or (density is not None and not 0 < density <= 1):
        raise SetupError(
            "`density` is the share of an update that `ties` and `dare` keep, above 0 up to 1; got "
            f"{density} with `{combine}`. Give one with these two alone."
        )
    if combine == "ties" and min(chosen) < 0:
        raise SetupError(
            f"The mean of `ties` has weights of one sign; got {chosen}. Negate with `svd`, `cat` or `dare`."
        )
    shares = tuple(weight / float(total) if normalize_weights else weight for weight in chosen)
    return Recipe(names=names, weights=shares, combine=combine, rank=rank, density=density, seed=seed)  # type: ignore[arg-type]


def combined_config(asked: Recipe, configs: Sequence[AdapterConfig]) -> AdapterConfig:
    """The configuration of the result. Raises `SetupError` for adapters that cannot be combined so."""
    for name, config in zip(asked.names, configs, strict=True):
        if [type(part) for part in config.parts] != [type(part) for part in configs[0].parts]:
            raise SetupError(
                f"Adapters of the same methods are averaged; got `{asked.names[0]}` ({configs[0]}) and `{name}` "
                f"({config}). Average adapters of one configuration."
            )
    columns = zip(*(config.parts for config in configs), strict=True)
    return AdapterConfig(tuple(_combined_part(asked, column) for column in columns))


def _combined_part(asked: Recipe, parts: Sequence[Config]) -> Config:
    first, own = parts[0], parts[0].to_dict()
    ignored = {*_INITIAL, *(_SCALES if asked.sums_updates else ())}
    for name, part in zip(asked.names, parts, strict=True):
        other = part.to_dict()
        different = {field for field in own if own[field] != other[field]}
        is_split = "pissa" in (own.get("init_weights"), other.get("init_weights")) and not asked.sums_updates
        different -= ignored - ({"init_weights"} if is_split else set())
        if different:
            is_scale = different <= {*_SCALES, "init_weights"}
            raise SetupError(
                f"Adapters of one configuration are averaged; got `{asked.names[0]}` and `{name}`, which differ in "
                f"{', '.join(f'`{field}`' for field in sorted(different))}. "
                f"{'Sum their updates, with `svd` or `cat`.' if is_scale else 'Average others.'}"
            )
    method = method_of(first)
    known = ("linear", *(method.combinations(first) if issubclass(method, LinearMethod) else ()))
    if asked.combine not in known:
        raise SetupError(
            f"An adapter is combined as its method knows; got `{asked.combine}` for `{asked.names[0]}` "
            f"({AdapterConfig((first,))}), which knows {', '.join(f'`{name}`' for name in known)}. Use one of those."
        )
    if not asked.sums_updates or "r" not in own:
        return first
    values = [part.to_dict() for part in parts]
    ranks = [
        max(value["r"], *value["rank_pattern"].values(), 1) * (2 if value["init_weights"] == "pissa" else 1)
        for value in values
    ]
    rank = sum(ranks) if asked.combine == "cat" else asked.rank or max(ranks)
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_weights": "lora", "dropout": 0.0}
    return first.replace(r=rank, alpha=float(rank), **plain)


@torch.no_grad()
def take_frozen(asked: Recipe, sources: Sequence[Mapping[str, Tensor]], target: Mapping[str, Tensor]) -> None:
    """Give the result what its adapters keep frozen. Raises `SetupError` where that is not the same in all of them.

    Arguments: tensors by their key in an adapter file.
    """
    for key, tensor in target.items():
        if isinstance(tensor, nn.Parameter):
            continue
        for name, source in zip(asked.names, sources, strict=True):
            if not torch.equal(source[key], sources[0][key]):
                raise SetupError(
                    f"Adapters are averaged that keep the same values frozen; got `{asked.names[0]}` and `{name}`, "
                    f"which differ in `{key}`. Sum their updates, with `svd` or `cat`, where the method has them, or "
                    "train them from one `init_weights_seed`."
                )
        tensor.copy_(sources[0][key])


def average(model: nn.Module, sites: Sites, asked: Recipe, config: AdapterConfig) -> tuple[dict[str, Modules], float]:
    """The modules of the result by site key, not yet in the model, and how far its updates are from those meant."""
    built = build(model, sites, config, started=False)
    sources = [stored(model, sites, name) for name in asked.names]
    take_frozen(asked, [tensors_in(source) for source in sources], tensors_in(built))
    generator = torch.Generator().manual_seed(asked.seed)
    farthest = 0.0
    for place, modules in built.items():
        for key, module in methods_in(modules):
            theirs = [source[place].find(key) for source in sources]
            farthest = max(farthest, combine(asked, theirs, module, generator))  # type: ignore[arg-type]
    return built, farthest


@torch.no_grad()
def combine(asked: Recipe, sources: Sequence[nn.Module], target: nn.Module, generator: torch.Generator) -> float:
    """Give a module of the result its weights, from those of the adapters at the same place.

    Returns the distance of its update from the one that was meant, relative to that; 0 where there is no update.
    """
    known = [source.update() for source in sources if isinstance(source, LinearMethod)]
    updates = [update for update in known if update is not None]
    if asked.combine in ("svd", "ties", "dare"):
        assert isinstance(target, LinearMethod)
        meant = _RULES[asked.combine](asked, updates, generator)
        target.put_update(meant)
        _combine_additive(asked, sources, target, generator)
        return _distance(target, meant)
    if asked.combine == "cat":
        assert isinstance(target, LinearMethod)
        target.put_side_by_side(sources, asked.weights)
        _combine_additive(asked, sources, target, generator)
    else:
        for name, parameter in target.named_parameters():
            is_signless = asked.combine == "negate_b" and name in getattr(target, "signless", ())
            weights = [abs(weight) if is_signless else weight for weight in asked.weights]
            parameter.copy_(_weighted([source.get_parameter(name) for source in sources], weights))
    return _distance(target, _sum(asked, updates, generator)) if updates else 0.0


def _combine_additive(
    asked: Recipe, sources: Sequence[nn.Module], target: LinearMethod, generator: torch.Generator
) -> None:
    """Parameters that are updates themselves, by the rule of updates."""
    for name, parameter in target.named_parameters():
        if name in target.additive:
            rule = _RULES.get(asked.combine, _sum)
            parameter.copy_(rule(asked, [source.get_parameter(name) for source in sources], generator))


def _distance(target: nn.Module, meant: Tensor) -> float:
    assert isinstance(target, LinearMethod)
    found = target.update()
    assert found is not None
    size, change = float(meant.norm()), float((found - meant).norm())
    return change / size if size else change


def _weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    first, *others = [value * weight for value, weight in zip(values, weights, strict=True)]
    return sum(others, start=first)


def _sum(asked: Recipe, updates: Sequence[Tensor], _: torch.Generator) -> Tensor:
    return _weighted(updates, asked.weights)


def _ties(asked: Recipe, updates: Sequence[Tensor], _: torch.Generator) -> Tensor:
    assert asked.density is not None
    trimmed = []
    for update in updates:
        count = max(1, round(asked.density * update.numel()))
        kept = torch.zeros_like(update).flatten()
        largest = update.abs().flatten().topk(count).indices
        kept[largest] = update.flatten()[largest]
        trimmed.append(kept.view_as(update))
    sign = _weighted(trimmed, asked.weights).sign()
    agree = [(update.sign() == sign) & (sign != 0) for update in trimmed]
    total = _weighted([mask.to(sign.dtype) for mask in agree], asked.weights)
    summed = _weighted([update * mask for update, mask in zip(trimmed, agree, strict=True)], asked.weights)
    return torch.where(total > 0, summed / total.clamp_min(torch.finfo(total.dtype).tiny), torch.zeros_like(summed))


def _dare(asked: Recipe, updates: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    assert asked.density is not None
    kept = [torch.rand(update.shape, generator=generator) < asked.density for update in updates]
    thinned = [update * mask.to(update.device) / asked.density for update, mask in zip(updates, kept, strict=True)]
    return _weighted(thinned, asked.weights)


_RULES: dict[str, Callable[[Recipe, Sequence[Tensor], torch.Generator], Tensor]] = {
    "svd": _sum,
    "ties": _ties,
    "dare": _dare,
}
