"""Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging
(Tang et al., NeurIPS 2025).
"""

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from weightsmith.core.laws import mean_length
from weightsmith.core.method import op
from weightsmith.core.weights import Averaged, Computed, Weights, agree, lifted, matches

PROJECTED = "attention.*|mlp.*|linear|conv*|expert*|head"
"""Roles of the matrices whose changes are projected; those of others, embeddings among them, are added up."""


@op(paper="arXiv:2501.09522", laws=[mean_length("models").given(merged=1)])
def opcm(
    models: list[Weights],
    base: Weights,
    *,
    protected: Annotated[float, Interval(ge=0, le=1)] = 0.5,
    merged: Annotated[int, Interval(ge=1)] = 1,
    divisor: Annotated[float, Interval(gt=0)] = 1.0,
) -> Weights:
    r"""Merge models one after the other, each newcomer's change kept out of what the earlier ones filled.

    $$ R_k = R_{k-1} + \tau_k - \Pi_\alpha(\tau_k; R_{k-1}), \quad
       \theta = \theta_0 + \frac{\tfrac1n \sum_k \lVert\tau_k\rVert}{\lVert R_n\rVert}\,R_n, \quad
       \tau_k = \theta_k - \theta_0 $$

    In the singular vectors of R, the projection Pi holds the newcomer's leading block and its whole diagonal. The
    paper rescales after each model; as scaling leaves singular vectors alone, once at the end is the same. Memory is
    that of one matrix and its decomposition however many models there are: every matrix is decomposed when its length
    is measured and again when it is read. Running statistics of batch norms are averaged.

    Args:
        protected: alpha in the paper, section 4: share of the sum of R's singular values in the block kept clear.
        merged: how many models the first one is itself the merge of; with `divisor`, the whole state of a stream.
        divisor: lambda in the paper: what that merge was divided by; the result's `divisor`, for the next call.

    Example:
        >>> from weightsmith import Memory
        >>> base = Memory({"weight": torch.zeros(2, 2)})
        >>> a, b = Memory({"weight": torch.diag(torch.tensor([3.0, 1.0]))}), Memory({"weight": torch.ones(2, 2)})
        >>> opcm([a, b], base).read("weight")
        tensor([[2.2353, 0.7451],
                [0.7451, 0.7451]])
    """
    return Sequential(models, base, protected, merged, divisor)


class Sequential(Computed):
    """The merge, computed when read.

    Args:
        models: in the order of their arrival.
        base: the model they were trained from.
        protected: as for `opcm`.
        merged: as for `opcm`.
        divisor: as for `opcm`.
    """

    def __init__(self, models: list[Weights], base: Weights, protected: float, merged: int, divisor: float):
        agree([base, *models])
        hyper = {"protected": protected, "merged": merged, "divisor": divisor}
        super().__init__(self._pieces, base, (*models, base), {"method": "merge.opcm", "with": hyper})
        self.models, self.base, self.protected, self._start = models, base, protected, divisor
        self._averaged = Averaged(models)
        squares, total = [0.0] * len(models), 0.0
        for name in filter(lambda name: base.spec(name).computable and name not in self._averaged, base):
            change, lengths = self._fold(name)
            total += square(change)
            squares = [a + b for a, b in zip(squares, lengths, strict=True)]
        lengths = [math.sqrt(s) for s in squares]
        self.merged = merged + len(models) - 1
        self.length = (merged * lengths[0] + sum(lengths[1:])) / self.merged
        self.divisor = math.sqrt(total) / self.length if self.length and total else 1.0

    def _fold(self, name: str) -> tuple[Tensor, list[float]]:
        """R of one tensor, and the squared length of each model's change of it."""
        origin, total, squares = whole(self.base, name), None, []
        alone = origin.ndim < 2 or not matches(self.base.spec(name), PROJECTED)
        for model in self.models:
            change = whole(model, name).sub_(origin)
            squares.append(square(change))
            if total is None:
                total = change.mul_(self._start)
            else:
                total += change if alone else cleared(change, total, self.protected)
        return total, squares

    def _pieces(self, name: str) -> Iterator[Tensor]:
        if name in self._averaged:
            yield whole(self._averaged, name).reshape(-1)
        else:
            yield whole(self.base, name).add_(self._fold(name)[0], alpha=1 / self.divisor).reshape(-1)


def cleared(change: Tensor, total: Tensor, protected: float) -> Tensor:
    """The change without what lies in the leading singular subspace of the total, or along its singular directions.

    The thin decomposition is enough: what the full one would rotate to and fro comes out as it went in. Kernels are
    matrices with one row for each output; a total of zero fills nothing.
    """
    shape, change, total = change.shape, change.flatten(1), total.flatten(1)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    held = int((s > s[0] * torch.finfo(s.dtype).eps * max(total.shape)).sum())
    u, s, vh = u[:, :held], s[:held], vh[:held]
    leading = int((s.cumsum(0) / s.sum() <= protected).sum())
    diagonal = ((u.T @ change) * vh).sum(1)
    block = u[:, :leading].T @ change @ vh[:leading].T
    block.diagonal().sub_(diagonal[:leading])
    return (change - (u * diagonal) @ vh - u[:, :leading] @ block @ vh[:leading]).reshape(shape)


def whole(weights: Weights, name: str) -> Tensor:
    """A tensor in float32, a copy."""
    return torch.cat(list(lifted(weights, name))).reshape(weights.spec(name).shape)


def square(tensor: Tensor) -> float:
    """Squared length."""
    return float(tensor.double().square().sum())
