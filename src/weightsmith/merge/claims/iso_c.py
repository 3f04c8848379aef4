"""What "No Task Left Behind" promises of isotropic merging, tried on digits."""

from statistics import fmean

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import iso_c, task_arithmetic

TASKS = ("plain", "turned", "negative", "shifted", "mirrored")


def best(lab, method, base, experts, scales):
    """Mean test accuracy over the tasks at the scale that is best on held-out data."""

    def score(weights, split):
        return fmean(lab.accuracy(weights, task, split) for task in TASKS)

    found = [apply(method, experts, base=base, scale=scale) for scale in scales]
    return score(max(found, key=lambda weights: score(weights, "validation")), "test")


@claim("an isotropic sum beats the sum itself, each at its best scale", where="Table 1", seconds=20)
def beats_task_arithmetic(lab):
    base, experts = lab.generalist(), [lab.expert(task) for task in TASKS]
    seen = {
        "iso_c": best(lab, iso_c, base, experts, [k / 5 for k in range(1, 11)]),
        "task_arithmetic": best(lab, task_arithmetic, base, experts, [k / 20 for k in range(1, 11)]),
    }
    return seen["iso_c"] > seen["task_arithmetic"], seen
