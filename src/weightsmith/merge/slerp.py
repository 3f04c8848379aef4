"""Animating rotation with quaternion curves (Shoemake, SIGGRAPH 1985)."""

import math
from typing import Annotated

import numpy as np
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.errors import MethodError
from weightsmith.core.laws import equal_inputs_kept
from weightsmith.core.method import Streamed, op, streamed

PARALLEL = 0.9995
"""Cosine from which two tensors count as parallel and are mixed linearly."""


@op(paper="doi:10.1145/325334.325242", laws=[equal_inputs_kept("ws")])
def slerp(
    ws: list[Float[Tensor, "*shape"]], *, t: Annotated[float, Interval(ge=0, le=1)] = 0.5
) -> Float[Tensor, "*shape"]:
    r"""Go from one model to another along the arc between them, so that the norm does not shrink.

    $$ \theta = \frac{\sin((1-t)\,\omega)}{\sin\omega}\,\theta_1 + \frac{\sin(t\,\omega)}{\sin\omega}\,\theta_2, \quad
       \cos\omega = \frac{\langle\theta_1, \theta_2\rangle}{\lVert\theta_1\rVert\,\lVert\theta_2\rVert} $$

    The angle is that of the whole tensor; nearly parallel tensors are mixed linearly.

    Args:
        t: place between the first model, 0, and the second, 1.

    Example:
        >>> slerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], t=0.5)
        tensor([0.7071, 0.7071])
    """
    return mix(ws, t=t, state=cosine(products(ws), 0, None))


def products(ws: list[Tensor], **_: object) -> np.ndarray:
    """Inner products of the two tensors: with each other, and each with itself."""
    if len(ws) != 2:
        raise MethodError(f"slerp takes two models, {len(ws)} given", hint="merge more of them with `linear`")
    a, b = (w.reshape(-1).double() for w in ws)
    return np.array([float(a @ b), float(a @ a), float(b @ b)])


def cosine(counts: np.ndarray, numel: int, state: None, **_: object) -> float:
    """Cosine of the angle between the two tensors; 1 if one of them is zero."""
    dot, aa, bb = counts
    return float(dot / math.sqrt(aa * bb)) if aa * bb > 0 else 1.0


def mix(ws: list[Tensor], *, t: float, state: float) -> Tensor:
    """The point on the arc, given the cosine."""
    if abs(state) > PARALLEL:
        return (1 - t) * ws[0] + t * ws[1]
    angle = math.acos(state)
    return (math.sin((1 - t) * angle) * ws[0] + math.sin(t * angle) * ws[1]) / math.sin(angle)


streamed(slerp, Streamed(mix, tally=products, decide=cosine, passes=1))
