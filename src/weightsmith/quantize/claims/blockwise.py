"""Claims of block-wise k-bit quantisation on MiniLM's matrices and on classifiers of several sizes."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from weightsmith.core.apply import apply
from weightsmith.core.weights import Memory
from weightsmith.lab import Lab, claim, minilm
from weightsmith.quantize.blockwise import blockwise

BLOCKS = (32, 64, 128, 384)


def matrices() -> Iterator[Tensor]:
    """The linear layers of MiniLM's encoder, 384 or 1,536 inputs wide."""
    weights = minilm()
    yield from (weights.read(n).float() for n in weights if "encoder.layer" in n and len(weights.spec(n).shape) == 2)


def error(**options: object) -> float:
    """Squared error relative to the squared weights, mean over the matrices."""
    form = blockwise(**options)
    found = [float((form.decode(**form.encode(w)) - w).square().mean() / w.square().mean()) for w in matrices()]
    return sum(found) / len(found)


@claim(
    "smaller blocks lower the error of every data type and number of bits",
    where="Figure 4",
    seconds=30,
    models="real",
    seeds=(0,),
)
def smaller_blocks_help(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {
        f"{grid}{bits}/{size}": error(bits=bits, group_size=size, grid=grid)
        for grid in ("int", "float", "quantile")
        for bits in (3, 4)
        for size in BLOCKS
    }
    errors = list(seen.values())
    curves = [errors[i : i + len(BLOCKS)] for i in range(0, len(errors), len(BLOCKS))]
    return all(a < b for curve in curves for a, b in pairwise(curve)), seen


@claim(
    "in large blocks, which outliers stretch, float and quantile codes beat integers",
    where="Figure 5",
    seconds=30,
    models="real",
    seeds=(0,),
)
def floats_beat_integers_in_large_blocks(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {grid: error(bits=4, group_size=384, grid=grid) for grid in ("int", "float", "quantile")}
    return seen["float"] < 0.9 * seen["int"] and seen["quantile"] < 0.9 * seen["int"], seen


@claim(
    "in blocks of 64, float and quantile codes of 4 bits beat integers",
    where="Figure 5",
    seconds=30,
    models="real",
    seeds=(0,),
)
def floats_beat_integers_in_usual_blocks(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {grid: error(bits=4, group_size=64, grid=grid) for grid in ("int", "float", "quantile")}
    return seen["float"] < seen["int"] and seen["quantile"] < seen["int"], seen


@claim(
    "4 bits, not 2 or 8, give the best accuracy for a fixed total of model bits",
    where="Figure 1",
    seconds=60,
)
def four_bits_are_best_for_their_size(lab: Lab) -> tuple[bool, dict[str, float]]:
    """Each number of bits takes the width of network that makes 18 thousand bits in all."""
    seen = {}
    for bits, width in {8: 24, 4: 40, 2: 64}.items():
        torch.manual_seed(lab.seed)
        model = lab.mlp((64, width, width, 10))
        lab.fit(model, lab.batches(), optimizer=partial(torch.optim.AdamW, lr=3e-3), steps=600)
        quantised = apply(blockwise, Memory.of(model), where="*.weight", bits=bits, group_size=64, grid="int")
        seen[f"{bits} bits"] = lab.accuracy(quantised)
    return seen["4 bits"] > max(seen["2 bits"], seen["8 bits"]), seen
