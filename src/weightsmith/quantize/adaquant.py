"""Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming
(Hubara et al., arXiv 2020).
"""

from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from weightsmith.core.arch.trace import run
from weightsmith.core.laws import levels
from weightsmith.core.parametrization import parametrization
from weightsmith.quantize import _grid

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@parametrization(
    paper="arXiv:2006.10518",
    laws=[levels(), _grid.refines(steps=0)],
    roles="attention.*|mlp.*|expert.*|linear|conv*|ssm.input|ssm.output",
    except_for={"decoding_settles": "the range is searched anew, and the decoded weight's own range is one of many"},
)
class adaquant:
    r"""Learn what to add to the weight before rounding, and the scales, so that the layer's output stays.

    $$ \min_{V, s} \; \mathrm{tr}\big((w - Q_s(w + V)) \, G \, (w - Q_s(w + V))^\top\big) $$

    Adam with gradients straight through the rounding, from the nearest codes. What has the least error on the way is
    returned. Without steps it is rounding to the nearest. The paper's integer programme is `core.allocation`; the
    biases are fitted afterwards, by `bias_corrected`, where the paper learns them along with V.

    Args:
        bits: bits of a code.
        group_size: weights of a row that share a scale and a zero point; None for the whole row.
        steps: steps of Adam, section 3.1.
        learning_rate: of V, in units of the scale; it falls linearly to zero.
        scale_rate: learning rate of the scales, relative to them.
        shrink: how much of the range the narrowest grid tried at the start leaves out; 0 takes the range as it is.

    Example:
        >>> w, gram = torch.tensor([[0.0, 1.4, 1.3, 3.0]]), torch.ones(4, 4) + 0.1 * torch.eye(4)
        >>> form = adaquant(bits=2, group_size=4, shrink=0.0, scale_rate=0.0)
        >>> form.decode(**form.encode(w, gram))
        tensor([[0., 2., 1., 3.]])
    """

    bits: Annotated[int, Interval(ge=2, le=8)] = 4
    group_size: Annotated[int, Ge(2)] | None = 64
    steps: Annotated[int, Ge(0)] = 100
    learning_rate: Annotated[float, Interval(ge=0, le=1)] = 0.05
    scale_rate: Annotated[float, Interval(ge=0, le=1)] = 1e-3
    shrink: Annotated[float, Interval(ge=0, lt=1)] = 0.5

    @torch.enable_grad()
    def encode(self, w: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> dict[str, Tensor]:
        """Codes, scales and zero points."""
        w, gram, width = w.detach().float(), gram.detach().float(), w.shape[1]
        ratios = [1 - self.shrink * i / 20 for i in range(21)] if self.shrink else [1.0]
        start, zero = _grid.search(w, gram.diagonal(), self.bits, self.group_size, ratios, symmetric=False)
        low = -_grid.spread(zero, self.group_size, width)
        unit = _grid.spread(start.float(), self.group_size, width)
        shift, ratio = (torch.zeros_like(x, dtype=torch.float32, requires_grad=True) for x in (w, start))
        optimizer = torch.optim.Adam(
            [{"params": [shift], "lr": self.learning_rate}, {"params": [ratio], "lr": self.scale_rate}]
        )
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(self.steps, 1))
        best, least = {}, torch.inf
        for step in range(self.steps + 1):
            scale = unit * (1 + _grid.spread(ratio, self.group_size, width))
            aim = w / scale + shift
            code = torch.maximum(torch.minimum(aim.round(), low + 2**self.bits - 1), low)
            change = (code.detach() + aim - aim.detach()) * scale - w
            pull = change.detach() @ gram
            error = float((pull * change.detach()).sum())
            if error < least:
                least = error
                best = {"codes": code.detach() - low, "scale": start.float() * (1 + ratio.detach())}
            if step < self.steps:
                optimizer.zero_grad()
                change.backward(pull / gram.diagonal().mean() / unit.square().mean())
                optimizer.step()
                falling.step()
        scale = best["scale"].clamp(_grid.SMALLEST, _grid.LARGEST).half()
        return {"codes": best["codes"].to(torch.uint8), "scale": scale, "zero": zero.to(torch.uint8)}

    def decode(
        self,
        codes: UInt8[Tensor, "out in"],
        scale: Float[Tensor, "out groups"],
        zero: UInt8[Tensor, "out groups"],
    ) -> Float[Tensor, "out in"]:
        """The weight."""
        return _grid.decoded(codes, scale, zero, size=self.group_size)

    def stored_bits(self, theta: dict[str, Tensor]) -> int:
        """Bits of theta on disk, codes packed, scales and everything else counted."""
        return _grid.stored_bits(theta, self.bits)


@torch.no_grad()
def bias_corrected(model: nn.Module, teacher: nn.Module, batch: Any) -> nn.Module:
    r"""Give each layer of a quantised model the bias with the least error for its codes, from first to last, in place.

    $$ b' = b + \overline{W x} - \overline{\hat W \hat x} $$

    Inputs $\hat x$ have passed the layers already corrected. Layers that run more than once, or have no bias, are left
    alone. The tuning of all biases by distillation that the authors' code has as well is not here.

    Args:
        model: quantised, in evaluation, its layers plain ones (`bake`).
        teacher: the float model.
        batch: inputs of both, without padding: a tensor, a tuple of arguments or a dict of keyword arguments.
    """
    aims: dict[str, list[Tensor]] = {}

    def rows(layer: nn.Module, out: Tensor) -> Tensor:
        return out if isinstance(layer, nn.Linear) else out.movedim(1, -1)

    def look(name: str, layer: nn.Module, out: Tensor) -> None:
        aims.setdefault(name, []).append(rows(layer, out).flatten(0, -2).float().mean(0))

    def correct(name: str, layer: nn.Module, out: Tensor) -> Tensor | None:
        if len(aims.get(name, ())) != 1:
            return None
        change = (aims[name][0] - rows(layer, out).flatten(0, -2).float().mean(0)).to(out.dtype)
        layer.get_parameter("bias").add_(change)
        return out + change.view(-1, *[1] * (0 if isinstance(layer, nn.Linear) else out.ndim - 2))

    for each, hook in ((teacher, look), (model, correct)):
        chosen = {n: m for n, m in each.named_modules() if isinstance(m, LAYERS) and m.bias is not None}
        hooks = [m.register_forward_hook(lambda m, _, out, n=n, hook=hook: hook(n, m, out)) for n, m in chosen.items()]
        try:
            run(each, batch)
        finally:
            for handle in hooks:
                handle.remove()
    return model
