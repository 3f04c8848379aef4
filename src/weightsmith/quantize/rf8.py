"""It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors for Optimized LLMs (Wu et al., arXiv 2025)."""  # noqa: E501

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from weightsmith.core.laws import levels
from weightsmith.core.parametrization import parametrization

LEVELS = torch.tensor([0.75, 0.875, 0.9375, 1.0, 1.0625, 1.125, 1.25, 1.5])
"""A power of two, alone or with a second one 2 to 16 times smaller, as far as rounding in logarithms leads there.

The last is three quarters of the next power, and written so.
"""

BORDERS = torch.tensor([1 - 2**-2.5, 1 - 2**-3.5, 1 - 2**-4.5, 1 + 2**-4.5, 1 + 2**-3.5, 1 + 2**-2.5, 1 + 2**-1.5])
"""Where the exponent of what is left of a weight, rounded, changes."""

BINADES = 15
"""Exponents a tensor has; with the code 0, which stands for zero, four bits."""


@parametrization(paper="arXiv:2506.00486", laws=[levels(count=211)])
class rf8:
    r"""Write each weight as a signed power of two plus or minus a smaller one, in 8 bits.

    $$ \hat w = s_1 2^{e_1} + s_2 2^{e_2}, \quad e_1 = \lfloor \log_2 |w| \rceil, \
       e_2 = \lfloor \log_2 |w - s_1 2^{e_1}| \rceil, \quad \text{the second only if } e_1 - e_2 \le 4 $$

    Such a rounding meets seven levels for each exponent: three bits. The sign takes one, the exponent, counted down
    from that of the largest weight, four. A tensor's largest exponent is stored with it. Smaller weights become zero.

    Example:
        >>> rf8().decode(**rf8().encode(torch.tensor([[1.0, -0.3, 0.62, 0.0]])))
        tensor([[ 1.0000, -0.3125,  0.6250,  0.0000]])
    """

    def encode(self, w: Float[Tensor, "*shape"]) -> dict[str, Tensor]:
        """A byte a weight, and a power of two for the tensor."""
        size = w.detach().float().abs().clamp_min(2.0**-100)
        exponent = torch.log2(size).round()
        level = torch.bucketize(size / 2.0**exponent, BORDERS.to(w.device))
        upper = level == 7
        exponent, level = exponent + upper, level * ~upper
        top = exponent.amax()
        place = exponent - top + BINADES
        codes = (place * 8 + level + (w < 0) * 128) * (place > 0)
        return {"codes": codes.to(torch.uint8), "scale": 2.0 ** (top - BINADES)}

    def decode(self, codes: UInt8[Tensor, "*shape"], scale: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
        """The weight."""
        place = (codes.int() & 127) >> 3
        size = LEVELS.to(codes.device)[codes.int() & 7] * 2.0**place * scale
        return size * (place > 0) * (1 - 2 * (codes >> 7).float())

    def stored_bits(self, theta: dict[str, Tensor]) -> int:
        """Bits of theta on disk; the power of two is a byte, its exponent."""
        return 8 * sum(tensor.numel() for tensor in theta.values())
