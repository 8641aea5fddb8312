"""Inputs of single model types, where no generic input serves."""

from collections.abc import Callable, Mapping

from torch import nn

from inarch.sites import Inputs

FACTORIES: Mapping[str, Callable[[nn.Module], Inputs]] = {}
