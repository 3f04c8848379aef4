"""What "Vanishing Variance Problem in Fully Decentralized Neural-Network Systems" promises, tried on digits."""

from functools import partial
from statistics import fmean

import torch

from weightsmith import Memory, apply
from weightsmith.lab import claim
from weightsmith.lab.data import batches
from weightsmith.merge import uniform_soup, variance_corrected_averaging

WIDTHS, LIMIT = (64, 256, 256, 10), 600
SGD = partial(torch.optim.SGD, lr=0.1)


def members(lab, count=5):
    """Networks with starts of their own, each trained a few steps on its own part of the data."""
    x, y = lab.digits("plain")
    for k in range(count):
        torch.manual_seed(100 * lab.seed + k)
        model = lab.mlp(WIDTHS)
        lab.fit(model, batches(x[k::count], y[k::count], 32, k), optimizer=SGD, steps=5)
        yield Memory.of(model)


def steps_to(lab, weights, accuracy=0.9):
    """Steps of SGD on all data until the test accuracy is there."""
    model, (x, y) = lab.module(weights), lab.digits("plain")
    data = batches(x, y, 32, lab.seed)
    for done in range(0, LIMIT, 10):
        if lab.accuracy(model) >= accuracy:
            return done
        lab.fit(model, data, optimizer=SGD, steps=10)
    return LIMIT


def spread_of(weights):
    """Mean variance of the weight matrices."""
    return fmean(float(weights.read(name).var()) for name in weights if len(weights.spec(name).shape) > 1)


@claim(
    "averages of unrelated models learn slowly, corrected ones as fast as a fresh start", where="abstract", seconds=15
)
def learns_without_delay(lab):
    with torch.random.fork_rng():
        found = list(members(lab))
        torch.manual_seed(100 * lab.seed + 99)
        fresh = Memory.of(lab.mlp(WIDTHS))
    merged = {"average": apply(uniform_soup, found), "corrected": apply(variance_corrected_averaging, found)}
    seen = {name: steps_to(lab, weights) for name, weights in {**merged, "fresh": fresh}.items()}
    seen |= {f"variance_{name}": spread_of(weights) for name, weights in merged.items()}
    return seen["corrected"] <= 0.7 * seen["average"] and seen["corrected"] <= 1.2 * seen["fresh"], seen
