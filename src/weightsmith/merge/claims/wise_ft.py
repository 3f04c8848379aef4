"""What "Robust fine-tuning of zero-shot models" and, building on it, BANG promise, tried on digits."""

from functools import partial
from statistics import fmean

import torch

from weightsmith import Memory, apply
from weightsmith.lab import claim
from weightsmith.lab.data import batches
from weightsmith.merge import wise_ft

SHIFTS = ("turned", "negative", "shifted", "mirrored")


def shifted(lab, weights):
    """Mean accuracy under the shifts that the fine-tuning never saw."""
    return fmean(lab.accuracy(weights, task) for task in SHIFTS)


@claim("averaging with the pretrained model helps under shift, at no cost without one", where="abstract", seconds=10)
def helps_under_shift(lab):
    base, tuned = lab.generalist(), lab.expert("plain")
    found = {"pretrained": base, "fine_tuned": tuned, "average": apply(wise_ft, tuned, base=base, scale=0.5)}
    seen = {name: lab.accuracy(w) for name, w in found.items()}
    seen |= {f"{name}_shifted": shifted(lab, w) for name, w in found.items()}
    gain = seen["average_shifted"] - seen["fine_tuned_shifted"]
    return gain > 0.01 and seen["average"] >= seen["fine_tuned"] - 0.01, seen


def balanced(lab):
    """The pretrained model fine-tuned with mixup and label smoothing."""
    model, rng = lab.module(lab.generalist()), lab.rng()

    def loss(model, batch):
        x, y = batch
        share, other = float(torch.rand((), generator=rng)), torch.randperm(len(x), generator=rng)
        logits = model(share * x + (1 - share) * x[other])
        smooth = partial(torch.nn.functional.cross_entropy, label_smoothing=0.1)
        return share * smooth(logits, y) + (1 - share) * smooth(logits, y[other])

    adam = partial(torch.optim.AdamW, lr=1e-3)
    lab.fit(model, batches(*lab.digits("plain"), 64, lab.seed), optimizer=adam, loss=loss, steps=200)
    return Memory.of(model)


@claim(
    "BANG: fine-tuned with mixup and label smoothing, the average does better still", where="experiments", seconds=15
)
def balanced_averaging_helps_more(lab):
    base, tuned, calm = lab.generalist(), lab.expert("plain"), balanced(lab)
    found = {"pretrained": base, "fine_tuned": tuned, "wise_ft": apply(wise_ft, tuned, base=base),
             "bang": apply(wise_ft, calm, base=base)}  # fmt: skip
    seen = {name: shifted(lab, w) for name, w in found.items()}
    right = {name: torch.cat([lab.module(w)(x).argmax(-1) == y for x, y in (lab.digits(t, "test") for t in SHIFTS)])
             for name, w in found.items()}  # fmt: skip
    both_wrong = ~right["pretrained"] & ~right["fine_tuned"]
    seen["right_where_both_are_wrong"] = float((both_wrong & right["wise_ft"]).float().mean())
    return seen["bang"] > seen["wise_ft"], seen
