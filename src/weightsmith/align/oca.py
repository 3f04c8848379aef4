"""Backward-Compatible Aligned Representations via an Orthogonal Transformation Layer
(Ricci et al., ECCV 2024 workshops).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightsmith.core.errors import MismatchError
from weightsmith.core.laws import Case, Law, same
from weightsmith.core.method import measure


def distances_kept() -> Law:
    """Distances between samples are those of the new embeddings."""

    def check(case: Case) -> None:
        w = case.inputs["w"]
        result = case.run()
        same(torch.cdist(result, result), torch.cdist(w, w), "distances change")

    return Law("distances_kept", "keeps all distances between the new embeddings", check)


@measure(paper="arXiv:2408.08793", laws=[distances_kept()])
def oca(w: Float[Tensor, "samples new"], reference: Float[Tensor, "samples old"]) -> Float[Tensor, "samples wide"]:
    r"""Turn new embeddings so that their first coordinates can be compared with an old model's.

    $$ z = Q h, \quad Q^\top Q = I, \qquad
       Q = \arg\min_Q \sum_x \big\lVert (Q h_x)_{1..d_\text{old}} - e_x^\text{old} \big\rVert^2
         \;\approx\; \operatorname{polar}\big(\textstyle\sum_x e_x^\text{old} h_x^\top\big) $$

    The paper's orthogonal layer over a feature vector wider than the old one. There it is trained with the network, by
    a classification and a contrastive loss; here it is solved for fixed embeddings of the same samples (Procrustes),
    which is exact for equal widths. Geometry, and so the new model's own retrieval, stays as it is.

    Args:
        w: the new model's embeddings; zeros are added where the old ones are wider.
        reference: the old model's embeddings of the same samples.

    Returns:
        The turned embeddings: the first columns, as many as the old ones have, compare with the old ones.

    Raises:
        MismatchError: not the same number of samples.

    Example:
        >>> old = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> oca(torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]), old)[:, :2].round() + 0.0
        tensor([[1., 0.],
                [0., 1.]])
    """
    if len(w) != len(reference):
        raise MismatchError(f"{len(w)} new embeddings for {len(reference)} old ones", hint="embed the same samples")
    wide = max(w.shape[1], reference.shape[1])
    new, old = (nn.functional.pad(t, (0, wide - t.shape[1])) for t in (w, reference))
    with torch.no_grad():
        product = new.double().T @ old.double()
        u, _, v = torch.linalg.svd(product / product.abs().max().clamp(min=1e-300))
    return new @ (u @ v).to(new)
