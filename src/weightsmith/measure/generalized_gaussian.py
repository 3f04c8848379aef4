"""It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors for Optimized LLMs (Wu et al., arXiv 2025)."""  # noqa: E501

import math

from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import permutation_free
from weightsmith.core.method import measure
from weightsmith.measure.weight_statistics import weight_statistics


@measure(paper="arXiv:2506.00486", laws=[permutation_free()])
def generalized_gaussian(w: Float[Tensor, "*shape"]) -> dict[str, float]:
    r"""The generalised Gaussian law that a weight follows, and how many bits a weight it makes shorter.

    $$ p(w) = \frac{\nu}{2 \alpha \Gamma(1/\nu)} e^{-(|w - \mu| / \alpha)^\nu}, \qquad
       \frac{\Gamma(1/\nu) \Gamma(3/\nu)}{\Gamma(2/\nu)^2} = \frac{\operatorname{E} (w - \mu)^2}
       {(\operatorname{E} |w - \mu|)^2}, \quad \alpha = \sigma \sqrt{\Gamma(1/\nu) / \Gamma(3/\nu)} $$

    Returns:
        `shape` (nu: 2 for a Gaussian, 1 for a Laplacian), `scale` (alpha), `mean`; `entropy`, of the law fitted, in
        bits; `gain`, bits a weight by which a code made for this law is shorter than one made for a Gaussian, 0 or
        more up to the fit. For a constant weight all but the mean are 0.

    Example:
        >>> quantiles = torch.linspace(0, 1, 100_001)[1:-1]
        >>> reading = generalized_gaussian(torch.distributions.Laplace(0.0, 1.0).icdf(quantiles))
        >>> round(reading["shape"], 1), round(reading["scale"], 1), round(reading["gain"], 1)
        (1.0, 1.0, 0.1)
    """
    seen = weight_statistics(w)
    nu, std = seen["shape"], seen["std"]
    if not std:
        return {"shape": 0.0, "scale": 0.0, "mean": seen["mean"], "entropy": 0.0, "gain": 0.0}
    one, three = math.lgamma(1 / nu), math.lgamma(3 / nu)
    scale = math.exp(math.log(std) + (one - three) / 2)
    size = (w.detach() - seen["mean"]).abs()
    constant = math.log(2 * scale / nu) + one
    length = float((size / scale).pow(nu).mean(dtype=size.dtype)) + constant
    gaussian = math.log(std) + 0.5 * math.log(2 * math.pi * math.e)
    return {
        "shape": nu,
        "scale": scale,
        "mean": seen["mean"],
        "entropy": (1 / nu + constant) / math.log(2),
        "gain": (gaussian - length) / math.log(2),
    }
