"""AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (Lin et al., MLSys 2024)."""

from typing import Annotated

import torch
from annotated_types import Ge, Interval
from jaxtyping import Float, UInt8
from torch import Tensor

from weightsmith.core.laws import levels
from weightsmith.core.parametrization import parametrization
from weightsmith.quantize import _grid
from weightsmith.quantize.blockwise import blockwise

TRIED = 20
"""Narrower ranges tried."""


@parametrization(
    paper="arXiv:2306.00978",
    laws=[levels().given(steps=1)],
    roles="attention.*|mlp.*|expert.*|linear|conv*|ssm.input|ssm.output",
    except_for={"decoding_settles": "the exponent is searched anew, and the decoded weight's own best is another"},
)
class awq:
    r"""Scale up the inputs that are large before rounding, and down again after.

    $$ \hat w = Q\big(w \, \mathrm{diag}(s)\big) \, \mathrm{diag}(s)^{-1}, \quad
       s_j = \Big(\tfrac{1}{n} \sum_t x_{tj}^2\Big)^{a/2}, \quad
       a = \arg\min_a \mathrm{tr}\big((w - \hat w) G (w - \hat w)^\top\big) $$

    The paper takes the mean of $|x|$ for the size of an input; here it is the root mean square, the diagonal of $G$.
    The scales stay with the weight, 16 bits an input; `folding.scaled` folds scales into the norm or layer before.

    Args:
        bits: bits of a code.
        group_size: weights of a row that share a scale and a zero point; None for the whole row.
        steps: how many exponents a are tried, from 0 up to but without 1; section 3.2.
        shrink: how much of the range the narrowest grid tried leaves out; 0 takes the range as it is.

    Example:
        >>> form = awq(bits=2, group_size=4, shrink=0.0)
        >>> w, gram = torch.tensor([[0.0, 1.4, 0.4, 3.0]]), torch.diag(torch.tensor([1.0, 100.0, 1.0, 1.0]))
        >>> form.decode(**form.encode(w, gram)).round(decimals=2)
        tensor([[0.0000, 1.4000, 0.0000, 2.9500]])
    """

    bits: Annotated[int, Interval(ge=2, le=8)] = 4
    group_size: Annotated[int, Ge(2)] | None = 64
    steps: Annotated[int, Ge(1)] = 20
    shrink: Annotated[float, Interval(ge=0, lt=1)] = 0.5

    def encode(self, w: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> dict[str, Tensor]:
        """Codes, scales, zero points, and the scale of each input."""
        w, gram = w.detach().float(), gram.detach().float()
        size = gram.diagonal().sqrt().clamp_min(1e-4)
        best, least = torch.ones_like(size), torch.inf
        for step in range(self.steps):
            channel = size ** (step / self.steps)
            channel = (channel / (channel.amax() * channel.amin()).sqrt()).half().float().clamp_min(_grid.SMALLEST)
            change = self._dense().decode(**self._dense().encode(w * channel)) / channel - w
            error = float(((change @ gram) * change).sum())
            if error < least:
                best, least = channel, error
        theta = self._searched(w * best, gram.diagonal() / best.square()) if self.shrink else None
        return {**(theta or self._dense().encode(w * best)), "channel": best.half()}

    def decode(
        self,
        codes: UInt8[Tensor, "out in"],
        scale: Float[Tensor, "out groups"],
        zero: UInt8[Tensor, "out groups"],
        channel: Float[Tensor, " in"],
    ) -> Float[Tensor, "out in"]:
        """The weight."""
        return self._dense().decode(codes, scale, zero) / channel.float()

    def stored_bits(self, theta: dict[str, Tensor]) -> int:
        """Bits of theta on disk, codes packed, scales and everything else counted."""
        return _grid.stored_bits(theta, self.bits)

    def _dense(self) -> blockwise:
        return blockwise(bits=self.bits, group_size=self.group_size, grid="asymmetric")

    def _searched(self, w: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """The range of each group with the least error, each input counting by its importance."""
        ratios = [1 - self.shrink * i / TRIED for i in range(TRIED + 1)]
        scale, zero = _grid.search(w, importance, self.bits, self.group_size, ratios, symmetric=False)
        return {"codes": _grid.coded(w, scale, zero, self.bits, self.group_size), "scale": scale, "zero": zero.byte()}
