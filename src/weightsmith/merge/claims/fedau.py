"""What "A Lightweight Method for Tackling Unknown Participation Statistics" promises, tried on linear regression."""

import torch

from weightsmith.lab import claim
from weightsmith.merge.fedau import Participation, fedau

CLIENTS, WIDTH, ROUNDS, LOCAL_STEPS = 20, 8, 3000, 5


def federated(lab, weighting):
    """Distance of the average of the last rounds' models from the optimum over all clients."""
    rng = lab.rng()
    x = torch.randn(CLIENTS, 32, WIDTH, generator=rng)
    rate = torch.linspace(0.05, 0.9, CLIENTS)
    truth = torch.randn(WIDTH, generator=rng) + 3 * rate[:, None]  # who is seldom there differs from who often is
    y = torch.einsum("ncd,nd->nc", x, truth)
    grams, targets = torch.einsum("nci,ncj->nij", x, x) / 32, torch.einsum("nci,nc->ni", x, y) / 32
    optimum = torch.linalg.solve(grams.sum(0), targets.sum(0))
    w, tail, seen = torch.zeros(WIDTH), torch.zeros(WIDTH), Participation(CLIENTS, cutoff=50)
    for step in range(ROUNDS):
        present = (torch.rand(CLIENTS, generator=rng) < rate).nonzero()[:, 0].tolist()
        locals_ = w.expand(len(present), WIDTH)
        for _ in range(LOCAL_STEPS):
            locals_ = locals_ - 0.002 * (torch.einsum("nij,nj->ni", grams[present], locals_) - targets[present])
        weight = {"fedau": seen.round(present), "known": tuple(float(1 / rate[n]) for n in present), "fedavg": 1.0}
        if present:
            whole = len(present) if weighting == "fedavg" else CLIENTS
            w = fedau(list(locals_), w, weight=weight[weighting], clients=whole)
        tail += w * (step >= ROUNDS // 2) / (ROUNDS - ROUNDS // 2)
    return float((tail - optimum).norm())


@claim("without knowing who comes how often it ends near the unbiased point", where="experiments", seconds=30)
def removes_the_bias(lab):
    seen = {name: federated(lab, name) for name in ("fedavg", "fedau", "known")}
    return seen["fedau"] <= 0.2 * seen["fedavg"], seen
