"""TIES-Merging: Resolving Interference When Merging Models (Yadav et al., NeurIPS 2023)."""

from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import identity_at, order_free
from weightsmith.core.method import Streamed, op, streamed


@op(paper="arXiv:2306.01708", laws=[identity_at("base", scale=0.0), order_free("ws")])
def ties(
    ws: list[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"],
    *,
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2,
    scale: Annotated[float, Interval(ge=0, le=2)] = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Keep each model's largest changes, agree on their signs, and average the changes of the agreed sign.

    $$ \theta = \theta_0 + \lambda \, \mathrm{elect}\big(\mathrm{trim}_k(\theta_i - \theta_0)\big) $$

    Trimming is per tensor and keeps ties at the threshold.

    Args:
        density: k in the paper, section 4.1: share of the changes kept.
        scale: lambda in the paper, section 4.3.

    Example:
        >>> ties([torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 2.0])], torch.zeros(2), density=1.0)
        tensor([3.0000, 1.5000])
    """
    deltas = [w - base for w in ws]
    kept = max(1, int(density * base.numel()))
    thresholds = [float(d.abs().reshape(-1).kthvalue(d.numel() - kept + 1).values) for d in deltas]
    return base + scale * elect([trim(d, t) for d, t in zip(deltas, thresholds, strict=True)])


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Zero the changes smaller than the threshold."""
    return delta * (delta.abs() >= threshold)


def elect(deltas: list[Tensor]) -> Tensor:
    """Mean of the changes whose sign is the sign of the sum of all; zero changes have no vote (section 4.2)."""
    sign = torch.sign(sum(deltas))
    votes = [d * sign > 0 for d in deltas]
    return sum(d * v for d, v in zip(deltas, votes, strict=True)) / sum(v.to(sign.dtype) for v in votes).clamp(min=1)


def tally(ws: list[Tensor], base: Tensor, *, state: "list[tuple[int, int]] | None" = None, **_: object) -> np.ndarray:
    """Counts of the changes' sizes, by the upper half of their bits, then by the lower half within one upper half."""
    sizes = [(w - base).abs() for w in ws]
    if state is None:  # a little-endian float32 has its upper half second
        return np.stack([torch.bincount(s.view(torch.int16)[1::2], minlength=1 << 15).numpy() for s in sizes])
    bits = [s.view(torch.int32).numpy() for s in sizes]
    low = [b[(b >= u << 16) & (b < (u + 1) << 16)] & 0xFFFF for b, (u, _) in zip(bits, state, strict=True)]
    return np.stack([np.bincount(b, minlength=1 << 16) for b in low])


def decide(
    counts: np.ndarray, numel: int, state: "list[tuple[int, int]] | None", *, density: float, **_: object
) -> list:
    """The bin that holds each model's threshold and how many to keep from it; at last the thresholds themselves."""
    kept = [max(1, int(density * numel))] * len(counts) if state is None else [k for _, k in state]
    found = []
    for row, keep in zip(counts, kept, strict=True):
        above = row[::-1].cumsum()
        place = int(np.searchsorted(above, keep))
        found.append((len(row) - 1 - place, keep - int(above[place - 1] if place else 0)))
    if state is None:
        return found
    bits = [(upper << 16) | low for (upper, _), (low, _) in zip(state, found, strict=True)]
    return np.array(bits, np.int32).view(np.float32).tolist()


def apply_thresholds(ws: list[Tensor], base: Tensor, *, scale: float, state: list[float], **_: object) -> Tensor:
    """The merged tensor, given the thresholds."""
    return base + scale * elect([trim(w - base, t) for w, t in zip(ws, state, strict=True)])


streamed(ties, Streamed(apply_thresholds, tally=tally, decide=decide, passes=2))
