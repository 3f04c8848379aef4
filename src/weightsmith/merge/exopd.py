"""Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation (Yang et al., arXiv 2026)."""

from typing import Annotated

from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import elementwise, identity_at
from weightsmith.core.method import op


@op(paper="arXiv:2602.12125", laws=[elementwise(), identity_at("w", scale=1.0)])
def exopd(
    w: Float[Tensor, "*shape"],
    base: Float[Tensor, "*shape"],
    *,
    scale: Annotated[float, Interval(ge=1, le=3)] = 1.25,
) -> Float[Tensor, "*shape"]:
    r"""Go past the teacher along the line that leads to it from the reference model.

    $$ \theta = \theta_{ref} + \lambda\,(\theta_T - \theta_{ref}), \quad \lambda > 1 $$

    The paper extrapolates a student's target: applied to logits rather than weights, this function gives it, up to a
    constant: $\pi^* \propto \pi_{ref}^{1 - \lambda}\,\pi_T^{\lambda}$. In weights it is the cheap relative without a
    student, ExPO (Zheng et al., arXiv:2404.16792), that the paper compares itself with.

    Args:
        scale: lambda in the paper: how far to go, the teacher being at 1.

    Example:
        >>> exopd(torch.tensor([3.0]), torch.tensor([1.0]), scale=1.25)
        tensor([3.5000])
    """
    return base + scale * (w - base)
