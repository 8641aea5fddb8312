"""Linear maps whose weight is a sum of Kronecker products, for bottlenecks with few parameters.

Zhang et al. 2021 (arXiv 2102.08597), section 3.1, equation 4 (PHM), and Mahabadi et al. 2021 (arXiv 2106.04647),
sections 3.1 and 3.2, equations 4 and 5 (Compacter):

    y = x W + b        W = sum_i P_i (x) W_i, i = 1..n        P_i (n, n), W_i (in/n, out/n) = left_i right_i

The rule P may be shared by all layers of a stack, and so may the W_i of all down-, or of all up-projections.

Tensors: (..., in) and (..., out); n `phm_dim`, R `phm_rank`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .method import Sharing, in_dtype


class PHMLinear(Sharing):
    """A linear map of n Kronecker products; `config` has the fields `phm_...` of `BottleneckConfig`."""

    def __init__(self, config: Any, in_features: int, out_features: int, generator: Any = None) -> None:
        super().__init__()
        n, rank = config.phm_dim, config.phm_rank
        self.shares_rule, self.shares_W = config.shared_phm_rule, config.shared_W_phm
        self.in_features, self.out_features = in_features, out_features
        rule = {"rule": (n, n, n)}
        if config.factorized_phm_rule:
            rule = {"rule_left": (n, n, 1), "rule_right": (n, 1, n)}
        weight = {"W": (n, in_features // n, out_features // n)}
        if config.factorized_phm_W:
            weight = {"W_left": (n, in_features // n, rank), "W_right": (n, rank, out_features // n)}
        self.rule_names, self.W_names = tuple(rule), tuple(weight)
        for name, shape in rule.items():
            values = torch.empty(shape)
            if config.phm_c_init == "uniform":
                nn.init.uniform_(values, -1, 1, generator=generator)
            else:
                nn.init.normal_(values, std=config.phm_init_range, generator=generator)
            if config.learn_phm:
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)
        for name, shape in weight.items():
            values = torch.empty(shape)
            for part in values:
                if config.hypercomplex_nonlinearity == "normal":
                    nn.init.normal_(part, std=0.01, generator=generator)
                elif config.hypercomplex_nonlinearity == "glorot-normal":
                    nn.init.xavier_normal_(part, generator=generator)
                else:
                    nn.init.xavier_uniform_(part, generator=generator)
            self.register_parameter(name, nn.Parameter(values))
        self.bias = nn.Parameter(torch.zeros(out_features)) if config.phm_bias else None

    def share(self, known: dict[Any, Any], kind: Any) -> None:
        """Share what is to be shared with the other maps of a `kind`."""
        stack, _ = kind
        for name in self.rule_names if self.shares_rule else ():
            self.tie(name, known, stack)
        for name in self.W_names if self.shares_W else ():
            self.tie(name, known, (kind, self.in_features, self.out_features))

    @torch.no_grad()
    def zero(self) -> None:
        """Make the map zero."""
        getattr(self, self.W_names[-1]).zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rule, weight = self._product(self.rule_names, x), self._product(self.W_names, x)
        whole = torch.einsum("nab,ncd->bdac", rule, weight).reshape(self.out_features, self.in_features)
        return F.linear(in_dtype(x, whole.dtype), whole, self.bias)

    def _product(self, names: tuple[str, ...], like: Tensor) -> Tensor:
        first, *rest = [self.tied(name, like) for name in names]
        return first @ rest[0] if rest else first
