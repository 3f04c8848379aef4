"""Claims of EQ-Net's regulariser: MLPs trained on digits with and without it, then rounded."""

from functools import cache, partial

import torch

from weightsmith.core.apply import apply
from weightsmith.core.penalty import Penalty
from weightsmith.core.weights import Memory
from weightsmith.lab import Lab, claim
from weightsmith.regularize.weight_distribution import weight_distribution

LAYERS = 3


@cache
def rounded(seed: int, strength: float) -> dict[str, float]:
    """Accuracy of a trained MLP in floats and rounded row by row to 2 and 3 bits."""
    lab = Lab(seed)
    torch.manual_seed(seed)
    model = lab.mlp((64, 64, 64, 10))
    penalty = Penalty(weight_distribution, model, where="*.weight", strength=strength / LAYERS)
    lab.fit(model, lab.batches(), optimizer=partial(torch.optim.AdamW, lr=3e-3), steps=500, penalty=penalty)
    weights = Memory.of(model)
    made = {bits: apply("quantize.eq_net", weights, where="*.weight", bits=bits) for bits in (2, 3)}
    return {"float": lab.accuracy(model), **{f"{bits} bits": lab.accuracy(w) for bits, w in made.items()}}


@claim(
    "with the regulariser rounding to few bits costs at most half as much accuracy, and nothing in floats",
    where="the ablation of the weight distribution regularisation",
    seconds=20,
)
def rounds_better(lab: Lab) -> tuple[bool, dict[str, float]]:
    plain, flat = rounded(lab.seed, 0.0), rounded(lab.seed, 1.0)
    lost = [sum(seen["float"] - seen[f"{bits} bits"] for bits in (2, 3)) for seen in (plain, flat)]
    seen = {f"{k}, plain": v for k, v in plain.items()} | {f"{k}, regularised": v for k, v in flat.items()}
    return lost[1] < lost[0] / 2 and flat["float"] > plain["float"] - 0.005, seen
