"""Momentum-based Weight Interpolation of Strong Zero-Shot Models for Continual Learning
(Stojanovski et al., NeurIPS 2022 workshop on interpolation regularizers and beyond).
"""

from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor, nn

from weightsmith.core.laws import between, elementwise, equal_inputs_kept
from weightsmith.core.method import op


@op(
    paper="arXiv:2211.03186",
    laws=[elementwise(), equal_inputs_kept("ws"), between("ws")],
)
def momentum_interpolation(
    ws: list[Float[Tensor, "*shape"]], *, decay: Annotated[float, Interval(ge=0, le=1)] = 0.99
) -> Float[Tensor, "*shape"]:
    r"""Follow a sequence of checkpoints slowly, starting from the zero-shot model.

    $$ \theta_{slow} \leftarrow \tau\,\theta_{slow} + (1 - \tau)\,\theta_{fast} $$

    The first model is the slow one, the others are the fast one at successive steps. `follow` does the step on live
    models; with `lab.fit` it is `progress=lambda *_: follow(slow, fast, decay=0.99)`.

    Args:
        decay: tau in the paper; it has to fit the number of steps: 1 / (1 - tau) of them are remembered.

    Example:
        >>> momentum_interpolation([torch.tensor([0.0]), torch.tensor([1.0])], decay=0.75)
        tensor([0.2500])
    """
    slow = ws[0]
    for fast in ws[1:]:
        slow = decay * slow + (1 - decay) * fast
    return slow


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, *, decay: float = 0.99) -> None:
    """Move a live slow copy one step towards the fast model; counters and other integers are copied."""
    news = fast.state_dict()
    for name, old in slow.state_dict().items():
        mixed = momentum_interpolation([old, news[name]], decay=decay) if old.is_floating_point() else news[name]
        old.copy_(mixed)
