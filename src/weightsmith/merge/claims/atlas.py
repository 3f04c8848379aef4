"""What "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling" promises, tried on digits."""

from functools import partial
from statistics import fmean

import torch

from weightsmith import apply
from weightsmith.core.objective import objective
from weightsmith.lab import claim
from weightsmith.merge import atlas, task_arithmetic

TASKS = ("turned", "negative", "mirrored", "plain")


@claim(
    "from a few labelled samples of a new task, a coefficient for each tensor beats one for each task vector",
    where="few-shot recognition",
    seconds=20,
)
def composes_knowledge_for_a_new_task(lab):
    base, experts = lab.generalist(), [lab.expert(task) for task in TASKS]
    x, y = lab.digits("shifted")
    few = (x[:16], y[:16])
    kinds = {"blockwise": True, "one_a_model": False}
    loss = objective(lab.module(base), [few])
    made = {name: apply(atlas, experts, base=base, loss=loss, blockwise=kind) for name, kind in kinds.items()}
    head = lab.module(base)
    for parameter in list(head.parameters())[:-2]:
        parameter.requires_grad_(False)
    lab.fit(head, [few], optimizer=partial(torch.optim.AdamW, lr=1e-2), steps=100)
    seen = {name: lab.accuracy(model, "shifted") for name, model in {"base": base, **made, "head_only": head}.items()}
    return seen["blockwise"] >= max(seen["one_a_model"], seen["head_only"], seen["base"]) + 0.01, seen


@claim(
    "coefficients learned on validation data add tasks up better than one scale, even the best one",
    where="task addition",
    seconds=40,
)
def adds_tasks_better_than_one_scale(lab):
    base, experts = lab.generalist(), [lab.expert(task) for task in TASKS]
    losses = [objective(lab.module(base), [lab.digits(task, "validation")]) for task in TASKS]
    learned = apply(atlas, experts, base=base, loss=lambda tensors: sum(loss(tensors) for loss in losses))

    def mean(weights, split):
        return fmean(lab.accuracy(weights, task, split) for task in TASKS)

    scales = [apply(task_arithmetic, experts, base=base, scale=k / 10) for k in range(1, 11)]
    best = max(scales, key=lambda weights: mean(weights, "validation"))
    seen = {"atlas": mean(learned, "test"), "best_scale": mean(best, "test")}
    return seen["atlas"] > seen["best_scale"], seen
