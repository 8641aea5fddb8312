"""Watches one real forward, to show that every tap is where the sites say it is."""

import itertools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attach import watch_output, watch_stream
from .bank import SiteSlot, pick
from .core.errors import SiteError, join_problems
from .core.site import Site, Sites
from .sites import Inputs, given_inputs, likely_inputs, synthesise, unfused
from .tensors import is_quantised

logger = logging.getLogger(__name__)

_PLAIN = (bool, int, float, str, tuple, type(None))


def verify(model: nn.Module, sites: Sites, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the model once on these arguments, in eval mode, and compare what passes at the taps with the sites.

    Raises `SiteError` that names every site whose branch output does not appear exactly once after its stream, whose
    stream or width is not as claimed, or where the sum `x + h` is not what the layer goes on with.
    """
    witnesses = [_Witness(model, site) for site in sites]
    handles = [handle for witness in witnesses for handle in witness.watch()]
    try:
        run(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    problems = [problem for witness in witnesses if (problem := witness.problem())]
    if not problems:
        followers = itertools.pairwise(witnesses)
        problems = [problem for first, second in followers if (problem := first.disagrees(second))]
    if problems:
        raise SiteError(join_problems(problems))


def tell_left_alone(sites: Sites) -> None:
    """Warn of what a probe has found and no adapter can reach, such as a tower that the inputs did not."""
    if sites.refused:
        more = f", and {len(sites.refused) - 1} more" if len(sites.refused) > 1 else ""
        logger.warning(
            "Parts of %s get no adapters: %s%s. All are listed in `adapters.sites.refused`.",
            sites.model_class,
            sites.refused[0],
            more,
        )


def verify_attached(model: nn.Module, sites: Sites, example_inputs: Any) -> None:
    """Watch one real forward: a short one, and where that does not show that all is well, one that surely is right."""
    likely = likely_inputs(model) if example_inputs is None else None
    if likely is not None:
        try:
            verify(model, sites, likely.args, likely.kwargs)
        except Exception:  # noqa: BLE001  a model may refuse made-up inputs in any way
            logger.debug("%s did not take the shortest inputs.", type(model).__name__)
        else:
            return
    inputs = Inputs((), synthesise(model) or {}) if example_inputs is None else given_inputs(example_inputs)
    if inputs.args or inputs.kwargs:
        verify(model, sites, inputs.args, inputs.kwargs)
    else:  # there is a layout, or the probe would have needed inputs
        logger.warning(
            "No forward of %s was watched, for no inputs can be made up: nothing shows that the taps of its layout are "
            "right. Pass `example_inputs`.",
            type(model).__name__,
        )


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the model once, in eval mode, and leave it as it was."""
    # A forward may change what a module notes of its input: Swin shrinks its windows for a small image, for good.
    notes = {module: {k: v for k, v in vars(module).items() if type(v) in _PLAIN} for module in model.modules()}
    try:
        model.eval()
        for module in notes:
            # In eval mode bitsandbytes packs four-bit weights for inference, for good: they would train nothing after.
            if not any(module.children()) and any(map(is_quantised, module.parameters(recurse=False))):
                module.training = True
        with torch.no_grad(), unfused(), torch.random.fork_rng(devices=[]):
            model(*args, **kwargs)
    finally:
        for module, noted in notes.items():
            vars(module).update(noted)


class _Witness:
    """What passed at the taps of one site, call by call."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        self.model, self.site = model, site
        self.outputs: list[Tensor] = []
        self.streams: list[Tensor] = []
        self.normed: list[Tensor] = []
        self._slot = SiteSlot(site)

    def watch(self) -> list[RemovableHandle]:
        site = self.site
        handles = watch_output(self.model, site, self._slot, self._on_output)
        if site.stream is not None:
            handles.append(watch_stream(self.model, site, site.stream, self._slot))
        if site.post_norm is not None:
            norm = self.model.get_submodule(site.absolute(site.post_norm))
            handles.append(norm.register_forward_pre_hook(self._on_norm))
        return handles

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._slot.is_meant():
            return
        self.outputs.append(pick(output, self.site.output.key).detach().clone())
        stream = self._slot.take_held()
        if stream is not None:
            self.streams.append(stream.detach().clone())

    def _on_norm(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(self.normed) < len(self.outputs):  # else it is called for another sum of the layer, which shares it
            self.normed.append(args[0].detach().clone())

    def problem(self) -> str:
        """The first claim that is wrong, as a sentence; empty if all hold."""
        site, place = self.site, self.site.absolute(self.site.output.path)
        if not self.outputs:
            return (
                f"Every site must run; got no call of `{place}` for site `{site.key}`. "
                "Pass `example_inputs` that reach every layer."
            )
        width = self.outputs[0].shape[site.feature_dim]
        if width != site.width:
            return (
                f"A branch output has the width of its site, {site.width}; got {width} at "
                f"`{place}`. Pass a layout with another `output`."
            )
        if site.stream is None or not site.same_layout:
            return ""
        shapes = [(tuple(x.shape), tuple(h.shape)) for x, h in zip(self.streams, self.outputs, strict=False)]
        if len(self.streams) != len(self.outputs) or any(x != h for x, h in shapes):
            return (
                f"The stream is seen once before each branch output, in its shape; got {len(self.streams)} for "
                f"{len(self.outputs)} outputs, {shapes[:1]} at site `{site.key}`. Pass a layout with another `stream`."
            )
        if site.exact and not site.shared_sum and site.post_norm is not None:
            return self._compare(self.normed, "what its norm receives")
        return ""

    def disagrees(self, following: "_Witness") -> str:
        """Whether the next site of the same layer call receives something else than this site's sum."""
        site = self.site
        comparable = (
            following.site.layer_path == site.layer_path
            and following.site.stack == site.stack
            and following.site.layer == site.layer
            and site.post_norm is None
            and site.exact
            and site.same_layout
            and not site.shared_sum
            and site.handed_on
            and site.stream is not None
            and following.streams
        )
        return self._compare(following.streams, f"the stream of `{following.site.key}`") if comparable else ""

    def _compare(self, found: list[Tensor], what: str) -> str:
        for x, h, total in zip(self.streams, self.outputs, found, strict=False):
            tolerance = 8 * torch.finfo(total.dtype).eps * max(1.0, float(total.abs().max()))
            if total.numel() != x.numel() or not torch.allclose((x + h).view_as(total), total, rtol=0, atol=tolerance):
                return (
                    f"The stream plus the branch output is what a layer goes on with; got something else in {what} at "
                    f"site `{self.site.key}` (`{self.site.layer_path}`). Pass a layout that names the taps of the sum."
                )
        return ""
