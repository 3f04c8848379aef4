"""Oscillation-free Quantization for Low-bit Vision Transformers (Liu et al., ICML 2023)."""

from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import levels
from weightsmith.core.parametrization import parametrization
from weightsmith.quantize import _grid


@parametrization(
    paper="arXiv:2302.02210",
    laws=[levels()],
    roles="attention.*|mlp.*|expert.*|linear|conv*|recurrent|ssm.input|ssm.output",
    trains="all",
    except_for={"hyperparameter_matters[boundary]": "it decides which weights get a gradient, not what they are"},
)
class ofq:
    r"""Train with few bits and scales that follow the weights, so that weights do not flip back and forth.

    $$ \hat w = \frac{s}{n} \Big( \big\lfloor n \, \mathrm{clip}(w / s, -1, 1) - \tfrac12 \big\rceil + \tfrac12 \Big),
       \quad s = 2 \, \mathrm{mean}_{\text{row}} |w|, \quad n = 2^{b-1} $$

    The scale is a statistic (StatsQ), not learned, and there is no level at zero. For the confidence-guided annealing
    of the last epochs give `boundary` a schedule, such as `lambda done: 0.5 if done < 0.9 else 0.005`. The paper's
    product of queries and keys, quantised as one matrix, is not here: it would replace two layers by one.

    Args:
        bits: b in the paper.
        boundary: only weights at most so far from where rounding changes, in steps of the grid, get a gradient
            (section 3.3); at 0.5 all of them do.

    Example:
        >>> ofq(bits=2).decode(torch.tensor([[0.1, -0.6, 1.0, -0.3]]))
        tensor([[ 0.2500, -0.7500,  0.7500, -0.2500]])
    """

    bits: Annotated[int, Interval(ge=1, le=8)] = 2
    boundary: Annotated[float, Interval(ge=0, le=0.5)] = 0.5

    def encode(self, w: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Nothing is stored beside the weight."""
        return {}

    def decode(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The quantised weight; its gradient is the latent weight's."""
        half = 2 ** (self.bits - 1)
        made = self.integers(w)
        moving = w - w.detach()
        if self.boundary < 0.5:
            place = self._place(w, made["scale"])
            near = (place - place.floor() - 0.5).abs() <= self.boundary
            moving = moving * (near & (place > -half) & (place < half - 1))
        return _grid.decoded(made["codes"], made["scale"], half - 0.5) + moving

    def integers(self, w: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Codes, of which the middle lies half way between two, and a step a row: exactly the decoded weight."""
        half = 2 ** (self.bits - 1)
        step = (2 * w.detach().abs().mean(1, keepdim=True)).clamp_min(_grid.SMALLEST) / half
        codes = self._place(w, step).round_().clamp_(-half, half - 1).add_(half)
        return {"codes": codes.to(torch.uint8), "scale": step}

    def _place(self, w: Tensor, step: Tensor) -> Tensor:
        """Where a weight lies between the levels, these being at whole numbers."""
        half = 2 ** (self.bits - 1)
        return (w.detach() / (step * half)).clamp(-1, 1) * half - 0.5
