"""ZeRO++: Extremely Efficient Collective Communication for Giant Model Training (Wang et al., ICLR 2024)."""

from typing import Annotated

from annotated_types import Ge, Interval
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import levels
from weightsmith.core.parametrization import parametrization
from weightsmith.quantize import _grid
from weightsmith.quantize.blockwise import blockwise


@parametrization(paper="arXiv:2306.10209", laws=[levels(count=255)])
class zero_plus_plus:
    r"""Round a tensor of any shape in blocks of neighbours, as shards of weights and gradients are sent.

    $$ \hat w_i = s_b \Big\lfloor \frac{w_i}{s_b} \Big\rceil, \quad s_b = \frac{\max_{i \in b} |w_i|}{2^{k-1} - 1} $$

    Blocks run through the flattened tensor and know nothing of its rows, as a shard is any piece of it: that is all
    it differs in from `blockwise`. The paper sends weights in 8 bits (qwZ) and gradients in 4 (qgZ).

    Args:
        bits: k: bits of a code.
        group_size: neighbours that share a scale; None for the whole tensor.

    Example:
        >>> form = zero_plus_plus(bits=3, group_size=2)
        >>> form.decode(**form.encode(torch.tensor([[3.0, 1.2, -6.0], [1.2, 3.0, 0.9]])))
        tensor([[ 3.,  1., -6.],
                [ 2.,  3.,  1.]])
    """

    bits: Annotated[int, Interval(ge=2, le=8)] = 8
    group_size: Annotated[int, Ge(2)] | None = 2048

    def encode(self, w: Float[Tensor, "*shape"]) -> dict[str, Tensor]:
        """Codes in the tensor's shape, and a scale for each block."""
        theta = self._rows().encode(w.reshape(1, -1))
        return {**theta, "codes": theta["codes"].view(w.shape)}

    def decode(self, codes: Tensor, scale: Float[Tensor, "1 blocks"]) -> Float[Tensor, "*shape"]:
        """The tensor."""
        return self._rows().decode(codes=codes.reshape(1, -1), scale=scale).view(codes.shape)

    def stored_bits(self, theta: dict[str, Tensor]) -> int:
        """Bits of theta as it is sent: codes packed, scales counted."""
        return _grid.stored_bits(theta, self.bits)

    def _rows(self) -> blockwise:
        return blockwise(bits=self.bits, group_size=self.group_size, grid="int")
