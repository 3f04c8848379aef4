"""PowerQuant: Automorphism Search for Non-Uniform Quantization (Yvinec et al., ICLR 2023)."""

from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from jaxtyping import Float, UInt8
from torch import Tensor

from weightsmith.core.laws import levels
from weightsmith.core.parametrization import parametrization
from weightsmith.quantize import _grid

COARSE, FINE = 0.1, 0.02
"""Steps of the two searches for an exponent."""


@parametrization(
    paper="arXiv:2301.09858",
    laws=[levels()],
    roles="attention.*|mlp.*|expert.*|linear|conv*|ssm.input|ssm.output",
    except_for={"decoding_settles": "the exponent is searched anew, and on fewer levels the error has another minimum"},
)
class power_quant:
    r"""Round a power of each weight, of the exponent that leaves the least error: levels are denser near zero.

    $$ q = \Big\lfloor (2^{b-1} - 1) \frac{|w|^a}{\max |w|^a} \Big\rceil \mathrm{sign}(w), \quad
       \hat w = \mathrm{sign}(q) \, s \, \Big(\frac{|q|}{2^{b-1} - 1}\Big)^{1/a}, \quad s = \max |w| $$

    Powers are the maps that keep products, so integers can still be multiplied and added up in the logarithm's place.

    Args:
        bits: b in the paper: bits of a code.
        group_size: weights of a row that share a scale; None for the whole row, as in the paper.
        exponent: a in the paper; None searches one for the weight. The paper has one for the network: give that.

    Example:
        >>> form = power_quant(bits=3, exponent=0.5)
        >>> form.decode(**form.encode(torch.tensor([[9.0, -1.2, 4.2, 0.1]])))
        tensor([[ 9., -1.,  4.,  0.]])
    """

    bits: Annotated[int, Interval(ge=2, le=8)] = 4
    group_size: Annotated[int, Ge(2)] | None = None
    exponent: Annotated[float, Interval(ge=0.1, le=1)] | None = None

    def encode(self, w: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Codes, a scale for each group, and the exponent."""
        w = w.detach().float()

        def error(exponent: float) -> float:
            return float((power_decoded(**rounded(w, exponent, self.bits, self.group_size)) - w).square().sum())

        return rounded(w, searched(error) if self.exponent is None else self.exponent, self.bits, self.group_size)

    def decode(
        self, codes: UInt8[Tensor, "out in"], scale: Float[Tensor, "out groups"], exponent: Float[Tensor, ""]
    ) -> Float[Tensor, "out in"]:
        """The weight."""
        return power_decoded(codes, scale, exponent, bits=self.bits, size=self.group_size)

    def stored_bits(self, theta: dict[str, Tensor]) -> int:
        """Bits of theta on disk, codes packed, scales and the exponent counted."""
        return _grid.stored_bits(theta, self.bits)


