"""What "Concrete Subspace Learning based Interference Elimination" promises, tried on digits."""

from itertools import islice
from statistics import fmean

from weightsmith import apply
from weightsmith.core.objective import entropy, objective
from weightsmith.lab import claim
from weightsmith.lab.data import batches
from weightsmith.merge import concrete_subspace, task_arithmetic

TASKS = ("turned", "negative", "mirrored")


@claim(
    "a shared mask learned from unlabelled samples makes task arithmetic better",
    where="experiments, multi-task performance",
    seconds=60,
)
def beats_task_arithmetic(lab):
    base, experts = lab.generalist(), [lab.expert(task) for task in TASKS]
    seen_by = {task: batches(*(part[:500] for part in lab.digits(task)), 64, lab.seed) for task in TASKS}
    losses = [objective(lab.module(base), islice(b, 8), entropy) for b in seen_by.values()]

    def mean(weights, split="test"):
        return fmean(lab.accuracy(weights, task, split) for task in TASKS)

    plain = {k / 10: apply(task_arithmetic, experts, base=base, scale=k / 10) for k in range(1, 11)}
    scale = max(plain, key=lambda k: mean(plain[k], "validation"))
    made = apply(
        concrete_subspace, experts, base=base, loss=lambda t: sum(loss(t) for loss in losses), scale=scale,
        seed=lab.seed, steps=2000, learning_rate=1e-3,
    )  # fmt: skip
    seen = {"masked": mean(made), "unmasked": mean(plain[scale])}
    return seen["masked"] >= seen["unmasked"] + 0.01, seen
