"""What "Convergent Learning" promises, tried on digits."""

import torch

from weightsmith import apply
from weightsmith.align import activation_matching
from weightsmith.align._pairs import assign, by_activations
from weightsmith.align.claims._nets import two
from weightsmith.lab import claim
from weightsmith.measure import loss_barrier


@claim("many units of one network have a partner in another that does the same; fewer in later layers",
       where="section 3", seconds=10)  # fmt: skip
def units_have_partners(lab):
    a, b, channels = two(lab)
    seen = {}
    for name, layer in (("1", "first"), ("3", "second")):
        alike = by_activations(a, b, channels, lab.digits()[0])[name]
        every = torch.arange(len(alike))
        seen[f"{layer}_matched"] = float(alike[every, assign(alike)].mean())
        seen[f"{layer}_random"] = float(alike[every, torch.randperm(len(alike), generator=lab.rng())].mean())
    gains = {layer: seen[f"{layer}_matched"] - seen[f"{layer}_random"] for layer in ("first", "second")}
    return min(gains.values()) > 0.3 and gains["first"] > gains["second"], seen


@claim("a network reordered by its units' correlations with another's lies in the other's basin", where="section 3.1",
       seconds=10)  # fmt: skip
def lowers_the_barrier(lab):
    a, b, channels = two(lab, "mlp", 512)
    matched = apply(activation_matching, [a, b], channels=channels, batch=lab.digits()[0])
    seen = {n: loss_barrier([a, w], lambda x: -lab.loss(x))["barrier"] for n, w in (("naive", b), ("matched", matched))}
    return seen["matched"] < 0.1 * seen["naive"], seen
