"""GranQ: Granular Zero-Shot Quantization with Channel-Wise Activation Scaling in QAT (Hong et al., arXiv 2025)."""

from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from weightsmith.core.method import op


@op(paper="arXiv:2503.18339")
def granq(
    model: nn.Module,
    *,
    bits: Annotated[int, Interval(ge=2, le=8)] = 4,
    granularity: Literal["channel", "layer"] = "channel",
) -> nn.Module:
    r"""Round the inputs of every layer to few bits, each channel in the range it has in the batch at hand.

    $$ \hat x_c = s_c \Big\lfloor \frac{x_c - l_c}{s_c} \Big\rceil + l_c, \quad l_c = \min x_c, \quad
       s_c = \frac{\max x_c - l_c}{2^b - 1} $$

    All channels are scaled in one vectorised operation. Weights stay as they are, and gradients pass the rounding
    unchanged. What could be established, from the abstract: ranges per channel, taken anew for each batch. How the
    paper trains, on images that it synthesises, is not here.

    Args:
        model: changed in place: each linear layer and convolution gets a submodule `activation`.
        bits: b: of a rounded input.
        granularity: whose range counts: the `channel`'s, or the `layer`'s as in the methods before it.

    Example:
        >>> net = granq(torch.nn.Linear(2, 1, bias=False), bits=2)
        >>> with torch.no_grad():
        ...     net(torch.tensor([[0.0, 0.0], [1.1, 9.0], [3.0, 30.0]])).shape
        torch.Size([3, 1])
    """
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            dim = -1 if isinstance(module, nn.Linear) else 1
            made = Activation(bits, dim if granularity == "channel" else None)
            module.add_module("activation", made.to(module.weight.device))
            module.register_forward_pre_hook(lambda m, x: (m.activation(x[0]), *x[1:]))
    return model


class Activation(nn.Module):
    """Rounds a tensor; its settings are kept with the state.

    Args:
        bits: of a rounded entry.
        dim: of the channels; None for one range.
    """

    def __init__(self, bits: int, dim: int | None):
        super().__init__()
        self.dim = dim
        self.register_buffer("bits", torch.tensor(bits))
        self.register_buffer("per_channel", torch.tensor(dim is not None))

    def forward(self, x: Tensor) -> Tensor:
        """The rounded tensor; its gradient is the tensor's."""
        others = [d for d in range(x.ndim) if self.dim is None or d != self.dim % x.ndim]
        low, high = x.detach().amin(others, keepdim=True), x.detach().amax(others, keepdim=True)
        scale = ((high - low) / (2**self.bits - 1)).clamp_min(1e-20)
        return ((x.detach() - low) / scale).round() * scale + low + (x - x.detach())
