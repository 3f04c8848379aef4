"""Task Singular Vectors: Reducing Task Interference in Model Merging (Gargiulo et al., CVPR 2025)."""

from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import identity_at, order_free
from weightsmith.core.method import op


@op(paper="arXiv:2412.00081", laws=[identity_at("base", scale=0.0), order_free("ws")])
def tsv_m(
    ws: list[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"],
    *,
    scale: Annotated[float, Interval(ge=0, le=3)] = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Keep each change's leading singular vectors, make those of all models orthogonal, and add up.

    $$ \theta = \theta_0 + \lambda\,\mathrm{orth}([U_1 \cdots U_n])\,\mathrm{diag}(\Sigma_1 \cdots \Sigma_n)\,
       \mathrm{orth}([V_1 \cdots V_n])^\top $$

    Each of n models keeps a share of one n-th of its singular values; orth is the nearest matrix with orthonormal
    columns. Kernels are matrices with one row for each output. The changes of vectors are averaged.

    Args:
        scale: alpha in the paper, section 4: 1 suits many numbers of tasks.

    Example:
        >>> tsv_m([torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0]))], torch.zeros(2, 2))
        tensor([[4., 0.],
                [0., 2.]])
    """
    if base.ndim < 2:
        return base + scale / len(ws) * sum(w - base for w in ws)
    matrices = [(w - base).flatten(1) for w in ws]
    kept = max(1, min(matrices[0].shape) // len(ws))
    parts = [torch.linalg.svd(m, full_matrices=False) for m in matrices]
    u = torch.cat([u[:, :kept] for u, _, _ in parts], 1)
    s = torch.cat([s[:kept] for _, s, _ in parts])
    v = torch.cat([vh[:kept].T for _, _, vh in parts], 1)
    return base + scale * ((orthogonal(u) * s) @ orthogonal(v).T).reshape(base.shape)


def orthogonal(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns; directions that are not there are not invented."""
    u, s, vh = torch.linalg.svd(columns, full_matrices=False)
    return (u * (s > 1e-5 * s[0])) @ vh
