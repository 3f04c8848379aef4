"""QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (Ashkboos et al., NeurIPS 2024): the rotation as an axis.

`folding.turned` folds one into a whole model.
"""

import math

import torch
from torch import Tensor


def rotate(x: Tensor, signs: Tensor, *, back: bool = False) -> Tensor:
    r"""Rows turned by $R = D (C \otimes H)$: signs, a cosine transform of the odd part of the width, a Hadamard matrix.

    Args:
        x: rows of any number.
        signs: one or minus one for each entry of a row: D.
        back: by the transpose instead, which undoes it.

    Example:
        >>> x = torch.tensor([[4.0, 0.0, 0.0, 0.0]])
        >>> turned = rotate(x, torch.ones(4))
        >>> turned, rotate(turned, torch.ones(4), back=True)
        (tensor([[2., 2., 2., 2.]]), tensor([[4., 0., 0., 0.]]))
    """
    width = x.shape[-1]
    power = width & -width
    odd = width // power
    x = (x if back else x * signs).unflatten(-1, (odd, power))
    half = 1
    while half < power:
        pairs = x.unflatten(-1, (-1, 2, half))
        x = torch.cat([pairs.sum(-2, keepdim=True), -pairs.diff(dim=-2)], -2).flatten(-3)
        half *= 2
    if odd > 1:
        k = torch.arange(odd, dtype=torch.float64)
        cosine = torch.cos(math.pi / odd * k[:, None] * (k + 0.5)) * math.sqrt(2 / odd)
        cosine[0] /= math.sqrt(2)
        cosine = (cosine if back else cosine.T).to(x.dtype).to(x.device)
        x = torch.einsum("...op,oq->...qp", x, cosine)
    x = x.flatten(-2) / math.sqrt(power)
    return x * signs if back else x


def signs(width: int, rng: torch.Generator) -> Tensor:
    """Random signs."""
    return torch.randint(2, (width,), generator=rng).float() * 2 - 1
