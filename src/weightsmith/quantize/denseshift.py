"""DenseShift: Towards Accurate and Efficient Low-Bit Power-of-Two Quantization (Li et al., ICCV 2023)."""

from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import levels
from weightsmith.core.parametrization import parametrization
from weightsmith.core.weights import TILE
from weightsmith.quantize import _grid

RATIOS = tuple(2 ** (-k / 16) for k in range(-8, 40))
"""Shares of a row's range, in sixteenths of a power of two, that its largest level is tried at."""


@parametrization(
    paper="arXiv:2208.09708",
    laws=[levels()],
    roles="attention.*|mlp.*|expert.*|linear|conv*|recurrent|ssm.input|ssm.output",
    trains="all",
)
class denseshift:
    r"""Signed powers of two without a zero, from the nearest ones by rounding or by training.

    $$ \hat w = c \, \mathrm{sign}(w) \, 2^p, \quad p_0 = 0,\ p_i = [t_i > 0] \, (p_{i-1} + 1), \quad
       i = 1 \dots 2^{b-1} - 1 $$

    The exponent is the length of the run of ones at the end of a chain of latent numbers. Gradients pass the signs and
    the brackets unchanged, and $2^p$ counts as $\sqrt{p + 1}$ for them. The paper leaves the scale to batch norms; here
    each row has one, found by least squares, and it trains.

    Args:
        bits: b in the paper, the sign included.
        std: spread of the latent numbers for a factor of two: small ones change their sign soon (the paper's
            low-variance initialisation).

    Example:
        >>> form, w = denseshift(bits=3), torch.tensor([[1.0, -2.0, 8.0, 4.0, 0.1]])
        >>> form.decode(w, **form.encode(w))
        tensor([[ 1., -2.,  8.,  4.,  1.]])
    """

    bits: Annotated[int, Interval(ge=2, le=4)] = 3
    std: Annotated[float, Interval(gt=0, le=1)] = 1e-3

    def encode(self, w: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """The latent numbers of the chain and a scale for each row."""
        chain = 2 ** (self.bits - 1) - 1
        size = w.detach().abs()
        scale = searched(size, chain)
        place = torch.log2((size / scale).clamp(0.25, 2.0 ** (chain + 1)))
        turns = torch.arange(chain, 0, -1, device=w.device) - 1 + torch.log2(torch.tensor(1.5))
        return {"t": self.std * (place - turns.view(-1, 1, 1)), "scale": scale}

    def decode(
        self, w: Float[Tensor, "out in"], t: Float[Tensor, "chain out in"], scale: Float[Tensor, "out 1"]
    ) -> Float[Tensor, "out in"]:
        """The weight; its gradient is that of the softer one that the paper trains with."""
        shift = torch.zeros_like(w)
        for latent in t:
            shift = ((latent > 0).to(w.dtype) + (latent - latent.detach())) * (shift + 1)
        sign = torch.where(w < 0, -1.0, 1.0) + (w - w.detach())
        soft = sign * torch.sqrt(shift + 1)
        return ((sign * 2.0**shift).detach() + (soft - soft.detach())) * scale

    def integers(self, w: Tensor, t: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Exponents, negative weights 2^(bits - 1) above the others, and a scale a row: exactly the decoded weight."""
        shift = (t > 0).flip(0).cumprod(0).sum(0)
        return {"codes": (shift + (w < 0) * 2 ** (self.bits - 1)).to(torch.uint8), "scale": scale.detach()}


def searched(size: Tensor, chain: int) -> Tensor:
    """For each row the scale whose levels 1, 2, 4, ... have the least squared error."""
    top = size.amax(1, keepdim=True).clamp_min(_grid.SMALLEST) / 2**chain
    middles = 1.5 * 2.0 ** torch.arange(chain, device=size.device)
    scale = torch.empty_like(top)
    for part in torch.arange(len(size)).split(max(TILE // size.shape[1], 1)):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        tried = torch.stack([top[rows] * ratio for ratio in RATIOS])
        near = [s * 2.0 ** torch.bucketize(size[rows] / s, middles) for s in tried]
        best = torch.stack([(size[rows] - q).square().sum(1, keepdim=True) for q in near]).argmin(0, keepdim=True)
        scale[rows] = tried.gather(0, best)[0]
    return scale
