"""Training a deep network fairly: the best of a few learning rates, divergence counted as failure."""

from collections.abc import Callable

import torch
from torch import nn

from weightsmith.core.errors import RunError
from weightsmith.lab import Lab

RATES = (3e-4, 1e-3, 3e-3)


def best_accuracy(lab: Lab, make: Callable[[], nn.Module], steps: int) -> float:
    """Accuracy on the test digits after some steps of Adam with the best of three learning rates."""
    found = []
    for lr in RATES:
        torch.manual_seed(lab.seed)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        try:
            lab.fit(model, lab.batches(), optimizer=optimizer, steps=steps)
            found.append(lab.accuracy(model))
        except RunError:
            found.append(0.0)
    return max(found)
