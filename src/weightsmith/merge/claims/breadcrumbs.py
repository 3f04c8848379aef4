"""What "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks" promises, tried on digits."""

from statistics import fmean

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import breadcrumbs, task_arithmetic

TASKS = ("turned", "negative", "mirrored")


def accuracy(lab, weights, split="test"):
    """Mean over the tasks."""
    return fmean(lab.accuracy(weights, task, split) for task in TASKS)


def best(lab, method, **how):
    """The merge of all experts whose strength does best on validation data."""
    base, experts = lab.generalist(), [lab.expert(task) for task in TASKS]
    merges = [apply(method, experts, base=base, scale=scale, **how) for scale in (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)]
    return max(merges, key=lambda weights: accuracy(lab, weights, "validation"))


@claim("masking the smallest and largest changes merges better than task arithmetic", where="abstract", seconds=15)
def beats_task_arithmetic(lab):
    found = {"breadcrumbs": best(lab, breadcrumbs, density=0.1), "task_arithmetic": best(lab, task_arithmetic)}
    seen = {name: accuracy(lab, weights) for name, weights in found.items()}
    return seen["breadcrumbs"] > seen["task_arithmetic"], seen


@claim("an expert keeps its skill with a tenth of its changes, the largest left out", where="section 3", seconds=10)
def a_tenth_is_enough(lab):
    base, expert = lab.generalist(), lab.expert("turned")
    models = {"base": base, "expert": expert, "masked": apply(breadcrumbs, [expert], base=base, density=0.1)}
    seen = {name: lab.accuracy(weights, "turned") for name, weights in models.items()}
    return seen["masked"] > (seen["base"] + seen["expert"]) / 2, seen
