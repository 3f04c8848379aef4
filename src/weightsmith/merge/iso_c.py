"""No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces
(Marczak et al., ICML 2025).
"""

from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import identity_at, order_free
from weightsmith.core.method import op


@op(paper="arXiv:2502.04959", laws=[identity_at("base", scale=0.0), order_free("ws")])
def iso_c(
    ws: list[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"],
    *,
    scale: Annotated[float, Interval(ge=0, le=3)] = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Add the models' changes up and give all singular directions of the sum the same strength.

    $$ \theta = \theta_0 + \lambda\,\bar\sigma\,U V^\top, \quad U \Sigma V^\top = \textstyle\sum_i \tau_i, \quad
       \bar\sigma = \mathrm{mean}(\mathrm{diag}\,\Sigma) $$

    Kernels are matrices with one row for each output. The changes of vectors are averaged.

    Args:
        scale: alpha in the paper, section 4: chosen on held-out data there.

    Example:
        >>> iso_c([torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))], torch.zeros(2, 2))
        tensor([[3., 0.],
                [0., 3.]])
    """
    total = sum(w - base for w in ws)
    if base.ndim < 2:
        return base + scale / len(ws) * total
    u, s, vh = torch.linalg.svd(total.flatten(1), full_matrices=False)
    return base + scale * s.mean() * (u @ vh).reshape(base.shape)
