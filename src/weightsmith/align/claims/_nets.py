"""Networks trained from different starts on digits, and their channels."""

from functools import cache, partial

import torch

from weightsmith import Memory
from weightsmith.core.arch.channels import trace
from weightsmith.lab.data import batches, digits
from weightsmith.lab.experiments import CNN, mlp
from weightsmith.lab.train import fit, one_thread, warmup_cosine

STEPS = 300


@cache
def trained(kind, width, start, task="plain"):
    """Weights of an MLP with two hidden layers, or of a CNN with batch norm; `start` seeds it and its batches."""
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(start)
        model = mlp((64, width, width, 10)) if kind == "mlp" else CNN(width)
        adam = partial(torch.optim.AdamW, lr=2e-3, weight_decay=1e-2)
        fit(model, batches(*digits(task), 64, start), optimizer=adam, steps=STEPS, schedule=warmup_cosine())
        return Memory({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})


def two(lab, kind="mlp", width=256, task="plain"):
    """Two networks from different starts, the second perhaps of another task, and their channels."""
    a, b = trained(kind, width, 2 * lab.seed + 100), trained(kind, width, 2 * lab.seed + 101, task)
    return a, b, trace(lab.module(a), digits()[0][:2])
