"""Arcee's MergeKit: A Toolkit for Merging Large Language Models (Goddard et al., EMNLP 2024 industry track)."""

from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import elementwise, identity_at
from weightsmith.core.method import op


@op(paper="arXiv:2403.13257", laws=[elementwise(), identity_at("w", scale=1.0)])
def passthrough(w: Float[Tensor, "*shape"], *, scale: float = 1.0) -> Float[Tensor, "*shape"]:
    r"""Take the tensor as it is, or a multiple of it: what stacked models are made of.

    $$ \theta = \lambda\,\theta_1 $$

    Args:
        scale: lambda; 0 on the output projections of a block turns the block off.

    Example:
        >>> passthrough(torch.tensor([2.0, 4.0]), scale=0.5)
        tensor([1., 2.])
    """
    return w * scale
