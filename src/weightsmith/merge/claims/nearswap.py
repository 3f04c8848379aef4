"""What the model card of QuartetAnemoi-70B-t0.0001 promises, tried on digits."""

import torch

from weightsmith import apply
from weightsmith.lab import Lab, claim
from weightsmith.merge import nearswap


@claim("the base survives the swap of few weights, and not that of half of them", where="model card", seconds=10)
def few_swaps_are_harmless(lab):
    base, other = lab.classifier("mlp"), Lab(lab.seed + 100).classifier("mlp")
    gaps = torch.cat([(other.read(name) - base.read(name)).abs().flatten() for name in base])
    merges = {
        f"{share:.1%}": apply(nearswap, other, base=base, t=float(gaps.quantile(share))) for share in (0.008, 0.55)
    }
    seen = {"base": lab.accuracy(base), **{name: lab.accuracy(weights) for name, weights in merges.items()}}
    return seen["0.8%"] >= seen["base"] - 0.01 and seen["55.0%"] < seen["base"] - 0.1, seen
