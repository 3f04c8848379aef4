"""What "Weight averaging for neural networks and local resampling schemes" promises, tried on digits."""

from statistics import fmean

import torch

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import linear


@claim("the average of retrained copies of a network predicts like their ensemble", where="abstract", seconds=10)
def predicts_like_the_ensemble(lab):
    copies = [lab.expert("plain", steps=60, lr=5e-4, run=run) for run in range(5)]
    x, y = lab.digits("plain", "test")
    with torch.no_grad():
        votes = torch.stack([lab.module(copy)(x).softmax(-1) for copy in copies]).mean(0)
    seen = {
        "average": lab.accuracy(apply(linear, copies)),
        "ensemble": float((votes.argmax(-1) == y).float().mean()),
        "members": fmean(lab.accuracy(copy) for copy in copies),
    }
    return seen["average"] >= seen["members"] and abs(seen["average"] - seen["ensemble"]) <= 0.01, seen
