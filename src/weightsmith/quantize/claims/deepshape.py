"""Claims of DeepShape: a classifier of digits reshaped, with and without a short training afterwards."""

from functools import partial

import torch

from weightsmith.core.apply import apply
from weightsmith.core.weights import Memory, Weights
from weightsmith.lab import Lab, claim
from weightsmith.quantize.deepshape import deepshape

STEP = 2.0**-13


def entropy(weights: Weights) -> float:
    """Bits a weight of the matrices on a grid of 2^-13, were they coded by how often each level occurs."""
    codes = torch.cat([(weights.read(n) / STEP).round().flatten() for n in weights if len(weights.spec(n).shape) > 1])
    share = codes.unique(return_counts=True)[1] / len(codes)
    return float(-(share * share.log2()).sum())


@claim(
    "reshaped weights take fewer bits and, after a short training, keep the accuracy to a point",
    where="the section on DeepShape",
    seconds=20,
)
def smaller_and_as_good(lab: Lab) -> tuple[bool, dict[str, float]]:
    weights = lab.classifier()
    shaped = apply(deepshape, weights, where="*.weight")
    model = lab.module(shaped)
    lab.fit(model, lab.batches(), optimizer=partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0), steps=50)
    seen = {"bits": entropy(weights), "bits, reshaped": entropy(shaped), "bits, trained": entropy(Memory.of(model))}
    seen |= {"accuracy": lab.accuracy(weights), "reshaped": lab.accuracy(shaped), "trained": lab.accuracy(model)}
    return seen["bits, trained"] < seen["bits"] - 0.2 and seen["trained"] > seen["accuracy"] - 0.01, seen
