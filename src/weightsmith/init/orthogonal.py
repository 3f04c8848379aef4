"""Exact solutions to the nonlinear dynamics of learning in deep linear neural networks (Saxe et al., ICLR 2014)."""

from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.errors import MethodError
from weightsmith.core.laws import orthonormal
from weightsmith.core.method import op
from weightsmith.core.weights import Spec


@op(paper="arXiv:1312.6120", laws=[orthonormal("gain")], roles="attention.*|mlp.*|linear|conv*|expert*")
def orthogonal(
    spec: Spec, rng: torch.Generator, *, gain: Annotated[float, Interval(ge=0.01, le=10)] = 1.0
) -> Float[Tensor, "out in *kernel"]:
    r"""Draw a random matrix with orthonormal rows or columns, so that a deep stack keeps all lengths.

    $$ W = g \, Q \operatorname{sign}(\operatorname{diag} R), \qquad Q R = A, \quad A_{ij} \sim \mathcal N(0, 1) $$

    Convolutions are taken as matrices (out, everything else). The bits are those of `torch.nn.init.orthogonal_`.

    Args:
        gain: factor g on the matrix, section 3 of the paper; sqrt(2) suits ReLU.

    Raises:
        MethodError: the tensor has fewer than two dimensions.

    Example:
        >>> w = orthogonal(Spec("mlp.up.weight", (2, 3)), torch.Generator().manual_seed(0))
        >>> (w @ w.T).round(decimals=4).abs()
        tensor([[1., 0.],
                [0., 1.]])
    """
    if len(spec.shape) < 2:
        raise MethodError(
            f"shape {list(spec.shape)} is not a matrix", where=spec.name, hint="leave it out: `--exclude`"
        )
    rows, columns = spec.shape[0], spec.numel // spec.shape[0]
    normal = torch.randn(rows, columns, generator=rng)
    q, r = torch.linalg.qr(normal if rows >= columns else normal.T)
    q = q * r.diagonal().sign()
    return (gain * (q if rows >= columns else q.T)).contiguous().view(spec.shape)
