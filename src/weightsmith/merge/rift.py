"""Improving Generalization of Adversarial Training via Robust Critical Fine-Tuning (Zhu et al., ICCV 2023)."""

from collections.abc import Callable
from typing import Annotated

from annotated_types import Interval

from weightsmith.core.apply import apply
from weightsmith.core.errors import MethodError
from weightsmith.core.method import op
from weightsmith.core.weights import Weights
from weightsmith.merge.wise_ft import wise_ft


@op(paper="arXiv:2308.02533")
def rift(
    models: list[Weights],
    evaluate: Callable[[Weights], float],
    *,
    tolerance: Annotated[float, Interval(ge=0)] = 0.001,
    steps: Annotated[int, Interval(ge=1)] = 20,
) -> Weights:
    r"""Go as far from a robust model towards its fine-tuned copy as its robustness is kept.

    $$ \theta = \theta_{AT} + \alpha^* (\theta_{FT} - \theta_{AT}), \quad \alpha^* = \max\,\{\alpha :
       R(\theta_\alpha) \ge R(\theta_{AT}) - \epsilon\} $$

    The first model is the robust one, the second has one module fine-tuned on clean data: the one that matters least
    for robustness (section 3.2). `evaluate` is the robust accuracy R.

    Args:
        tolerance: epsilon, section 3.3: the loss of robustness accepted; 0.1 points in the paper.
        steps: alpha is a multiple of one by this number.

    Raises:
        MethodError: not two models.

    Example:
        >>> from weightsmith import Memory
        >>> robust, tuned = Memory({"w": torch.tensor([0.0])}), Memory({"w": torch.tensor([1.0])})
        >>> rift([robust, tuned], lambda m: -abs(float(m.read("w"))), tolerance=0.31, steps=10).read("w")
        tensor([0.3000])
    """
    if len(models) != 2:
        raise MethodError(f"rift takes a robust model and its fine-tuned copy, {len(models)} models given")
    robust, tuned = models
    floor = evaluate(robust) - tolerance
    for step in range(steps, 0, -1):
        candidate = apply(wise_ft, tuned, base=robust, scale=step / steps)
        if evaluate(candidate) >= floor:
            return candidate
    return robust
