"""Relative representations enable zero-shot latent space communication (Moschella et al., ICLR 2023)."""

from jaxtyping import Float
from torch import Tensor, nn

from weightsmith.core.laws import scale_free
from weightsmith.core.method import measure


@measure(paper="arXiv:2209.15430", laws=[scale_free()])
def relative_representations(
    w: Float[Tensor, "samples dim"], reference: Float[Tensor, "anchors dim"]
) -> Float[Tensor, "samples anchors"]:
    r"""Describe each embedding by its cosines with a few anchors, which is the same in turned spaces.

    $$ r(x) = \big(\cos(e_x, e_{a_1}), \dots, \cos(e_x, e_{a_k})\big) $$

    Anchors are the same samples for every encoder, each embedded by that encoder. A head trained on one encoder's
    relative representations reads another's; around 300 random anchors are usual.

    Example:
        >>> relative_representations(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([[0.6000, 0.8000]])
    """
    return nn.functional.normalize(w, dim=-1) @ nn.functional.normalize(reference, dim=-1).T
