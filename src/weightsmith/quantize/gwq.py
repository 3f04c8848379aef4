"""GWQ: Gradient-Aware Weight Quantization for Large Language Models (Shao et al., arXiv 2024)."""

from typing import Annotated, Literal

from annotated_types import Ge, Interval
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from weightsmith.core.laws import levels
from weightsmith.core.parametrization import parametrization
from weightsmith.quantize import _grid
from weightsmith.quantize.blockwise import blockwise


@parametrization(
    paper="arXiv:2411.00850",
    laws=[levels().given(kept=0.0)],
    roles="attention.*|mlp.*|expert.*|linear|conv*|ssm.input|ssm.output",
    except_for={"decoding_settles": "by magnitude, rounding may lift a weight over one that was kept"},
)
class gwq:
    r"""Keep the few weights with the largest gradient in 16 bits, and round the others to the nearest.

    $$ \hat w = m \odot w + (1 - m) \odot Q\big((1 - m) \odot w\big), \quad m = \text{top}_{kept} |\nabla_w L| $$

    Kept weights do not widen the range of their group. Each of them takes 16 bits and 32 more for its place.

    Args:
        bits: bits of a code.
        group_size: weights of a row that share a scale and a zero point; None for the whole row.
        kept: share of the weights kept, 1 % in the paper.
        score: what a weight is kept for: its `gradient`, or its `magnitude`, the baseline.

    Example:
        >>> form = gwq(bits=2, group_size=4, kept=0.25)
        >>> w, grad = torch.tensor([[9.1875, 1.0, 2.0, 3.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> theta = form.encode(w, grad)
        >>> theta["index"], form.decode(**theta)
        (tensor([0], dtype=torch.int32), tensor([[9.1875, 1.0000, 2.0000, 3.0000]]))
    """

    bits: Annotated[int, Interval(ge=2, le=8)] = 3
    group_size: Annotated[int, Ge(2)] | None = 64
    kept: Annotated[float, Interval(ge=0, le=1)] = 0.01
    score: Literal["gradient", "magnitude"] = "gradient"

    def encode(self, w: Float[Tensor, "out in"], grad: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Codes, scales and zero points of the rest; places and values of what is kept."""
        w, grad = w.detach().float(), grad.detach().float()
        rest, outliers = _grid.outliers(w, (grad if self.score == "gradient" else w).abs(), self.kept)
        return {**self._dense().encode(rest), **outliers}

    def decode(
        self,
        codes: UInt8[Tensor, "out in"],
        scale: Float[Tensor, "out groups"],
        zero: UInt8[Tensor, "out groups"],
        index: Int32[Tensor, " kept"],
        value: Float[Tensor, " kept"],
    ) -> Float[Tensor, "out in"]:
        """The weight."""
        return _grid.restored(self._dense().decode(codes, scale, zero), index, value)

    def stored_bits(self, theta: dict[str, Tensor]) -> int:
        """Bits of theta on disk, codes packed, scales and everything else counted."""
        return _grid.stored_bits(theta, self.bits)

    def _dense(self) -> blockwise:
        return blockwise(bits=self.bits, group_size=self.group_size, grid="asymmetric")
