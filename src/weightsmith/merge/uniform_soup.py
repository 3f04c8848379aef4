"""Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time
(Wortsman et al., ICML 2022).

It carries two more papers that are this average: "Fusing finetuned models for better pretraining" (Choshen et al.,
arXiv 2022), where it is the next start and heads are left out, `exclude="head"`; and, as its
last step, "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model" (Zhao et al.,
arXiv 2025).
"""

from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import between, elementwise, equal_inputs_kept, order_free
from weightsmith.core.method import op


@op(paper="arXiv:2203.05482", laws=[elementwise(), order_free("ws"), equal_inputs_kept("ws"), between("ws")])
def uniform_soup(ws: list[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    r"""Average all models.

    $$ \theta = \tfrac{1}{n} \sum_i \theta_i $$

    Section 2, "uniform soup". It helps when the models were fine-tuned from one start and lie in one basin. Averaged
    over unlike tasks and without their heads, it is a better start for the next (arXiv:2204.03044).

    Example:
        >>> uniform_soup([torch.tensor([1.0]), torch.tensor([3.0])])
        tensor([2.])
    """
    return sum(ws[1:], ws[0]) / len(ws)
