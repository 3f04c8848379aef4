"""Claims of magnitude pruning, and of how its sparsity is shared among layers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from weightsmith.core.apply import apply
from weightsmith.core.weights import Weights
from weightsmith.lab import Lab, claim
from weightsmith.prune.allocation import erk, uniform
from weightsmith.prune.magnitude import magnitude

ALL = "*.weight"


def retrained(lab: Lab, pruned: Weights, steps: int) -> nn.Module:
    """The network trained on with its zeros held at zero."""
    model = lab.module(pruned)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.register_hook(partial(torch.mul, (pruned.read(name) != 0).float()))
    lab.fit(model, lab.batches(), optimizer=partial(torch.optim.Adam, lr=2e-3), steps=steps)
    return model


@claim("retraining the survivors recovers at 90 % sparsity what pruning alone loses", where="Figure 5", seconds=5)
def retraining_recovers(lab: Lab) -> tuple[bool, dict[str, float]]:
    dense = lab.classifier("mlp")
    pruned = apply(magnitude, dense, sparsity=0.9, where="*.weight")
    seen = {"dense": lab.accuracy(dense), "pruned": lab.accuracy(pruned)}
    seen["retrained"] = lab.accuracy(retrained(lab, pruned, 300))
    return seen["retrained"] > seen["dense"] - 0.01 and seen["pruned"] < seen["dense"] - 0.03, seen


def allocated(lab: Lab, kind: str, allocate: Callable[..., dict[str, float]], sparsity: float) -> float:
    """Accuracy after pruning a trained classifier with this allocation and retraining it."""
    dense = lab.classifier(kind)
    shares = allocate(dense, sparsity=sparsity, where=ALL)
    return lab.accuracy(retrained(lab, apply(magnitude, dense, sparsity=shares, where="|".join(shares)), 300))


@claim(
    "at high sparsity the Erdős-Rényi kernel beats the same sparsity in every layer (97 %, CNN and MLP, retrained)",
    where="Rigging the Lottery, effect of mask initialization",
    seconds=30,
)
def erk_beats_uniform(lab: Lab) -> tuple[bool, dict[str, float]]:
    seen = {}
    for kind in ("cnn", "mlp"):
        seen[f"{kind}_erk"] = allocated(lab, kind, erk, 0.97)
        seen[f"{kind}_uniform"] = allocated(lab, kind, uniform, 0.97)
    return all(seen[f"{kind}_erk"] > seen[f"{kind}_uniform"] for kind in ("cnn", "mlp")), seen
