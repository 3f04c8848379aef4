"""Improving Generalization of Adversarial Training via Robust Critical Fine-Tuning (Zhu et al., ICCV 2023)."""

from copy import deepcopy
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from weightsmith.core.calibrate import default_loss
from weightsmith.core.method import measure


@measure(paper="arXiv:2308.02533")
def module_robust_criticality(
    model: nn.Module,
    batch: Tensor | tuple[Tensor, Tensor],
    *,
    strength: Annotated[float, Interval(gt=0, le=1)] = 0.1,
    steps: Annotated[int, Interval(ge=1)] = 10,
    learning_rate: Annotated[float, Interval(gt=0)] = 1.0,
) -> dict[str, float]:
    r"""How much worse the loss gets at worst when one matrix moves a little: for each matrix of the model.

    $$ \mathrm{MRC}_l = \max_{\lVert\Delta\rVert_F \le \epsilon \lVert W_l\rVert_F} L(W_l + \Delta) - L(W_l) $$

    For robustness the batch holds adversarial examples, which stay as they are. Whichever matrix is least critical is
    the one to fine-tune before `merge.rift`.

    Args:
        strength: epsilon in the paper, section 3.2.
        steps: steps of gradient ascent, each followed by a projection into the ball.
        learning_rate: learning rate of the ascent.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> found = module_robust_criticality(model, (torch.eye(2), torch.arange(2)))
        >>> {name: round(value, 3) for name, value in found.items()}
        {'weight': 0.04}
    """
    copy, found = deepcopy(model).eval(), {}
    with torch.no_grad():
        start = float(default_loss(copy, batch))
    for name, weight in copy.named_parameters():
        if weight.ndim > 1:
            found[name] = worst(copy, batch, weight, strength, steps, learning_rate) - start
    return found


def worst(
    model: nn.Module,
    batch: Tensor | tuple[Tensor, Tensor],
    weight: nn.Parameter,
    strength: float,
    steps: int,
    learning_rate: float,
) -> float:
    """The largest loss that the ascent meets, its start included; the weight is put back."""
    kept = weight.detach().clone()
    radius, highest = strength * float(kept.norm()), float("-inf")
    for step in range(steps + 1):
        with torch.enable_grad():
            loss = default_loss(model, batch)
            (slope,) = torch.autograd.grad(loss, weight)
        highest = max(highest, float(loss.detach()))
        if step < steps:
            with torch.no_grad():
                moved = weight + learning_rate * slope - kept
                weight.copy_(kept + moved * min(1.0, radius / max(float(moved.norm()), 1e-30)))
    with torch.no_grad():
        weight.copy_(kept)
    return highest
