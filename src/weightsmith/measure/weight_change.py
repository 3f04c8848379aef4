"""Are All Layers Created Equal? (Zhang, Bengio and Singer, JMLR 2022)."""

import torch
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import zero_when_equal
from weightsmith.core.method import measure
from weightsmith.core.weights import TILE


@measure(paper="arXiv:1902.01996", laws=[zero_when_equal()])
def weight_change(w: Float[Tensor, "*shape"], base: Float[Tensor, "*shape"]) -> dict[str, float]:
    r"""How far, in which direction and how widely training, pruning or quantising has moved a weight.

    $$ \text{relative} = \frac{\lVert W - W_0 \rVert_F}{\lVert W_0 \rVert_F}, \qquad
       \text{cosine\_distance} = 1 - \frac{\langle W, W_0 \rangle}{\lVert W \rVert_F \lVert W_0 \rVert_F} $$

    Returns:
        `relative` and `cosine_distance`; `largest`, the largest change of an element; `changed`, the share of elements
        that differ; `sign_flips`, the share whose sign is opposite. All are 0 for equal weights. Where both tensors
        have to be nonzero and one is not, `relative` is infinite and `cosine_distance` 1.

    Example:
        >>> weight_change(torch.tensor([3.0, -4.0]), torch.tensor([3.0, 4.0]))["relative"]
        1.6
    """
    change = own = other = dot = largest = 0.0
    differ = flips = 0
    for a, b in zip(w.detach().reshape(-1).split(TILE), base.detach().reshape(-1).split(TILE), strict=True):
        a, b = a.double(), b.double()
        gap = a - b
        change, own, other = change + float(gap @ gap), own + float(a @ a), other + float(b @ b)
        dot, largest = dot + float(a @ b), max(largest, float(gap.abs().max()))
        differ, flips = differ + int(torch.count_nonzero(gap)), flips + int((a * b < 0).sum())
    return {
        "relative": (change / other) ** 0.5 if other else float("inf") if own else 0.0,
        "cosine_distance": max(0.0, 1 - dot / (own * other) ** 0.5) if own and other else float(own != other),
        "largest": largest,
        "changed": differ / w.numel(),
        "sign_flips": flips / w.numel(),
    }
