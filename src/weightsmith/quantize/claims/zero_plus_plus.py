"""Claims of ZeRO++'s block quantisation: MiniLM's weights, and gradients added up over simulated nodes."""

import torch
from torch import Tensor

from weightsmith.lab import Lab, claim
from weightsmith.lab.models import minilm
from weightsmith.quantize.claims.power_quant import matrices
from weightsmith.quantize.zero_plus_plus import zero_plus_plus

NODES, DEVICES = 4, 4


def sent(x: Tensor, bits: int, size: int | None = 512) -> Tensor:
    """A tensor as it arrives."""
    form = zero_plus_plus(bits=bits, group_size=size)
    return form.decode(**form.encode(x))


@claim(
    "blocks make the error of 8-bit weights a third of that of whole tensors and less",
    where="the section on quantised weights, qwZ",
    seconds=20,
    models="real",
    seeds=(0,),
)
def blocks_lower_the_error(lab: Lab) -> tuple[bool, dict[str, float]]:
    ratios = [float((sent(w, 8, None) - w).norm() / (sent(w, 8, 2048) - w).norm()) for w in matrices(minilm)]
    seen = {"mean": sum(ratios) / len(ratios), "least": min(ratios), "largest": max(ratios)}
    return seen["mean"] > 3, seen


@claim(
    "gradients added up in two hops have less error than passed around a ring, rounded to 4 bits at each hop",
    where="the section on quantised gradients, qgZ",
    seconds=20,
)
def two_hops_beat_a_ring(lab: Lab) -> tuple[bool, dict[str, float]]:
    grads = torch.randn(NODES * DEVICES, 1 << 14, generator=lab.rng()) + torch.randn(1 << 14, generator=lab.rng())
    exact, ring = grads.sum(0), grads[0]
    for grad in grads[1:]:
        ring = sent(ring, 4) + grad
    inside = torch.stack([torch.stack([sent(g, 4) for g in node]).sum(0) for node in grads.view(NODES, DEVICES, -1)])
    hops = torch.stack([sent(part, 4) for part in inside]).sum(0)
    seen = {name: float((x - exact).norm() / exact.norm()) for name, x in (("ring", ring), ("two hops", hops))}
    return seen["two hops"] < seen["ring"], seen
