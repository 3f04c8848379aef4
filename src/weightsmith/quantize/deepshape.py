"""It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors for Optimized LLMs (Wu et al., arXiv 2025)."""  # noqa: E501

from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.errors import InputError
from weightsmith.core.laws import Case, Law
from weightsmith.core.method import op
from weightsmith.measure.generalized_gaussian import generalized_gaussian


def order_kept() -> Law:
    """What was the larger of two weights does not become the smaller one."""

    def check(case: Case) -> None:
        w, made = case.inputs["w"].flatten(), case.run().flatten()
        assert bool((made[w.argsort()].diff() >= 0).all()), "two weights change places"
        assert int((made[w.argsort()].diff() > 0).sum()) > 0, "the weights are all alike"

    return Law("order_kept", "keeps the order of the weights", check)


@op(paper="arXiv:2506.00486", laws=[order_kept()])
def deepshape(
    w: Float[Tensor, "*shape"],
    *,
    shape: Annotated[float, Interval(gt=0, le=2)] = 0.8,
    scale: Annotated[float, Interval(gt=0, le=2)] = 0.6,
    step: Annotated[float, Interval(gt=0, le=1)] = 2.0**-13,
) -> Float[Tensor, "*shape"]:
    r"""Reshape the weights to a more peaked distribution that takes fewer bits, keeping their order.

    $$ \hat w_{(k)} = \Delta \Big\lfloor \frac{1}{\Delta} F^{-1}\Big(\frac{k - 1/2}{n};\ \mu,\ c\,\alpha,\ d\,\nu\Big)
       \Big\rceil $$

    F is the generalised Gaussian law, $\alpha$ and $\nu$ those fitted to the weights. The network needs a short
    training afterwards. The paper cuts the tails off where a level has fewer than 1,000 weights; here quantiles do.

    Args:
        shape: d: factor on nu, which decides how peaked the law is.
        scale: c: factor on alpha, its width.
        step: Delta: the result lies on whole multiples of it; weights of one multiple stay together.

    Example:
        >>> deepshape(torch.linspace(-1, 1, 5), step=0.125)
        tensor([-0.6250, -0.2500,  0.0000,  0.2500,  0.6250])
    """
    fit = generalized_gaussian(w)
    if not fit["shape"]:
        return w.clone()
    try:
        from scipy.special import gammaincinv
    except ImportError:
        raise InputError("deepshape takes scipy", hint='pip install "weightsmith[structure]"') from None

    _, place, count = np.unique((w.double() / step).round().cpu().numpy(), return_inverse=True, return_counts=True)
    middle = (count.cumsum() - count / 2) / count.sum()
    nu, alpha = fit["shape"] * shape, fit["scale"] * scale
    size = alpha * gammaincinv(1 / nu, np.abs(2 * middle - 1)) ** (1 / nu)
    made = np.rint((fit["mean"] + np.sign(middle - 0.5) * size) / step) * step
    return torch.from_numpy(made[place.reshape(-1)]).to(w).view(w.shape)
