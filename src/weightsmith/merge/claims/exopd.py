"""What "Learning beyond Teacher" promises of extrapolation, tried on digits, in logits and in weights."""

from functools import partial

import torch

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import exopd

TASK = "turned"


def student(lab, teacher, reference, scale):
    """The reference model distilled towards the target between or beyond the two."""
    live, (x, _) = lab.module(reference), lab.digits(TASK)
    with torch.no_grad():
        target = exopd(lab.module(teacher)(x), lab.module(reference)(x), scale=scale).log_softmax(-1)

    def loss(model, rows):
        return torch.nn.functional.kl_div(
            target[rows], model(x[rows]).log_softmax(-1), log_target=True, reduction="batchmean"
        )

    rows = [torch.randperm(len(x), generator=lab.rng())[:64] for _ in range(300)]
    lab.fit(live, rows, optimizer=partial(torch.optim.AdamW, lr=1e-3), loss=loss, steps=300)
    return live


@claim("a student aimed past its teacher ends above it and above plain distillation", where="experiments", seconds=10)
def exceeds_the_teacher(lab):
    reference, teacher = lab.generalist(), lab.expert(TASK, steps=30, lr=5e-4)
    found = {"teacher": teacher, "plain_student": student(lab, teacher, reference, 1.0),
             "student": student(lab, teacher, reference, 1.25),
             "weights": apply(exopd, teacher, base=reference, scale=1.25)}  # fmt: skip
    seen = {"reference": lab.accuracy(reference, TASK), **{k: lab.accuracy(w, TASK) for k, w in found.items()}}
    return seen["student"] > max(seen["teacher"], seen["plain_student"]), seen


@claim("ExPO: the weights themselves, moved past the teacher, do better than it", where="arXiv:2404.16792", seconds=10)
def weights_past_the_teacher(lab):
    reference, teacher = lab.generalist(), lab.expert(TASK, steps=30, lr=5e-4)
    seen = {"teacher": lab.loss(teacher, TASK), "extrapolated": lab.loss(apply(exopd, teacher, base=reference), TASK)}
    return seen["extrapolated"] < seen["teacher"], seen
