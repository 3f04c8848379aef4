"""BitNet b1.58 Reloaded: State-of-the-art Performance Also on Smaller Networks (Nielsen and Schneider-Kamp, DeLTA 2024)."""  # noqa: E501

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from weightsmith.core.laws import levels
from weightsmith.core.parametrization import parametrization
from weightsmith.quantize import _grid


@parametrization(
    paper="arXiv:2407.09527",
    laws=[levels(count=3)],
    roles="attention.*|mlp.*|expert.*|linear|conv*|recurrent|ssm.input|ssm.output",
    trains="all",
)
class bitnet:
    r"""Train a network whose weights are -1, 0 or 1 times one scale, the weights themselves being latent.

    $$ \hat W = D \, \mathrm{clip}\big(\lfloor W / D \rceil, -1, 1\big), \quad
       D = \mathrm{median}|W| \text{ or } \mathrm{mean}|W|, \qquad
       \frac{\partial \hat W}{\partial W} \approx 1 $$

    For training: `attach`, train as usual, `bake`. Only weights are quantised: the paper's 8-bit inputs, normalised by
    a layer norm, would change the layer and not just its weight.

    Args:
        scale: what D is: `median` is the paper's, `mean` that of BitNet b1.58 before it.

    Example:
        >>> w = torch.tensor([[0.4, -2.0, 1.0, 1.2]])
        >>> bitnet(scale="mean").decode(w)
        tensor([[ 0.0000, -1.1500,  1.1500,  1.1500]])
    """

    scale: Literal["median", "mean"] = "median"

    def encode(self, w: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Nothing is stored beside the weight."""
        return {}

    def decode(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The ternary weight; its gradient is the latent weight's."""
        return _grid.decoded(*self.integers(w).values(), 1.0) + (w - w.detach())

    def integers(self, w: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Codes 0, 1, 2 for -1, 0, 1, and the scale: exactly the decoded weight."""
        size = w.detach().abs()
        scale = (size.median() if self.scale == "median" else size.mean()).clamp_min(_grid.SMALLEST)
        codes = torch.round(w.detach() / scale).clamp_(-1, 1).add_(1).to(torch.uint8)
        return {"codes": codes, "scale": scale.view(1, 1)}
