"""Robust fine-tuning of zero-shot models (Wortsman et al., CVPR 2022).

It carries "Spurious Feature Diversification Improves Out-of-distribution Generalization" (Lin et al., ICLR 2024) as
well: BANG is this average with a model that was fine-tuned with mixup and label smoothing.
"""

from typing import Annotated

from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import elementwise, identity_at
from weightsmith.core.method import op


@op(
    paper="arXiv:2109.01903",
    laws=[elementwise(), identity_at("base", scale=0.0), identity_at("w", scale=1.0)],
)
def wise_ft(
    w: Float[Tensor, "*shape"],
    base: Float[Tensor, "*shape"],
    *,
    scale: Annotated[float, Interval(ge=0, le=1)] = 0.5,
) -> Float[Tensor, "*shape"]:
    r"""Go part of the way from the pretrained model to the fine-tuned one, to keep what it was robust to.

    $$ \theta = (1 - \alpha)\,\theta_0 + \alpha\,\theta_1 $$

    BANG (arXiv:2309.17230) averages likewise. It fine-tunes with mixup and label smoothing first, so that an
    over-confident fine-tuned model does not outvote the pretrained one.

    Args:
        scale: alpha in the paper, section 3; 0.5 where nothing is known of the shift to come.

    Example:
        >>> wise_ft(torch.tensor([3.0]), torch.tensor([1.0]), scale=0.25)
        tensor([1.5000])
    """
    return (1 - scale) * base + scale * w
