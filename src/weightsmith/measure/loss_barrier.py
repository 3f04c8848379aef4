"""The Role of Permutation Invariance in Linear Mode Connectivity of Neural Networks (Entezari et al., ICLR 2022)."""

from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Interval

from weightsmith.core.apply import apply
from weightsmith.core.errors import MethodError
from weightsmith.core.laws import Case, Law
from weightsmith.core.method import measure
from weightsmith.core.weights import Weights
from weightsmith.merge.linear import linear


def none_between_equals() -> Law:
    """There is no barrier between a model and itself."""

    def check(case: Case) -> None:
        first = case.inputs["models"][0]
        assert abs(float(case.but(models=[first, first]).run()["barrier"])) < 1e-6, "a barrier between equal models"

    return Law("none_between_equals", "there is no barrier between a model and itself", check)


@measure(paper="arXiv:2110.06296", laws=[none_between_equals()])
def loss_barrier(
    models: list[Weights],
    evaluate: Callable[[Weights], float],
    *,
    steps: Annotated[int, Interval(ge=3, le=101)] = 11,
) -> dict[str, float | torch.Tensor]:
    r"""How far the score falls on the straight line between two models, below the line between theirs.

    $$ B = \max_t \Big[ (1-t)\, S(\theta_1) + t\, S(\theta_2) - S\big((1-t)\,\theta_1 + t\,\theta_2\big) \Big] $$

    With S the negative loss this is the paper's definition 1.1.

    Args:
        steps: points on the line, both ends included.

    Returns:
        `barrier`, the place `at` which it stands, and the `scores` on the line.

    Raises:
        MethodError: not two models.

    Example:
        >>> from weightsmith import Memory
        >>> ends = [Memory({"w": torch.tensor([x])}) for x in (-1.0, 1.0)]
        >>> loss_barrier(ends, lambda weights: float(weights["w"].abs()))["barrier"]
        1.0
    """
    if len(models) != 2:
        raise MethodError(f"a line has two ends, {len(models)} models given", hint="measure them pair by pair")
    places = torch.linspace(0, 1, steps, dtype=torch.float64)
    line = [apply(linear, models, weight=[1 - t, t]) for t in places.tolist()[1:-1]]
    scores = torch.tensor([evaluate(point) for point in (models[0], *line, models[1])], dtype=torch.float64)
    gaps = (1 - places) * scores[0] + places * scores[-1] - scores
    return {"barrier": float(gaps.max()), "at": float(places[gaps.argmax()]), "scores": scores}
