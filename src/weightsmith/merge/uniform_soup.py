"""Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time
(Wortsman et al., ICML 2022).
"""

from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import between, elementwise, equal_inputs_kept, order_free
from weightsmith.core.method import op


@op(paper="arXiv:2203.05482", laws=[elementwise(), order_free("ws"), equal_inputs_kept("ws"), between("ws")])
def uniform_soup(ws: list[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    r"""Average all models.

    $$ \theta = \tfrac{1}{n} \sum_i \theta_i $$

    Section 2, "uniform soup". It helps when the models were fine-tuned from one start and lie in one basin.

    Example:
        >>> uniform_soup([torch.tensor([1.0]), torch.tensor([3.0])])
        tensor([2.])
    """
    return sum(ws[1:], ws[0]) / len(ws)
