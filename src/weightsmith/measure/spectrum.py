"""Implicit Self-Regularization in Deep Neural Networks: Evidence from Random Matrix Theory and Implications for Learning (Martin and Mahoney, JMLR 2021)."""  # noqa: E501

import math
import sys

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import permutation_free
from weightsmith.core.method import measure

ROWS = 4096
"""Rows lifted to float64 at a time."""


@measure(paper="arXiv:1810.01075", laws=[permutation_free()])
def spectrum(w: Float[Tensor, "out in"], *, eigenvalues: bool = False) -> dict[str, float | Tensor]:
    r"""Eigenvalues of W'W and the power law their tail follows: heavy-tailed layers are well trained.

    $$ \rho(\lambda) \sim \lambda^{-\alpha}, \quad \lambda \ge \lambda_{\min}, \qquad
       \alpha = 1 + n \Big/ \sum_{i=1}^n \ln \frac{\lambda_i}{\lambda_{\min}} $$

    Lambda_min is the eigenvalue for which the Kolmogorov-Smirnov distance of the fit is smallest. Layers with alpha
    between 2 and 6 are well trained in the authors' reading. Logarithms are to base 10. Exact in float64; alpha is not
    comparable between a float checkpoint and one rounded to 4 bits.

    Args:
        eigenvalues: return them too, in ascending order, for pictures.

    Returns:
        `alpha`, its standard error `alpha_error`, `xmin`, distance `ks`, number of eigenvalues in the `tail`,
        `alpha_weighted` (alpha log lambda_max), `log_norm`, `log_spectral_norm`, `stable_rank`, `rank`,
        `effective_rank` (exponential of the entropy), and, against a random matrix of the same variance,
        `mp_edge` (largest eigenvalue of the Marchenko-Pastur law) and the number of `spikes` above it.
        `alpha` and its companions are 0 where fewer than three distinct eigenvalues leave no tail to fit.

    Example:
        >>> reading = spectrum(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        >>> round(reading["stable_rank"], 4), reading["rank"]
        (1.875, 4.0)
    """
    values = np.maximum(np.linalg.eigvalsh(gram(w)), 0)
    total, top = float(values.sum()), float(values[-1])
    positive = values[values > top * max(w.shape) * np.finfo(np.float64).eps]
    share = positive / total if total else positive
    edge = total / w.numel() * (math.sqrt(len(w)) + math.sqrt(w.numel() / len(w))) ** 2
    fit = power_law(positive)
    reading: dict[str, float | Tensor] = {
        **fit,
        "alpha_weighted": fit["alpha"] * _log(top),
        "log_norm": _log(total),
        "log_spectral_norm": _log(top),
        "stable_rank": total / top if top else 0.0,
        "rank": float(len(positive)),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())) if total else 0.0,
        "mp_edge": edge,
        "spikes": float((values > edge).sum()),
    }
    return {**reading, "eigenvalues": torch.from_numpy(values)} if eigenvalues else reading


def gram(w: Tensor) -> np.ndarray:
    """W'W or WW', whichever is smaller, in float64; numpy computes only one triangle of such a product."""
    matrix = w.detach().flatten(1)
    matrix = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    total = np.zeros((matrix.shape[1],) * 2)
    for rows in (part.double().cpu().numpy() for part in matrix.split(ROWS)):
        total += rows.T @ rows
    return total


def power_law(values: np.ndarray) -> dict[str, float]:
    """Maximum-likelihood exponent of the tail of positive, ascending values, for the start of tail that fits best."""
    logs, n = np.log(values), len(values)
    left = np.arange(n, 0, -1.0)
    spans = np.cumsum(logs[::-1])[::-1] - left * logs
    starts = np.flatnonzero(spans[:-1] > 1e-9)
    if len(starts) < 2:
        return dict.fromkeys(("alpha", "alpha_error", "xmin", "ks", "tail"), 0.0)
    with np.errstate(divide="ignore"):
        alphas = 1 + left / spans
    distances = np.full(n, np.inf)
    for block in np.array_split(starts, -(-len(starts) // 64)):
        first = block[0]
        index = np.arange(first, n)
        inside = index >= block[:, None]
        steps = np.where(inside, logs[first:] - logs[block, None], 0)
        gaps = 1 - np.exp((1 - alphas[block, None]) * steps) - (index - block[:, None]) / left[block, None]
        distances[block] = np.max(np.abs(gaps), axis=1, where=inside, initial=0)
    best = int(distances.argmin())
    error = (alphas[best] - 1) / math.sqrt(left[best])
    found = (alphas[best], error, values[best], distances[best], left[best])
    return dict(zip(("alpha", "alpha_error", "xmin", "ks", "tail"), map(float, found), strict=True))


def _log(value: float) -> float:
    return math.log10(max(value, sys.float_info.min))
