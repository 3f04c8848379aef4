"""Vanishing Variance Problem in Fully Decentralized Neural-Network Systems (Tian et al., arXiv 2024)."""

import math
from typing import Annotated

import numpy as np
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import equal_inputs_kept, order_free
from weightsmith.core.method import Streamed, op, streamed


@op(paper="arXiv:2404.04616", laws=[equal_inputs_kept("ws"), order_free("ws").given(own=None)])
def variance_corrected_averaging(
    ws: list[Float[Tensor, "*shape"]], *, own: Annotated[float, Interval(ge=0, le=1)] | None = None
) -> Float[Tensor, "*shape"]:
    r"""Average models that share no start, then stretch each tensor to the spread the models had.

    $$ \theta = \sqrt{\frac{v}{\mathrm{Var}(\bar\theta)}}\,(\bar\theta - \mu) + \mu, \quad
       \bar\theta = \tfrac1n \sum_i \theta_i, \quad \mu = \mathrm{mean}(\bar\theta), \quad v = \tfrac1n \sum_i
       \mathrm{Var}(\theta_i) $$

    Leave running variances of batch norms out with `exclude`: stretched, they may turn negative.

    Args:
        own: weight of the first model's variance in v, the others' mean having the rest; all count alike by default.

    Example:
        >>> variance_corrected_averaging([torch.tensor([2.0, -2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 2.0, -2.0])])
        tensor([ 1.4142, -1.4142,  1.4142, -1.4142])
    """
    return stretch(ws, own=own, state=moments(tally(ws), ws[0].numel(), None, own=own))


def tally(ws: list[Tensor], **_: object) -> np.ndarray:
    """Sum and sum of squares of the average and of each model."""
    wide = [w.reshape(-1).double() for w in ws]
    return np.array([[float(w.sum()), float(w @ w)] for w in (sum(wide) / len(wide), *wide)])


def moments(counts: np.ndarray, numel: int, state: None, *, own: float | None, **_: object) -> tuple[float, float]:
    """The average's mean, and how much to stretch about it; an average without spread is left as it is."""
    means = counts[:, 0] / numel
    merged, *inputs = np.maximum(counts[:, 1] / numel - means**2, 0.0)
    first = 1 / len(inputs) if own is None or len(inputs) == 1 else own
    wanted = first * inputs[0] + (1 - first) * (np.mean(inputs[1:]) if len(inputs) > 1 else 0.0)
    noise = 1e-12 * counts[:, 1].max() / numel
    return float(means[0]), math.sqrt(wanted / merged) if merged > noise else 1.0


def stretch(ws: list[Tensor], *, state: tuple[float, float], **_: object) -> Tensor:
    """The average, stretched."""
    mean, factor = state
    return (sum(ws) / len(ws) - mean) * factor + mean


streamed(variance_corrected_averaging, Streamed(stretch, tally=tally, decide=moments, passes=1))
