"""Maintaining Discrimination and Fairness in Class Incremental Learning (Zhao et al., CVPR 2020)."""

from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.errors import MethodError
from weightsmith.core.laws import Case, Law, idempotent, same
from weightsmith.core.method import op


def equal_norms() -> Law:
    """Rows of old and of new classes have the same mean norm, and the old ones are as they were."""

    def check(case: Case) -> None:
        result, new = case.run(), case.hyper["new"]
        same(result[:-new], case.inputs["w"][:-new], "an old class is changed")
        same(result[-new:].norm(dim=1).mean(), result[:-new].norm(dim=1).mean(), "the mean norms differ")

    return Law("equal_norms", "gives the rows of new classes the mean norm of the old ones", check)


@op(paper="arXiv:1911.07053", laws=[equal_norms(), idempotent()], roles="head*")
def weight_aligning(w: Float[Tensor, "out in"], *, new: Annotated[int, Ge(1)] = 1) -> Float[Tensor, "out in"]:
    r"""Scale a classifier's rows of the classes learned last, so that they no longer outweigh the old ones.

    $$ w_c \leftarrow \gamma \, w_c \ \text{ for new } c, \qquad
       \gamma = \frac{\operatorname{mean}_{\text{old}} \lVert w_c \rVert}
                     {\operatorname{mean}_{\text{new}} \lVert w_c \rVert} $$

    Biases stay as they are. The paper also keeps the classifier's weights non-negative during training, so that norms
    say how large logits are.

    Args:
        new: how many of the last rows are new classes.

    Raises:
        MethodError: no old class is left.

    Example:
        >>> weight_aligning(torch.tensor([[3.0, 4.0], [0.0, 10.0]]))
        tensor([[3., 4.],
                [0., 5.]])
    """
    if new >= len(w):
        raise MethodError(f"new = {new}: the classifier has {len(w)} classes", hint="leave at least one old class")
    norms = w.norm(dim=1)
    old, fresh = norms[:-new].mean(), norms[-new:].mean()
    scale = torch.where((fresh > 0) & (old > 0), old / fresh.clamp(min=torch.finfo(w.dtype).tiny), 1.0)
    return torch.cat([w[:-new], w[-new:] * scale])
