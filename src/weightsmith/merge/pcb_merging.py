"""Parameter Competition Balancing for Model Merging (Du et al., NeurIPS 2024)."""

from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from weightsmith.core.laws import identity_at, order_free
from weightsmith.core.method import op
from weightsmith.core.weights import Computed, Weights, agree, lifted

CLAMPED = 1e-4
"""Share of each model's smallest and of its largest changes that are clamped."""


@op(paper="arXiv:2410.02396", laws=[identity_at("base", scale=0.0), order_free("models")])
def pcb_merging(
    models: list[Weights],
    base: Weights,
    *,
    density: Annotated[float, Interval(gt=0, le=1)] = 0.1,
    scale: Annotated[float, Interval(ge=0, le=2)] = 1.0,
) -> Weights:
    r"""Weigh each change by its size within its task and its agreement with the others; keep the best.

    $$ \beta_i = \exp\big(n\,\mathrm{norm}(|\tau_i|)^2\big) \odot \tanh\big(\tau_i \odot \textstyle\sum_j \tau_j\big),
       \quad \hat\beta_i = \mathrm{norm}(\max(\beta_i, q_{1-r})), \quad
       \theta = \theta_0 + \lambda\,\frac{\sum_i \hat\beta_i \odot \tau_i}{\sum_i \hat\beta_i} $$

    Here norm maps a model's smallest value to 0 and its largest to 1, over all tensors together. The order statistics
    that takes are counted, exactly and in bounded memory, in four passes over the models; reading is a fifth.

    Args:
        density: r in the paper, section 4: share of each model's changes that are not dropped.
        scale: lambda in the paper.

    Example:
        >>> from weightsmith import Memory
        >>> base, a, b = (Memory({"w": torch.tensor(x)}) for x in ([0.0, 0.0, 0.0], [2.0, 1.0, 0.1], [2.0, -1.0, 0.2]))
        >>> pcb_merging([a, b], base, density=0.4).read("w")
        tensor([2., 0., 0.])
    """
    names = [name for name in agree([base, *models]) if base.spec(name).computable]
    numel = sum(base.spec(name).numel for name in names)

    def changes(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        for origin, *ws in zip(*(lifted(m, name) for m in (base, *models)), strict=True):
            yield origin, torch.stack([w - origin for w in ws]).float()

    def every(f: Callable[[Tensor], Tensor]) -> Callable[[], Iterator[Tensor]]:
        return lambda: (f(taus) for name in names for _, taus in changes(name))

    edge, cut = int(numel * CLAMPED), min(int(numel * (1 - density)), numel - 1)
    sizes = order_statistics(every(torch.abs), (edge, numel - 1 - edge))
    limits = order_statistics(every(lambda taus: competition(taus, sizes)), (cut, numel - 1))

    def merged(name: str) -> Iterator[Tensor]:
        for origin, taus in changes(name):
            share = normed(competition(taus, sizes), limits)
            clamped = taus.sign() * clamp(taus.abs(), sizes)
            yield origin + scale * (clamped * share).sum(0) / share.sum(0).clamp(min=1e-12)

    about = {"method": "merge.pcb_merging", "with": {"density": density, "scale": scale}}
    return Computed(merged, base, (*models, base), about)


def competition(taus: Tensor, sizes: Tensor) -> Tensor:
    """beta of each model's changes, over exp(n) lest many models overflow; the norm that follows does not see it."""
    within = (len(taus) * (normed(taus.abs(), sizes).square() - 1)).exp()
    return within * (taus * taus.sum(0)).tanh()


def clamp(values: Tensor, limits: Tensor) -> Tensor:
    """Each row within its lower and upper limit."""
    return values.clamp(limits[:, :1], limits[:, 1:])


def normed(values: Tensor, limits: Tensor) -> Tensor:
    """Each row clamped to its limits and mapped to 0..1; zero where the limits coincide."""
    low, high = limits[:, :1], limits[:, 1:]
    return (clamp(values, limits) - low) / torch.where(high > low, high - low, 1)


def order_statistics(pieces: Callable[[], Iterator[Tensor]], ranks: tuple[int, ...]) -> Tensor:
    """The elements of the given ranks, from 0 for the smallest, in each row of a matrix that comes in pieces.

    Two passes count bit patterns: the upper halves, then the lower halves within the bins where the ranks fall.
    """
    counts = sum(np.stack([np.bincount(k >> 16, minlength=1 << 16) for k in keys(piece)]) for piece in pieces())
    below = counts.cumsum(1)
    upper = np.stack([np.searchsorted(row, ranks, side="right") for row in below])
    rest = np.array(ranks) - np.take_along_axis(below - counts, upper, 1)
    lower = sum(
        np.stack([[np.bincount(k[k >> 16 == u] & 0xFFFF, minlength=1 << 16) for u in us]
                  for k, us in zip(keys(piece), upper, strict=True)])
        for piece in pieces()
    )  # fmt: skip
    found = (lower.cumsum(2) <= rest[:, :, None]).sum(2)
    bits = (upper << 16 | found).astype(np.uint32)
    bits = np.where(bits >> 31, bits ^ np.uint32(1 << 31), ~bits)
    return torch.from_numpy(bits.view(np.float32).copy())


def keys(piece: Tensor) -> np.ndarray:
    """Whole numbers in the order of the floats: negative ones have all their bits flipped, others the sign's."""
    bits = piece.numpy().view(np.uint32)
    return np.where(bits >> 31, ~bits, bits ^ np.uint32(1 << 31))
