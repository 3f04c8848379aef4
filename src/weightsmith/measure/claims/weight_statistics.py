"""Claims of the generalised Gaussian, which the paper fits to wavelet coefficients and we to weights."""

import math

import torch
from torch import Tensor

from weightsmith.lab import Lab, claim
from weightsmith.measure.weight_statistics import weight_statistics


def surprise(w: Tensor, shape: float) -> float:
    """Mean negative log-likelihood under the generalised Gaussian of this shape with the variance of the weights."""
    width = float(w.std(correction=0)) * math.exp((math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2)
    norm = math.log(2 * width / shape) + math.lgamma(1 / shape)
    return norm + float((w.abs() / width).pow(shape).mean())


@claim(
    "the shape found from two moments describes peaked, symmetric histograms better than a Gaussian (SmolLM2, MiniLM)",
    where="the model of the histograms of detail coefficients",
    seconds=30,
    models="real",
)
def fits_better_than_a_gaussian(lab: Lab) -> tuple[bool, dict[str, float]]:
    gains, shapes = [], []
    for weights in (lab.smollm2(), lab.minilm()):
        names = [
            n for n in weights if weights.spec(n).role.startswith(("attention", "mlp")) and weights.spec(n).numel > 1e5
        ]
        for index in torch.randperm(len(names), generator=lab.rng())[:20].tolist():
            w = weights.read(names[index]).double().flatten()
            w = w - w.mean()
            shapes.append(weight_statistics(w)["shape"])
            gains.append(surprise(w, 2.0) - surprise(w, shapes[-1]))
    better = sum(gain > 0 for gain in gains) / len(gains)
    seen = {
        "share_better": better,
        "nats_gained_mean": sum(gains) / len(gains),
        "shape_mean": sum(shapes) / len(shapes),
    }
    return better > 0.9, seen
