"""Maintaining Plasticity in Continual Learning via Regenerative Regularization (Kumar et al., CoLLAs 2024)."""

from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import zero_when_equal
from weightsmith.core.method import measure


@measure(paper="arXiv:2308.11958", laws=[zero_when_equal()])
def l2_to_init(w: Float[Tensor, "*shape"], base: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    r"""Squared distance to the initial weights, a penalty that keeps a network able to learn new tasks.

    $$ \lVert \theta - \theta_0 \rVert_2^2 $$

    For a whole model: `Penalty(l2_to_init, model, strength=1e-3)` in `weightsmith.core.penalty`.

    Example:
        >>> l2_to_init(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
        tensor(5.)
    """
    return (w - base).square().sum()
