"""Knowledge Composition using Task Vectors with Learned Anisotropic Scaling (Zhang et al., NeurIPS 2024)."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from weightsmith.core.apply import apply
from weightsmith.core.laws import identity_at, order_free
from weightsmith.core.method import op
from weightsmith.core.objective import backward
from weightsmith.core.weights import Weights, agree
from weightsmith.merge.linear import linear


@op(paper="arXiv:2407.02880", laws=[identity_at("base", steps=0), order_free("models")])
def atlas(
    models: list[Weights],
    base: Weights,
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    steps: Annotated[int, Interval(ge=0)] = 100,
    learning_rate: Annotated[float, Interval(gt=0)] = 0.1,
    strength: Annotated[float, Interval(ge=0)] = 0.1,
    blockwise: bool = True,
) -> Weights:
    r"""Learn how much of each model's change to take, tensor by tensor, on a few samples.

    $$ \theta^{(j)} = \theta_0^{(j)} + \sum_i \lambda_i^{(j)} \big(\theta_i^{(j)} - \theta_0^{(j)}\big),
       \quad \lambda = \arg\min \mathcal{L}(\theta) $$

    The coefficients start at zero; AdamW follows half a cosine down, with gradients clipped to norm one. The loss may
    be supervised or, such as entropy, not. Models are read again at each step, one tensor at a time. The result's
    lineage holds the coefficients.

    Args:
        steps: steps of AdamW, each with one call of the loss.
        learning_rate: at the first step; it falls to zero.
        strength: weight decay, which pulls the coefficients to zero.
        blockwise: one coefficient for each tensor of each model; otherwise one for each model.

    Example:
        >>> from weightsmith import Memory
        >>> base, *models = (Memory({"w": torch.tensor([x, y])}) for x, y in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
        >>> near = lambda tensors: (tensors["w"] - torch.tensor([0.5, -0.5])).square().sum()
        >>> atlas(models, base, near, strength=0.0).read("w").round(decimals=2)
        tensor([ 0.5000, -0.5000])
    """
    names = [name for name in agree([base, *models]) if base.spec(name).computable]
    rest = {name: base.read(name) for name in base if not base.spec(name).computable}
    coefficients = torch.zeros(len(models), len(names) if blockwise else 1, requires_grad=True)
    optimizer = torch.optim.AdamW([coefficients], lr=learning_rate, weight_decay=strength)

    def merged(name: str, column: int) -> Tensor:
        origin = base.read(name).detach().float()
        changes = (model.read(name).detach().float() - origin for model in models)
        return origin + sum(scale * change for scale, change in zip(coefficients[:, column], changes, strict=True))

    made = {name: partial(merged, name, k if blockwise else 0) for k, name in enumerate(names)}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        backward(loss, made, rest)
        torch.nn.utils.clip_grad_norm_([coefficients], 1.0)
        optimizer.step()
    found = coefficients.detach().expand(-1, len(names)).T.tolist()
    weight = {name: [1 - math.fsum(column), *column] for name, column in zip(names, found, strict=True)}
    return apply(linear, [base, *models], weight=weight, normalize=False)
