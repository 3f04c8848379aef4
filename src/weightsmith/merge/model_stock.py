"""Model Stock: All We Need Is Just a Few Fine-Tuned Models (Jang et al., ECCV 2024)."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.errors import MethodError
from weightsmith.core.laws import equal_inputs_kept, order_free
from weightsmith.core.method import Streamed, op, streamed
from weightsmith.merge.multislerp import gram

SINGULAR = 1e-6
"""Denominator up to which the ratio has no finite value."""


@op(paper="arXiv:2403.19522", laws=[equal_inputs_kept("ws"), order_free("ws")])
def model_stock(
    ws: list[Float[Tensor, "*shape"]], base: Float[Tensor, "*shape"], *, filter_wise: bool = False
) -> Float[Tensor, "*shape"]:
    r"""Pull the average towards the base, the further the more the models disagree.

    $$ \theta = t\,\bar\theta + (1 - t)\,\theta_0, \quad t = \frac{N \cos\omega}{1 + (N - 1)\cos\omega} $$

    The angle is that between the changes of two models, its cosine the mean over pairs of models. Where t has no finite
    value, the base is kept. mergekit 0.1.5 computes in the models' dtype, where bfloat16 leaves nothing but rounding
    error of light fine-tunings; it underestimates the cosine of changes shorter than 0.001; and the filters of a
    convolution are to it the rows of its kernels.

    Args:
        filter_wise: one angle for each output of a matrix or convolution instead of one for the tensor.

    Raises:
        MethodError: only one model.

    Example:
        >>> model_stock([torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])], torch.zeros(2))
        tensor([1.3333, 1.3333])
    """
    if not filter_wise or base.ndim < 2:
        return interpolate(ws, base, state=ratio(gram(ws, base)))
    rows = torch.stack([(w - base).flatten(1) for w in ws], dim=1)
    found = torch.from_numpy(ratio((rows @ rows.mT).double().cpu().numpy())).to(base)
    return interpolate(ws, base, state=found.reshape(-1, *[1] * (base.ndim - 1)))


def ratio(counts: np.ndarray, numel: int = 0, state: None = None, **_: object) -> np.ndarray:
    """The share of the average, given the inner products of the changes in the last two dimensions."""
    models = counts.shape[-1]
    if models < 2:
        raise MethodError("model_stock needs two models or more, besides the base", hint="merge with `linear`")
    lengths = np.sqrt(np.diagonal(counts, axis1=-2, axis2=-1))
    scale = lengths[..., :, None] * lengths[..., None, :] * (1 - np.eye(models))
    cosines = np.divide(counts, scale, out=np.zeros_like(counts), where=scale > 0)
    cosine = cosines.sum((-2, -1)) / (models * (models - 1))
    below = 1 + (models - 1) * cosine
    return np.where(np.abs(below) > SINGULAR, models * cosine / np.where(below == 0, 1.0, below), 0.0)


def interpolate(ws: list[Tensor], base: Tensor, *, state: np.ndarray | Tensor, **_: object) -> Tensor:
    """The point between base and average, given the share of the average."""
    share = state if isinstance(state, Tensor) else float(state)
    return base + share * (sum(w - base for w in ws) / len(ws))


streamed(model_stock, Streamed(interpolate, tally=gram, decide=ratio, passes=1, given={"filter_wise": False}))
