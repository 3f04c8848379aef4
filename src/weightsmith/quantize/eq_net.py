"""EQ-Net: Elastic Quantization Neural Networks (Xu et al., ICCV 2023)."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Generator, Tensor

from weightsmith.core.laws import levels
from weightsmith.core.parametrization import parametrization
from weightsmith.quantize import _grid


@parametrization(
    paper="arXiv:2308.07650",
    laws=[levels()],
    roles="attention.*|mlp.*|expert.*|linear|conv*|recurrent|ssm.input|ssm.output",
    trains="all",
)
class eq_net:
    r"""Train one set of weights for many numbers of bits, rounding to another number at each step.

    $$ \hat w = s \, \mathrm{clip}(\lfloor w / s \rceil + z, 0, 2^b - 1) - s z, \qquad
       \frac{\partial \hat w}{\partial w} \approx 1 $$

    For the elastic part give `bits` a schedule: `attach(model, eq_net(bits=elastic(rng)))`. The ranges are those of
    the weights, where the paper learns them; its teaching of small settings by larger ones and its search are a
    training loop's, and what keeps the weights' distribution flat is `regularize.weight_distribution`.

    Args:
        bits: of a code: a number, or a schedule.
        per_channel: a scale for each row rather than one for the matrix.
        symmetric: no zero points.

    Example:
        >>> eq_net(bits=2, symmetric=False).decode(torch.tensor([[-1.0, 0.4, 0.6, 2.0]]))
        tensor([[-1.,  0.,  1.,  2.]])
    """

    bits: Annotated[int, Interval(ge=2, le=8)] = 4
    per_channel: bool = True
    symmetric: bool = True

    def encode(self, w: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Nothing is stored beside the weight."""
        return {}

    def decode(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The rounded weight; its gradient is the latent weight's."""
        made = self.integers(w)
        return _grid.decoded(made["codes"], made["scale"], made["zero"]) + (w - w.detach())

    def integers(self, w: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Codes, scales and zero points: exactly the decoded weight."""
        rows = w.detach() if self.per_channel else w.detach().reshape(1, -1)
        low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
        top = 2**self.bits - 1
        if self.symmetric:
            scale = (torch.maximum(high, -low) / (top // 2)).clamp_min(_grid.SMALLEST)
            zero = torch.full_like(scale, top // 2 + 1)
        else:
            scale = ((high - low) / top).clamp_min(_grid.SMALLEST)
            zero = (low / -scale).round_()
        codes = (w.detach() / scale).round_().add_(zero).clamp_(1 if self.symmetric else 0, top)
        return {"codes": codes.to(torch.uint8), "scale": scale, "zero": zero.to(torch.uint8)}


def elastic(rng: Generator, bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8)) -> Callable[[float], int]:
    """A schedule for `bits`: one of these drawn anew for each weight at each step."""
    return lambda done: bits[int(torch.randint(len(bits), (), generator=rng))]
