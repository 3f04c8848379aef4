"""Claims of OFQ: MLPs of two bits trained on digits, beside those whose step is learned (LSQ)."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.parametrization import attach
from weightsmith.core.schedule import Schedule, advance
from weightsmith.lab import Lab, claim
from weightsmith.quantize.ofq import ofq

STEPS, LAST = 600, 60
BITS = 2


class LearnedStep(nn.Module):
    """Learned step size quantisation (Esser et al., 2020), for comparison: a step a row, its gradient scaled down."""

    def __init__(self, w: Tensor):
        super().__init__()
        self.top = 2 ** (BITS - 1) - 1
        self.step = nn.Parameter(2 * w.detach().abs().mean(1, keepdim=True) / max(self.top, 1) ** 0.5)
        self.share = 1 / (w.shape[1] * max(self.top, 1)) ** 0.5

    def forward(self, w: Tensor) -> Tensor:
        """The weight on the grid."""
        step = self.step * self.share + (self.step * (1 - self.share)).detach()
        place = (w / step).clamp(-self.top - 1, self.top)
        return (place.round() - place).detach() * step + place * step


@cache
def trained(seed: int, kind: str) -> tuple[float, float]:
    """Accuracy, and the mean share of weights whose level changes in a step at the end of training."""
    lab = Lab(seed)
    torch.manual_seed(seed)
    model = lab.mlp((64, 96, 96, 10))
    layers: list[Any] = [m for m in model if isinstance(m, nn.Linear)]
    if kind == "learned step":
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", LearnedStep(layer.weight))
    else:
        boundary = Schedule(0.5, 0.005, begin=0.9, until=0.901) if kind == "annealed" else 0.5
        attach(model, ofq(bits=BITS, boundary=boundary), where="*.weight")
    optimizer, batches, flips = torch.optim.AdamW(model.parameters(), lr=3e-3), iter(lab.batches()), []
    levels = places(layers)
    for step in range(STEPS):
        advance(model, step / STEPS)
        x, y = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        before, levels = levels, places(layers)
        flips += [float((before != levels).float().mean())] if step >= STEPS - LAST else []
    return lab.accuracy(model), sum(flips) / LAST


@torch.no_grad()
def places(layers: list[Any]) -> Tensor:
    """Which level each weight is at: how many times the smallest of its row that is not zero."""
    rows = [layer.weight * 1.0 for layer in layers]
    least = [row.abs().where(row != 0, torch.inf).amin(1, keepdim=True) for row in rows]
    return torch.cat([(row / size).round().flatten() for row, size in zip(rows, least, strict=True)])


@claim(
    "scales that are statistics of the weights make fewer weights change their level than learned steps do",
    where="section 3.1",
    seconds=40,
)
def flips_less(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {kind: trained(lab.seed, kind)[1] for kind in ("statistics", "learned step")}
    return seen["statistics"] < seen["learned step"] / 1.5, seen


@claim("and the network of two bits is at least as accurate", where="Table 1", seconds=40)
def is_as_accurate(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {kind: trained(lab.seed, kind)[0] for kind in ("statistics", "learned step")}
    return seen["statistics"] >= seen["learned step"], seen


@claim(
    "training only the weights near a border at the end makes fewer change their level, at no loss of accuracy",
    where="section 3.3",
    seconds=40,
)
def annealing_calms(lab: Lab) -> tuple[bool, dict[str, float]]:
    (accuracy, flips), (plain, before) = trained(lab.seed, "annealed"), trained(lab.seed, "statistics")
    seen = {"flips": flips, "flips without": before, "accuracy": accuracy, "accuracy without": plain}
    return flips < before / 2 and accuracy > plain - 0.005, seen
