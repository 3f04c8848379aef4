"""Claims of GranQ: a small CNN on digits whose activations are rounded."""

from copy import deepcopy

import torch
from torch import nn

from weightsmith.lab import Lab, claim
from weightsmith.quantize.granq import granq


def divergence(lab: Lab, bits: int, granularity: str) -> float:
    """KL divergence of the float network's answers from those with rounded activations, on test digits."""
    model = lab.module(lab.classifier("cnn"))
    x = lab.digits("plain", "test")[0]
    with torch.no_grad():
        right = model(x).log_softmax(1)
        made = granq(deepcopy(model), bits=bits, granularity=granularity)(x).log_softmax(1)
    return float(nn.functional.kl_div(made, right, log_target=True, reduction="batchmean"))


@claim(
    "ranges of channels rather than of layers bring rounded activations much nearer to the float network",
    where="the experiments on 3 and 4 bits",
    seconds=20,
)
def channels_beat_layers(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {f"{bits} bits, {of}": divergence(lab, bits, of) for bits in (3, 4) for of in ("channel", "layer")}
    return all(seen[f"{b} bits, channel"] < 0.7 * seen[f"{b} bits, layer"] for b in (3, 4)), seen
