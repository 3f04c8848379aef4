"""A Simple and Effective Pruning Approach for Large Language Models (Sun et al., ICLR 2024)."""

from jaxtyping import Float
from torch import Tensor

from weightsmith.prune._score import score


@score(paper="arXiv:2306.11695", per="row")
def wanda(w: Float[Tensor, "out in"], act_norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    r"""Set to zero, for each output, the weights that matter least given how large their inputs are.

    $$ S_{ij} = |W_{ij}| \, \lVert X_j \rVert_2 $$

    Example:
        >>> wanda(torch.tensor([[3.0, -2.0], [0.5, 2.0]]), torch.tensor([1.0, 10.0]), sparsity=0.5)
        tensor([[ 0., -2.],
                [ 0.,  2.]])
    """
    return w.abs() * act_norm
