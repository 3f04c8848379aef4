"""EQ-Net: Elastic Quantization Neural Networks (Xu et al., ICCV 2023)."""

from typing import Annotated

from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import permutation_free, scale_free
from weightsmith.core.method import measure


@measure(paper="arXiv:2308.07650", laws=[scale_free(), permutation_free()])
def weight_distribution(
    w: Float[Tensor, "*shape"],
    *,
    kurtosis: Annotated[float, Interval(gt=1, le=3)] = 1.8,
    kurtosis_strength: Annotated[float, Interval(ge=0)] = 0.015,
    skew_strength: Annotated[float, Interval(ge=0)] = 1.0,
) -> Float[Tensor, ""]:
    r"""How far a weight is from spread out evenly and evenly to both sides, as weights easy to round are.

    $$ \alpha \, (\mathrm{kurt}(w) - 1.8)^2 + \beta \, \mathrm{skew}(w)^2 $$

    As a penalty: `Penalty(weight_distribution, model, where="*.weight", strength=1 / layers)`.

    Args:
        kurtosis: what the fourth moment is drawn to, section 3.3; 1.8 is that of a uniform distribution, 3 of a normal
            one.
        kurtosis_strength: factor on the kurtosis.
        skew_strength: factor on the skewness.

    Example:
        >>> weight_distribution(torch.linspace(-1, 1, 1001)).item() < 1e-6
        True
    """
    centred = w - w.mean()
    std = centred.square().mean().clamp_min(1e-30).sqrt()
    standard = centred / std
    off = standard.pow(4).mean() - kurtosis
    return kurtosis_strength * off.square() + skew_strength * standard.pow(3).mean().square()
