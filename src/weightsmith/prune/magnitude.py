"""Learning both Weights and Connections for Efficient Neural Networks (Han et al., NeurIPS 2015)."""

from jaxtyping import Float
from torch import Tensor

from weightsmith.prune._score import score


@score(paper="arXiv:1506.02626", per="tensor")
def magnitude(w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    r"""Set the weights of smallest magnitude to zero.

    $$ S_{ij} = |W_{ij}| $$

    Example:
        >>> magnitude(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), sparsity=0.5)
        tensor([[3., 0.],
                [0., 2.]])
    """
    return w.abs()
