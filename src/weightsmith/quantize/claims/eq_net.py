"""Claims of EQ-Net: an MLP on digits trained once for many numbers of bits."""

from functools import cache, partial
from typing import Any

import torch

from weightsmith.core.apply import apply
from weightsmith.core.parametrization import attach
from weightsmith.core.weights import Memory
from weightsmith.lab import Lab, claim
from weightsmith.quantize.eq_net import elastic, eq_net

TRIED = (2, 3, 4, 8)


@cache
def accuracies(seed: int, bits: int | None) -> dict[int, float]:
    """Accuracy at each number of bits after training at `bits`, or at one drawn anew at every step."""
    lab = Lab(seed)
    torch.manual_seed(seed)
    model = lab.mlp((64, 64, 64, 10))
    drawn: Any = bits or elastic(lab.rng(), (2, 2, 3, 4, 8))
    attach(model, eq_net(bits=drawn), where="*.weight")
    lab.fit(model, lab.batches(), optimizer=partial(torch.optim.AdamW, lr=3e-3), steps=600)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {name: name.replace("parametrizations.", "").replace(".original", "") for name in state}
    weights = Memory({names[name]: p for name, p in state.items()})
    return {b: lab.accuracy(apply(eq_net, weights, where="*.weight", bits=b)) for b in TRIED}


@claim(
    "one set of weights serves every number of bits, within two points of a network trained for that number",
    where="Table 2",
    seconds=30,
)
def serves_all(lab: Lab) -> tuple[bool, dict[str, float]]:
    one = accuracies(lab.seed, None)
    own = {bits: accuracies(lab.seed, bits)[bits] for bits in TRIED}
    seen = {f"{b} bits": one[b] for b in TRIED} | {f"{b} bits, trained for it": own[b] for b in TRIED}
    return all(one[b] > own[b] - 0.02 for b in TRIED), seen


@claim("trained for 8 bits only it fails at 2", where="section 1", seconds=30)
def fixed_bits_fail(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {"elastic": accuracies(lab.seed, None)[2], "trained for 8": accuracies(lab.seed, 8)[2]}
    return seen["elastic"] > seen["trained for 8"] + 0.1, seen
