"""Meet MergeKit v0.1: Arcee Fusion, Expanded Model Support, Multi-GPU Acceleration (Arcee AI, blog post 2025)."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import picks
from weightsmith.core.method import op

EPSILON = 1e-8
"""Added to probabilities, so that their ratio stays finite."""


@op(paper="no paper: a blog post of Arcee AI, and mergekit's source", laws=[picks("w", "base")])
def arcee_fusion(w: Float[Tensor, "*shape"], base: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Take the changes that stand out and leave the rest of the base as it is.

    $$ s = \lvert\theta_1 - \theta_0\rvert \cdot \mathrm{KL}\big(\mathrm{softmax}(\theta_1) \,\Vert\,
       \mathrm{softmax}(\theta_0)\big), \quad
       \theta = \begin{cases}\theta_1 & s \ge q_2 + \tfrac32 (q_3 - q_1)\\ \theta_0 & \text{otherwise}\end{cases} $$

    Softmax and divergence are those of a row, the last dimension; q are the quartiles of s over the tensor, at the next
    lower element. mergekit 0.1.5 estimates the quartiles of a tensor of more than a million elements from a random
    sample, so that two runs differ.

    Example:
        >>> arcee_fusion(torch.tensor([0.1, 0.2, 0.1, 0.2, 5.0]), torch.zeros(5))
        tensor([0., 0., 0., 0., 5.])
    """
    new, old = (x.softmax(-1) + EPSILON for x in (w, base))
    importance = (w - base).abs() * (new * (new / old).log()).sum(-1, keepdim=True)
    ordered = np.sort(importance.reshape(-1).cpu().numpy())
    low, middle, high = (float(ordered[(len(ordered) - 1) * k // 4]) for k in (1, 2, 3))
    return torch.where(importance >= middle + 1.5 * (high - low), w, base)
