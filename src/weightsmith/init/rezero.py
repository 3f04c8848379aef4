"""ReZero is All You Need: Fast Convergence at Large Depth (Bachlechner et al., UAI 2021)."""

import torch
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import starts_at
from weightsmith.core.parametrization import parametrization


@parametrization(paper="arXiv:2003.04887", laws=[starts_at("zero")], roles="attention.out|mlp.down", trains="all")
class rezero:
    r"""Gate a residual branch with a number that starts at zero, so that any depth starts as the identity.

    $$ x_{i+1} = x_i + \alpha_i F_i(x_i) \quad\text{as}\quad W_i = \alpha_i \tilde W_i, \qquad \alpha_i = 0 $$

    W is the weight of the branch's last linear layer, which the number scales; its bias, if any, should be zero. The
    weight trains too, and `bake` folds the number into it. The paper leaves the normalisation layers out.

    Example:
        >>> gate = rezero()
        >>> gate.decode(torch.ones(2), **gate.encode(torch.ones(2)))
        tensor([0., 0.])
    """

    def encode(self, w: Float[Tensor, "*shape"]) -> dict[str, Tensor]:
        """The gate, at zero."""
        return {"alpha": torch.zeros((), dtype=w.dtype, device=w.device)}

    def decode(self, w: Float[Tensor, "*shape"], alpha: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
        """The weight times the gate."""
        return alpha * w
