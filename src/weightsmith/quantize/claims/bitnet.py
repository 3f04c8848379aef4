"""Claims of BitNet b1.58 Reloaded: ternary MLPs of several widths trained on digits."""

from functools import cache, partial

import torch

from weightsmith.core.parametrization import attach, bake
from weightsmith.lab import Lab, claim
from weightsmith.quantize.bitnet import bitnet


@cache
def accuracy(seed: int, width: int, scale: str | None) -> float:
    """Of an MLP on the test digits after 500 steps, ternary but for the biases unless `scale` is None."""
    lab = Lab(seed)
    torch.manual_seed(seed)
    model = lab.mlp((64, width, width, 10))
    if scale:
        attach(model, bitnet(scale=scale), where="*.weight")
    lab.fit(model, lab.batches(), optimizer=partial(torch.optim.AdamW, lr=3e-3), steps=500)
    return lab.accuracy(bake(model) if scale else model)


@claim(
    "a ternary network comes within three points of the same network in floats",
    where="the experiments on small vision models",
    seconds=20,
)
def near_floats(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {"float": accuracy(lab.seed, 64, None), "median": accuracy(lab.seed, 64, "median")}
    return seen["median"] > seen["float"] - 0.03, seen


@claim(
    "with hidden layers twice as wide it makes up for the lost accuracy, to a point",
    where="the experiments on small language models",
    seconds=20,
)
def wider_makes_up(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {"float": accuracy(lab.seed, 64, None), "median, double width": accuracy(lab.seed, 128, "median")}
    return seen["median, double width"] > seen["float"] - 0.01, seen


@claim(
    "the median serves as the scale as well as the mean does, to a point and a half",
    where="the experiments",
    seconds=20,
)
def median_serves(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {scale: accuracy(lab.seed, 64, scale) for scale in ("median", "mean")}
    return abs(seen["median"] - seen["mean"]) < 0.015, seen
