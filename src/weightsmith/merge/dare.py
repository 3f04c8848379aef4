"""Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch
(Yu et al., ICML 2024).
"""

from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Generator, Tensor

from weightsmith.core.laws import identity_at
from weightsmith.core.method import Streamed, op, streamed
from weightsmith.merge.ties import elect


@op(paper="arXiv:2311.03099", laws=[identity_at("base", scale=0.0)])
def dare(
    ws: list[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"],
    rng: Generator,
    *,
    density: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    scale: Annotated[float, Interval(ge=0, le=2)] = 1.0,
    sign_election: bool = False,
) -> Float[Tensor, "*shape"]:
    r"""Drop most of each model's changes at random and enlarge the rest, so that the expected change stays.

    $$ \theta = \theta_0 + \lambda \sum_i \frac{m_i \odot (\theta_i - \theta_0)}{1 - p},
       \quad m_i \sim \mathrm{Bernoulli}(1 - p) $$

    Args:
        density: 1 - p in the paper, section 3.2: share of the changes kept.
        scale: lambda of the merge that follows, section 3.3.
        sign_election: resolve signs as TIES does instead of adding the changes up (`dare_ties` elsewhere).

    Example:
        >>> dare([torch.full((4,), 2.0)], torch.zeros(4), torch.Generator().manual_seed(0), density=0.5)
        tensor([4., 0., 4., 4.])
    """
    deltas = [(torch.rand(w.shape, generator=rng) < density) * (w - base) / density for w in ws]
    return base + scale * (elect(deltas) if sign_election else sum(deltas))


streamed(dare, Streamed(dare))
