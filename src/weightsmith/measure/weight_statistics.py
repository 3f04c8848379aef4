"""A Theory for Multiresolution Signal Decomposition: The Wavelet Representation (Mallat, TPAMI 1989)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import permutation_free
from weightsmith.core.method import measure
from weightsmith.core.weights import TILE


@measure(paper="doi:10.1109/34.192463", laws=[permutation_free()])
def weight_statistics(w: Float[Tensor, "*shape"]) -> dict[str, float]:
    r"""Moments, extremes, zeros and outliers of a weight, and the generalised Gaussian they fit.

    $$ \text{kurtosis} = \frac{\operatorname{E}(w - \mu)^4}{\sigma^4}, \qquad
       \frac{(\operatorname{E}|w - \mu|)^2}{\sigma^2} = \frac{\Gamma(2/\beta)^2}{\Gamma(1/\beta)\,\Gamma(3/\beta)} $$

    Returns:
        `mean`, `std`, `rms`, `min`, `max`, `max_abs`; `zeros`, the share of exact zeros; `outliers`, the share further
        than six standard deviations from the mean; `kurtosis`, 3 for a Gaussian; `shape`, the beta of the generalised
        Gaussian with the same moments: 2 for a Gaussian, 1 for a Laplacian. For a constant weight both are 0.

    Example:
        >>> reading = weight_statistics(torch.tensor([-1.0, 0.0, 0.0, 1.0]))
        >>> reading["zeros"], reading["max_abs"], round(reading["kurtosis"], 4)
        (0.5, 1.0, 2.0)
    """
    w, n = w.detach(), w.numel()
    tiles = w.reshape(-1).split(TILE)
    mean = sum(float(tile.sum(dtype=torch.float64)) for tile in tiles) / n
    first = second = fourth = 0.0
    for tile in tiles:
        gap = (tile.double() - mean).abs_()
        square = gap.square()
        first, second, fourth = first + float(gap.sum()), second + float(square.sum()), fourth + float(square @ square)
    std = math.sqrt(second / n)
    far = sum(int(((tile - mean).abs() > 6 * std).sum()) for tile in tiles)
    zero = sum(tile.numel() - int(tile.count_nonzero()) for tile in tiles)
    low, high = float(w.min()), float(w.max())
    return {
        "mean": mean,
        "std": std,
        "rms": math.hypot(mean, std),
        "min": low,
        "max": high,
        "max_abs": max(-low, high),
        "zeros": zero / n,
        "outliers": far / n,
        "kurtosis": fourth / n / std**4 if std else 0.0,
        "shape": shape(first**2 / n / second) if std else 0.0,
    }


def shape(ratio: float) -> float:
    """Beta of the generalised Gaussian whose (E|x|)^2 / E x^2 is `ratio`, between 0.05 and 30, by bisection."""
    low, high = math.log(0.05), math.log(30.0)
    for _ in range(50):
        middle = (low + high) / 2
        one, two, three = (math.lgamma(k / math.exp(middle)) for k in (1, 2, 3))
        low, high = (middle, high) if math.exp(2 * two - one - three) < ratio else (low, middle)
    return math.exp(low)
