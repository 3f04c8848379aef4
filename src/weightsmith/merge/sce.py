"""FuseChat: Knowledge Fusion of Chat Models (Wan et al., 2024)."""

from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import equal_inputs_kept, order_free
from weightsmith.core.method import Streamed, op, streamed
from weightsmith.merge.ties import elect, keep, narrow
from weightsmith.merge.ties import tally as bins


@op(paper="arXiv:2408.07990", laws=[order_free("ws"), equal_inputs_kept("ws").given(density=1.0)])
def sce(
    ws: list[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"],
    *,
    density: Annotated[float, Interval(gt=0, le=1)] = 0.1,
) -> Float[Tensor, "*shape"]:
    r"""Select where the models differ most, weigh them by their changes, erase the minority's signs.

    $$ \theta = \theta_0 + \frac{\sum_i \eta_i \, v_i \odot \delta_i}{\sum_i \eta_i \, v_i}, \quad
       \delta_i = [\mathrm{Var}_j(\theta_j) \ge \tau] \odot (\theta_i - \theta_0), \quad
       \eta_i = \frac{\lVert\delta_i\rVert^2}{\sum_j \lVert\delta_j\rVert^2}, \quad
       v_i = \Big[\delta_i \odot \sum_j \delta_j > 0\Big] $$

    mergekit 0.1.5 weighs all models alike where their mean squares add up to less than 1e-6, as they do in most
    fine-tunings, so that the weights have no effect there.

    Args:
        density: tau in the paper: share kept of the elements in which the models differ at all; 1 keeps every element.

    Example:
        >>> sce([torch.tensor([3.0, 1.0]), torch.tensor([1.0, -2.0])], torch.zeros(2), density=1.0)
        tensor([ 2.3333, -2.0000])
    """
    spread = variance([w - base for w in ws])
    place = keep(density, int(spread.count_nonzero()))
    threshold = 0.0 if density == 1 else float(spread.reshape(-1).kthvalue(spread.numel() - place + 1).values)
    squares = tally(ws, base, density=density, state=threshold)
    return fuse(ws, base, state=decide(squares, base.numel(), threshold, density=density))


def variance(deltas: list[Tensor]) -> Tensor:
    """Variance of each element's change over the models; what is too small for a normal float counts as zero."""
    mean = sum(deltas) / len(deltas)
    spread = sum((d - mean).square_() for d in deltas) / len(deltas)
    return torch.nn.functional.threshold(spread, torch.finfo(torch.float32).tiny, 0.0)


def selected(ws: list[Tensor], base: Tensor, threshold: float) -> list[Tensor]:
    """The changes where the models differ enough, all others zero."""
    deltas = [w - base for w in ws]
    if threshold == 0:
        return deltas
    chosen = variance(deltas) >= threshold
    return [d * chosen for d in deltas]


def tally(ws: list[Tensor], base: Tensor, *, density: float, state: Any = None) -> np.ndarray:
    """Counts of the variances by their bits, in two passes; then, given the threshold, sums of squared changes."""
    if isinstance(state, float):
        return np.array([float(d.square().sum()) for d in selected(ws, base, state)])
    if density == 1:
        return np.zeros((1, 1))
    return bins([variance([w - base for w in ws])], base.new_zeros(()), state=state)


def decide(counts: np.ndarray, numel: int, state: Any, *, density: float) -> Any:
    """The bin that holds the threshold; then the threshold; at last the threshold and the models' weights."""
    if isinstance(state, float):
        return state, counts / counts.sum() if counts.sum() > 0 else np.ones(len(counts))
    if density == 1:
        return 0.0 if state else [(0, 0)]
    found = narrow(counts, [keep(density, numel - int(counts[0, 0]))], state)
    return float(found[0]) if state else found


def fuse(ws: list[Tensor], base: Tensor, *, state: tuple[float, np.ndarray], **_: object) -> Tensor:
    """The merged tensor, given the threshold and the weights."""
    threshold, weights = state
    deltas = selected(ws, base, threshold)
    sign = torch.sign(sum(deltas))
    return base + elect([d * (d * sign > 0) for d in deltas], weights.tolist())


streamed(sce, Streamed(fuse, tally=tally, decide=decide, passes=3))
