"""What "FuseChat: Knowledge Fusion of Chat Models" promises of its merging, tried on digits."""

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import dare, sce, task_arithmetic, ties, uniform_soup
from weightsmith.merge.claims.breadcrumbs import TASKS, accuracy


@claim("it merges better than averaging, task arithmetic, TIES and DARE", where="experiments", seconds=10)
def beats_the_others(lab):
    base, experts = lab.generalist(), [lab.expert(task) for task in TASKS]
    merges = {
        "sce": apply(sce, experts, base=base, density=0.1),
        "average": apply(uniform_soup, experts),
        "task_arithmetic": apply(task_arithmetic, experts, base=base, scale=0.4),
        "ties": apply(ties, experts, base=base),
        "dare": apply(dare, experts, base=base, scale=0.4, seed=lab.seed),
    }
    seen = {name: accuracy(lab, weights) for name, weights in merges.items()}
    return seen["sce"] == max(seen.values()), seen
